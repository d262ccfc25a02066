"""The viewer as a folder of static files, for any web server or to open from a disk.

A page that is opened from a disk may load scripts, but neither modules nor JSON. So the page's
modules are joined into one script, and every piece of data becomes a script of its own.
"""

import json
import os
import pathlib
import re
import shutil

from tda.runtime import progress
from tda.runtime.directories import check_directory, make_directory
from tda.viewer.collection import Collection
from tda.viewer.results_file import to_json
from tda.viewer.server import static_files

_MARK = "tda-viewer-export"
_IMPORT = re.compile(r'^import (?:\* as (\w+)|\{ ([^}]+) \}) from "\./(\w+)\.js";$', re.MULTILINE)
_EXPORT = re.compile(
    r"^export (?=(?:async )?function (\w+)|class (\w+)|const (\w+))|^export \{ ([^}]+) \};$",
    re.MULTILINE,
)
# The policy of `tda.viewer.guard` without frame-ancestors, which has no effect inside a page, and
# without trusted types, which would block the script elements that load the data.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "base-uri 'none'; form-action 'none'"
)


class ExportError(ValueError):
    """An export cannot be written."""


def export(collection: Collection, out) -> int:
    """Writes a collection and the page that shows it; returns the number of files of data.

    Args:
        collection: the contents of the viewer.
        out: the folder; absent, empty, or with an earlier export, finished or not, to replace.

    Raises:
        ExportError: the folder holds other files.
        tda.runtime.directories.DirectoryError: it cannot be made.
        OSError: it cannot be written.
    """
    out = pathlib.Path(out)
    # Only a folder with this file is an export, which another may replace.
    mark = out / f".{_MARK}"
    check_directory(out)
    if out.is_dir() and any(out.iterdir()) and not mark.exists():
        raise ExportError(f"{out} holds other files; name an empty folder")
    make_directory(out)
    mark.touch()
    for folder in ("data", "static", "plots"):
        shutil.rmtree(out / folder, ignore_errors=True)
        (out / folder).mkdir()
    _write_page(out)
    names = list(collection.pieces())
    with progress.bar(len(names), "export", "file") as bar:
        for name in names:
            path = out / "data" / f"{name}.js"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(_script(name, collection.piece(name)))
            bar.update()
    for plot in collection.index()["plots"]:
        shutil.copyfile(collection.plot(plot["file"]), out / "plots" / plot["file"])
    return len(names)


def _script(name: str, value) -> bytes:
    # ASCII JSON is a JavaScript expression. It is a file of its own, so "</script" does no harm.
    return b"viewerData(" + json.dumps(name).encode() + b"," + to_json(value) + b");\n"


def _write_page(out: pathlib.Path) -> None:
    files = static_files()
    page = files.pop("index.html").decode()
    modules = {n[:-3]: f.decode() for n, f in files.items() if n.endswith(".js")}
    page = page.replace('data-token=""', "data-export", 1)
    page = page.replace(
        '<script type="module" src="static/main.js"></script>',
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '    <script defer src="static/viewer.js"></script>',
        1,
    )
    (out / "index.html").write_text(page, encoding="utf-8")
    (out / "static" / "viewer.js").write_text(bundle(modules, "main"), encoding="utf-8")
    for name, content in files.items():
        if not name.endswith(".js"):
            (out / "static" / os.path.basename(name)).write_bytes(content)


def bundle(modules: dict[str, str], entry: str) -> str:
    """Joins modules, by name, into one classic script: a function for each, `entry` last.

    An import is `import { a, b } from "./name.js";` or `import * as a from "./name.js";` in one
    line; an export stands before `function`, `async function`, `class` or `const`.

    Raises:
        ExportError: an import or export is written in another way, or imports run in a circle.
    """
    done: dict[str, str] = {}

    def take(name: str, above: tuple[str, ...]) -> None:
        if name in above:
            raise ExportError(f"imports run in a circle: {' > '.join((*above, name))}")
        if name in done:
            return
        if name not in modules:
            raise ExportError(f"{above[-1]}.js imports {name}.js, which is not there")
        for _, _, other in _IMPORT.findall(modules[name]):
            take(other, (*above, name))
        done[name] = _wrapped(name, modules[name])

    take(entry, ())
    return '"use strict";\nconst modules = {};\n' + "\n".join(done.values())


def _wrapped(name: str, source: str) -> str:
    exported: list[str] = []

    def export_of(match: re.Match) -> str:
        function, klass, const, listed = match.groups()
        exported.extend(listed.split(", ") if listed else [function or klass or const])
        return ""

    def import_of(match: re.Match) -> str:
        namespace, names, other = match.groups()
        pattern = namespace or "{ " + names.replace(" as ", ": ") + " }"
        return f"const {pattern} = modules.{other};"

    source = _IMPORT.sub(import_of, _EXPORT.sub(export_of, source))
    left = re.search(r"^(?:import|export)\b.*", source, re.MULTILINE)
    if left:
        raise ExportError(f"{name}.js: cannot bundle {left[0]!r}")
    return f"modules.{name} = (() => {{\n{source}\nreturn {{ {', '.join(exported)} }};\n}})();\n"
