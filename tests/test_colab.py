"""Badges and first cells for Colab, which follow from the address that mkdocs.yml states."""

import json
import os
import pathlib
import re
import runpy
import shutil
import subprocess
import sys
import types

import pytest
import setuptools

from docs import colab
from tests.test_docs import run_command

ROOT = pathlib.Path(__file__).parents[1]
ADDRESS = "https://github.com/owner/some.name"
LINK = "https://colab.research.google.com/github/owner/some.name/blob/main/docs/notebooks/"
NAMES = sorted(p.name for p in colab.NOTEBOOKS.glob("*.ipynb"))


def content_of(source: str, repo_url: str | None) -> str:
    page = types.SimpleNamespace(file=types.SimpleNamespace(src_uri=source))
    return colab.on_page_content("<p>text</p>", page, {"repo_url": repo_url}, [])


@pytest.mark.parametrize("repo_url", [ADDRESS, f"{ADDRESS}/", f"{ADDRESS}.git"])
def test_with_an_address_every_notebook_and_the_index_has_its_badge(repo_url):
    for name in NAMES:
        assert f'href="{LINK}{name}"' in content_of(f"notebooks/{name}", repo_url)
    assert re.findall(r'href="([^"]+)"', content_of("index.md", repo_url)) == [
        LINK + name for name in NAMES
    ]
    assert content_of("tuning.md", repo_url) == "<p>text</p>"


def test_links_to_files_beside_the_pages_lead_to_the_repository():
    """The site holds docs/ alone, and the pages cite results, benchmarks and code."""
    page = "[figures](../results/README.md#judges), [methods](methods.md)"
    assert colab.on_page_markdown(page, None, {"repo_url": ADDRESS}, []) == (
        f"[figures]({ADDRESS}/blob/main/results/README.md#judges), [methods](methods.md)"
    )
    assert colab.on_page_markdown(page, None, {"repo_url": None}, []) == page


@pytest.mark.parametrize("repo_url", [None, "", "https://gitlab.com/owner/name"])
def test_without_an_address_of_github_nothing_is_shown(repo_url):
    for source in ("index.md", f"notebooks/{NAMES[0]}"):
        assert content_of(source, repo_url) == "<p>text</p>"


@pytest.fixture
def notebooks(tmp_path, monkeypatch):
    shutil.copytree(colab.NOTEBOOKS, tmp_path / "notebooks")
    monkeypatch.setattr(colab, "NOTEBOOKS", tmp_path / "notebooks")
    return tmp_path / "notebooks"


def first_cell(path: pathlib.Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))["cells"][0]


def test_the_first_cell_installs_from_the_address_on_colab_alone(notebooks, monkeypatch):
    before = {n: (notebooks / n).read_text(encoding="utf-8") for n in NAMES}
    colab.on_pre_build({"repo_url": ADDRESS})
    colab.on_pre_build({"repo_url": ADDRESS})
    commands: list[str] = []
    monkeypatch.setattr(subprocess, "run", lambda command, **options: commands.append(command))
    monkeypatch.chdir(notebooks)
    (notebooks / "tda-source" / "docs" / "notebooks").mkdir(parents=True)
    for name in NAMES:
        cell = first_cell(notebooks / name)
        assert cell["id"] == colab.CELL and cell["outputs"] == []
        exec("".join(cell["source"]), {})
    assert commands == [] and pathlib.Path.cwd() == notebooks
    monkeypatch.setitem(sys.modules, "google.colab", types.ModuleType("google.colab"))
    exec("".join(cell["source"]), {})
    assert commands[0] == f"git clone -q --depth=1 {ADDRESS} tda-source"
    assert pathlib.Path.cwd() == notebooks / "tda-source" / "docs" / "notebooks"
    colab.on_pre_build({"repo_url": None})
    assert {n: (notebooks / n).read_text(encoding="utf-8") for n in NAMES} == before


def test_the_extras_that_the_cell_installs_exist(monkeypatch):
    given: dict = {}
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: given.update(arguments))
    monkeypatch.chdir(ROOT)
    runpy.run_path("setup.py")
    (extras,) = re.findall(r"\[([\w,]+)\]", colab.INSTALL)
    assert set(extras.split(",")) <= given["extras_require"].keys()


def test_the_committed_notebooks_agree_with_the_address_of_mkdocs_yml():
    """If this fails, `make docs` writes their first cells anew."""
    stated = re.search(r"^repo_url: (\S+)", (ROOT / "mkdocs.yml").read_text(), re.M)
    address = colab.github_address(stated and stated[1])
    for path in sorted(colab.NOTEBOOKS.glob("*.ipynb")):
        cell = first_cell(path)
        expected = colab.INSTALL.format(address=address) if address else None
        assert ("".join(cell["source"]) if cell["id"] == colab.CELL else None) == expected


@pytest.mark.slow
@pytest.mark.parametrize("address", [ADDRESS, None])
def test_the_site_shows_badges_once_an_address_is_stated(tmp_path, address):
    pytest.importorskip("mkdocs_jupyter", reason="needs the extra `docs`")
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    os.symlink(ROOT / "tda", tmp_path / "tda")
    settings = (ROOT / "mkdocs.yml").read_text()
    if address:
        settings = settings.replace(
            "# repo_url: https://github.com/OWNER/NAME", f"repo_url: {address}"
        )
    (tmp_path / "mkdocs.yml").write_text(settings)
    ended = run_command("python -m mkdocs build --strict -d site", tmp_path)
    assert ended.returncode == 0, ended.stderr
    for page in ["", *(f"notebooks/{n.removesuffix('.ipynb')}" for n in NAMES)]:
        html = (tmp_path / "site" / page / "index.html").read_text()
        badges = (1 if page else len(NAMES)) if address else 0
        assert html.count('alt="Open in Colab"') == badges, page
        assert "git clone" not in html
    assert not (tmp_path / "site" / "colab.py").exists()
