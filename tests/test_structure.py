"""The shape of the package: rooms import downward only, without a circle, and keep their names."""

import ast
import graphlib
import pathlib

import tda

ROOT = pathlib.Path(tda.__file__).parent
# From the top of the house to its ground; a module imports its own floor and those below.
FLOORS = [
    {"__main__"},
    {"api", "index", "training_trace", "answers"},
    {"sweep", "live", "plan"},
    {"run"},
    {"encoding"},
    {"counterfactual"},
    {"evaluation"},
    {"gradients"},
    {"retrieval"},
    {"training"},
    {"hessian"},
    {"facts"},
    {"model"},
    {"viewer"},
    {"data"},
    {"store"},
    {"reports"},
    {"runtime"},
    {"methods", "loss", "results"},
]
# Modules that import upward, and what: none may be added.
UPWARD = {("tda.results", "tda.runtime.atomic_file")}
READ_CONFIGS = {"sweep", "plan", "live", "run"}


def modules() -> dict[str, ast.Module]:
    """The syntax tree of every module by its dotted name."""
    names = {}
    for path in ROOT.rglob("*.py"):
        parts = ("tda", *path.relative_to(ROOT).with_suffix("").parts)
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        names[name] = ast.parse(path.read_text(encoding="utf-8"))
    return names


def imports(tree: ast.Module, known) -> set[str]:
    """The modules that a module imports, inside of functions too."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            submodules = inner & known.keys()
            names |= submodules
            if len(submodules) < len(inner):
                names.add(node.module)
    return names


def room(module: str) -> str:
    """The room of a module: "store" of "tda.store.rows"."""
    return module.split(".")[1] if "." in module else ""


def floor(name: str) -> int:
    """The number of a room's floor, counted from the top."""
    return next(i for i, rooms in enumerate(FLOORS) if name in rooms)


def test_every_room_has_a_floor():
    rooms = {room(name) for name in modules()} - {""}
    assert rooms <= set().union(*FLOORS)


def test_no_module_is_part_of_a_circle_of_imports():
    known = modules()
    graph = {name: imports(tree, known) & known.keys() for name, tree in known.items()}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        raise AssertionError(" imports ".join(error.args[1][::-1])) from error


def test_rooms_import_downward_only():
    known = modules()
    upward = set()
    for name, tree in known.items():
        for imported in imports(tree, known) & known.keys():
            above, below = room(name), room(imported)
            if above and below and floor(below) < floor(above):
                upward.add((name, imported))
    assert upward == UPWARD


def test_configs_are_read_by_runs_sweeps_and_plans_alone():
    readers = {
        name
        for name, tree in modules().items()
        for imported in imports(tree, {})
        if imported.split(".")[0] in ("configs", "experiments", "ml_collections")
        and room(name) not in READ_CONFIGS
    }
    assert not readers


def test_no_module_is_named_for_nothing_in_particular():
    names = {part for name in modules() for part in name.split(".")}
    assert not names & {"utils", "util", "helpers", "misc", "common"}
