"""The retrievers by name: the package's own, and those that plugins register."""

import dataclasses
import importlib
import importlib.metadata
from collections.abc import Callable, Iterable

from tda.methods import Method
from tda.run.captured import Captured
from tda.run.controls import GradientNorm, Labels, Length, Random
from tda.run.fusion import Fusion
from tda.run.gradient_retrievers import Gradients, Sums
from tda.run.retrievers import Dense, Hidden, Retriever, Words
from tda.run.run import Run
from tda.run.second_stage import SecondStage

# Each function, or class, returns the retriever of a run.
RETRIEVERS: dict[str, Callable[[Run], Retriever]] = {
    "gradient": Gradients,
    "sums": Sums,
    "captured": Captured,
    "bm25": Words,
    "dense": Dense,
    "hidden": Hidden,
    "annotated": Labels,
    "random": Random,
    "length": Length,
    "gradient_norm": GradientNorm,
    # Their candidates come from other retrievers.
    "rerank": lambda run: SecondStage(run, retriever_of),
    "rrf": lambda run: Fusion(run, retriever_of),
}
_OF_PACKAGE = frozenset(RETRIEVERS.values())
# Installed packages list their plugin modules in this group of entry points.
_ENTRY_POINTS = "tda.methods"


def register_retriever(name: str, factory: Callable[[Run], Retriever]) -> None:
    """Registers a retriever under a name, for methods with `retriever=name`.

    Args:
        name: the name.
        factory: returns the retriever of a run: a subclass of `Retriever` itself, or a function.

    Raises:
        ValueError: the name belongs to another retriever.
    """
    if RETRIEVERS.setdefault(name, factory) is not factory:
        raise ValueError(f"retriever {name!r} is registered already; give yours another name")


def retriever_of(method: Method) -> Callable[[Run], Retriever]:
    """Returns the function that makes a method's retriever.

    Raises:
        ValueError: its name is unknown, or the method sets a field that the package's retrievers do
            not know and would silently ignore.
    """
    if method.searched_by not in RETRIEVERS:
        raise ValueError(
            f"{method.title}: unknown retriever {method.retriever!r}; there are "
            f"{', '.join(RETRIEVERS)}, and what a --plugin registers"
        )
    factory = RETRIEVERS[method.searched_by]
    known = {field.name for field in dataclasses.fields(Method)}
    beyond = {name: x for name, x in method.beyond_plain.items() if name not in known}
    if beyond and factory in _OF_PACKAGE:
        named = ", ".join(f"{name}={value}" for name, value in beyond.items())
        raise ValueError(
            f"{method.title}: the retriever {method.searched_by!r} does not know {named}; register "
            "a retriever that uses it (docs/add_a_method.md)"
        )
    return factory


def is_of_package(method: Method) -> bool:
    """Returns whether the retriever of a method is one of the package's own."""
    return retriever_of(method) in _OF_PACKAGE


def load_plugins(modules: Iterable[str]) -> None:
    """Imports modules that register methods and retrievers: those named, and installed ones.

    Raises:
        ValueError: a module cannot be found; the message names it.
    """
    for module in modules:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            raise ValueError(
                f"--plugin={module} cannot be imported ({error}); it must be installed, or in a "
                "directory of PYTHONPATH"
            ) from error
    for entry_point in importlib.metadata.entry_points(group=_ENTRY_POINTS):
        entry_point.load()
