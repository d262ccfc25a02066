"""What the code imports is what setup.py names."""

import ast
import pathlib
import re
import sys
from importlib import metadata

import pytest

ROOT = pathlib.Path(__file__).parents[1]
OURS = {"tda", "experiments", "configs", "benchmarks", "tests", "docs"}
# Imported by another name than they are installed by; the environment knows the others.
NAMES = {"PIL": "pillow", "transformers": "transformers", "torch": "torch"}


def requirements() -> dict[str, list[str]]:
    """What setup.py asks for, by extra; "" for what is always installed."""
    tree = ast.parse((ROOT / "setup.py").read_text())
    call = next(
        n.value for n in tree.body if isinstance(n, ast.Expr) and isinstance(n.value, ast.Call)
    )
    fields = {k.arg: k.value for k in call.keywords}
    listed = {"": ast.literal_eval(fields["install_requires"])}
    return listed | ast.literal_eval(fields["extras_require"])


def declared() -> dict[str, set[str]]:
    """Names of distributions by extra."""
    return {e: {plain(re.split(r"[<>=;\[]", r)[0]) for r in rs} for e, rs in requirements().items()}


def plain(name: str) -> str:
    """The name of a distribution as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


def imports(file: pathlib.Path) -> list[tuple[str, bool, int]]:
    """Packages that a file imports: name, whether on import of the file itself, and line."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    inside = {
        id(n)
        for f in ast.walk(tree)
        if isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef)
        for n in ast.walk(f)
    }
    found = []
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module]
        found += [(n.split(".")[0], id(node) not in inside, node.lineno) for n in names]
    return found


def distributions(package: str, known: dict[str, list[str]]) -> set[str]:
    """What may have to be installed for an import of a package."""
    return {plain(d) for d in known.get(package, [])} or {plain(NAMES.get(package, package))}


@pytest.fixture(scope="module")
def known():
    return metadata.packages_distributions()


@pytest.mark.parametrize("folder", ["tda", "experiments", "configs"])
def test_every_import_is_declared(folder, known):
    extras = declared()
    anywhere = set.union(*extras.values())
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    for file in files:
        for package, at_once, line in imports(file):
            if package in OURS or package in sys.stdlib_module_names:
                continue
            there = distributions(package, known)
            wanted = extras[""] if at_once else anywhere
            where = f"{file.relative_to(ROOT)}:{line}"
            assert there & wanted, f"{where} imports {package}; setup.py names none of {there}"


def test_what_tests_import_at_once_comes_with_the_extra(known):
    extras = declared()
    wanted = extras[""] | extras["test"]
    for file in sorted((ROOT / "tests").rglob("*.py")):
        for package, at_once, line in imports(file):
            if at_once and package not in OURS and package not in sys.stdlib_module_names:
                there = distributions(package, known)
                where = f"{file.relative_to(ROOT)}:{line}"
                assert there & wanted, f"{where} imports {package}; setup.py names none of {there}"


def test_every_extra_has_the_bounds_that_are_run():
    """`make test-versions` installs the lower bounds of the extra `test` alone."""
    bounds = {}
    for extra, listed in requirements().items():
        for requirement in listed:
            name, bound = re.fullmatch(
                r"([\w.-]+)(?:\[\w+\])?[=>]=([\d.]+).*", requirement
            ).groups()
            bounds.setdefault(plain(name), {})[extra or "always"] = bound
    for name, by_extra in bounds.items():
        assert len(set(by_extra.values())) == 1, f"{name}: {by_extra}"


def test_messages_name_our_own_distribution_and_an_extra_that_exists():
    """Guards: `pip install 'tda-jax[…]'`, which installs another project of that name."""
    named = set()
    for folder in ("tda", "experiments", "tests", "docs"):
        for file in (ROOT / folder).rglob("*.*"):
            if file.suffix in (".py", ".md") and file != pathlib.Path(__file__):
                text = file.read_text(encoding="utf-8")
                named |= set(re.findall(r"pip install (?:-e )?'([\w.-]+)\[(\w+)\\*\]'", text))
    assert {name for name, _ in named} == {"tda-jax", "."}
    assert {extra for _, extra in named} <= declared().keys()
