"""The command `tda`: `tda trace` is `python -m experiments.trace`, from any directory."""

import ast
import importlib.util
import pathlib
import runpy
import sys

from tda.runtime import command

_MAINS = (
    "trace",
    "table1",
    "table2",
    "ask",
    "view",
    "release",
    "sweep",
    "plan",
    "store",
    "spectra",
    "counterfactual",
)
_DEMO = ("trace", "--config=world_facts", "--workdir=demo")


def main() -> None:
    """Runs the command that the first argument names."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "-help", "--help", "help"):
        print(describe())
        return
    if name == "demo":
        name, arguments = _DEMO[0], [*_DEMO[1:], *arguments]
    if name not in _MAINS:
        sys.exit(f"error: unknown command {name!r}; use demo, {', '.join(_MAINS)}")
    sys.argv = [f"tda {name}", *arguments]
    try:
        runpy.run_module(f"{_package()}.{name}", run_name="__main__", alter_sys=True)
    except KeyboardInterrupt:  # while libraries are still being imported
        print(f"\ninterrupted. To run it again:\n  {command.typed()}", file=sys.stderr)
        sys.exit(130)


def describe() -> str:
    """Returns the help: every command with the first line of its docstring."""
    lines = {"demo": "Traces the embedded corpus (world_facts) in ./demo."}
    for name in _MAINS:
        path = importlib.util.find_spec(f"{_package()}.{name}").origin
        module = ast.parse(pathlib.Path(path).read_text(encoding="utf-8"))
        lines[name] = ast.get_docstring(module).split("\n")[0]
    width = max(map(len, lines))
    return "\n".join(
        [
            "Training-data attribution for language-model pretraining.",
            "",
            "    tda COMMAND [FLAGS]",
            "    tda COMMAND --help",
            "",
            *(f"{name:<{width}}  {line}" for name, line in lines.items()),
        ]
    )


def _package() -> str:
    # setup.py puts the mains inside the package; in a checkout they are beside it. Only this copy's
    # own mains are run, since another checkout may be installed too.
    here = pathlib.Path(__file__).parent
    if (here / "experiments").is_dir():
        return "tda.experiments"
    beside = importlib.util.find_spec("experiments")
    if beside and beside.origin == str(here.parent / "experiments" / "__init__.py"):
        return "experiments"
    return "tda.experiments"


if __name__ == "__main__":
    main()
