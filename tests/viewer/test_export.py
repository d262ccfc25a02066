"""The export: everything that a page asks for is there, and the page's modules are one script."""

import json
import pathlib
import re

import pytest

from tda import results
from tda.runtime.directories import DirectoryError
from tda.viewer.collection import Collection
from tda.viewer.export import ExportError, bundle, export
from tda.viewer.server import static_files
from tests.viewer.big_file import records


@pytest.fixture
def collection(tmp_path):
    (tmp_path / "w" / "plots").mkdir(parents=True)
    (tmp_path / "w" / "plots" / "p.svg").write_text("<svg/>")
    found = Collection(tmp_path / "w")
    for name in ("a", "b"):
        results.write(tmp_path / f"{name}.jsonl", records(1203, 3, 20))
        found.add(tmp_path / f"{name}.jsonl")
    return found


def pieces_of(out):
    """Every piece of an export, read as its script gives it."""
    found = {}
    for path in (out / "data").rglob("*.js"):
        script = re.fullmatch(r'viewerData\("([^"]+)",(.*)\);\n', path.read_text())
        name, value = script.groups()
        assert path == out / "data" / f"{name}.js"
        found[name] = json.loads(value)
    return found


def test_every_piece_is_there_and_the_same(collection, tmp_path):
    out = tmp_path / "out"
    count = export(collection, out)
    found = pieces_of(out)
    assert len(found) == count == 2 + 2 * (2 + 121 + 1)
    for name, value in found.items():
        assert value == json.loads(json.dumps(collection.piece(name))), name
    assert (out / "plots" / "plot-0.svg").read_text() == "<svg/>"
    page = (out / "index.html").read_text()
    assert "data-export" in page and "module" not in page and "Content-Security-Policy" in page
    assert "'unsafe" not in page
    # Made anew: what was there of an earlier export and is no more is gone.
    (out / "data" / "old.js").write_text("x")
    export(collection, out)
    assert pieces_of(out).keys() == found.keys()


def test_the_example_in_the_docs_has_todays_page(collection, tmp_path):
    """Mistake: an example that a change of the page has left behind; `make example` makes it."""
    export(collection, tmp_path / "out")
    example = pathlib.Path(__file__).parents[2] / "docs" / "example"
    for page in ("index.html", *(f"static/{p.name}" for p in (example / "static").iterdir())):
        assert (example / page).read_bytes() == (tmp_path / "out" / page).read_bytes(), page


def test_other_files_are_not_overwritten(collection, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("x")
    with pytest.raises(ExportError, match="holds other files"):
        export(collection, tmp_path / "full")
    for out in ("a.jsonl", "a.jsonl/out"):
        with pytest.raises(DirectoryError, match="a.jsonl is a file; give a directory"):
            export(collection, tmp_path / out)


def test_modules_become_one_script():
    modules = {
        "main": 'import { f, g as h } from "./a.js";\nimport * as b from "./b.js";\nh(f(b.x));\n',
        "a": 'import { x } from "./b.js";\nexport function f() {}\nexport const g = x;\n'
        "export class C {}\nexport async function s() {}\n",
        "b": "const x = 1;\nexport { x };\n",
        "unused": "throw 1;",
    }
    script = bundle(modules, "main")
    assert script.index("modules.b =") < script.index("modules.a =") < script.index("modules.main")
    assert "return { f, g, C, s };" in script and "return { x };" in script
    assert "const { f, g: h } = modules.a;" in script and "const b = modules.b;" in script
    assert "unused" not in script and not re.search(r"^(import|export)", script, re.MULTILINE)


def test_modules_that_are_written_otherwise_are_refused():
    for source, why in (
        ('import x from "./a.js";', "cannot bundle 'import x"),
        ("export default 1;", "cannot bundle 'export default"),
        ('import { a } from "./absent.js";', "absent.js, which is not there"),
        ('import { a } from "./main.js";', "in a circle: main > main"),
    ):
        with pytest.raises(ExportError, match=why):
            bundle({"main": source}, "main")


def test_the_pages_own_modules_are_understood():
    modules = {n[:-3]: f.decode() for n, f in static_files().items() if n.endswith(".js")}
    script = bundle(modules, "main")
    for name in modules:
        assert f"modules.{name} = " in script


def test_nothing_of_the_page_parses_markup():
    """Guards: text that is set as markup, or code made of text."""
    for name, source in static_files().items():
        found = re.search(
            rb"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|"
            rb"DOMParser|createContextualFragment|srcdoc",
            source,
        )
        assert found is None, (name, found)


def test_no_pattern_escapes_what_the_flag_u_forbids():
    """A pattern with such an escape throws, and its page cannot be shown."""
    source = "".join(f.decode() for n, f in static_files().items() if n.endswith(".js"))
    classes = re.findall(r'replace\(/\[(.+?)\]/gu, "\\\\\$&"\)[^;]*\\\\s\+', source)
    assert classes and all(set(c) <= set("^$\\.*+?()[]{}|/") for c in classes)
