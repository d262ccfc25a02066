"""The judges by name: the package's own, and those that plugins register."""

from collections.abc import Callable

from tda.evaluation.entailment import Entailment
from tda.evaluation.judge import Judge, JudgeSettings
from tda.evaluation.lexical import Lexical


def _lexical(settings: JudgeSettings) -> Judge:
    if settings.model:
        raise ValueError(
            f"judge.model={settings.model!r}, but the lexical judge has no model; leave it out, or "
            "use judge.name=nli"
        )
    return Lexical()


# Each function, or class, makes a judge; it raises ValueError if an extra or a model is missing.
JUDGES: dict[str, Callable[[JudgeSettings], Judge]] = {"lexical": _lexical, "nli": Entailment}


def register(name: str, factory: Callable[[JudgeSettings], Judge]) -> None:
    """Registers a judge under a name, for this process.

    Raises:
        ValueError: the name belongs to another judge.
    """
    if JUDGES.setdefault(name, factory) is not factory:
        raise ValueError(f"judge {name!r} is registered already; give yours another name")


def make(name: str, settings: JudgeSettings) -> Judge:
    """Makes the judge of a name.

    Raises:
        ValueError: the name is unknown, or an extra or a model is missing.
    """
    if name not in JUDGES:
        raise ValueError(
            f"unknown judge.name={name!r}; there are {', '.join(JUDGES)}, and what a --plugin "
            "registers"
        )
    return JUDGES[name](settings)
