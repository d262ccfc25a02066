"""Refuses arguments of `tda.encode` and `tda.trace` that the other arguments make ineffective."""

from collections.abc import Sequence
from typing import Any

from tda import methods
from tda.data.corpora import Corpus
from tda.gradients.moments.scales import parse_correction

# Arguments of the optimizer correction, and those for texts.
_MOMENTS = ("scales", "correction", "sample")
_READING = ("context", "tokens_per_batch", "text_field", "id_field", "joiner", "directory")


def check(
    names: Sequence[str], arguments: dict[str, Any], passages: Any, has_tokenizer: bool
) -> None:
    """Checks that every argument that the caller gave has an effect.

    Args:
        names: the methods' names.
        arguments: the optional arguments that the caller gave, by name.
        passages: the passages, as for `tda.trace`.
        has_tokenizer: whether there is a tokenizer.

    Raises:
        ValueError: one has no effect; the message names it and says why.
    """
    chosen = [methods.METHODS[name] for name in names]
    described = f"method={', '.join(names)!r}"
    if "correction" in arguments:
        parse_correction(arguments["correction"])
    # EK-FAC draws passages and labels.
    is_drawing = any(m.curvature != "none" for m in chosen)
    is_iterator = not has_tokenizer and not isinstance(passages, Sequence)
    # Whether a rule applies, the arguments without an effect then, why, and what to do.
    rules: list[tuple[bool, tuple[str, ...], str, str]] = [
        (
            not any(m.corrected for m in chosen),
            _MOMENTS if is_drawing else (*_MOMENTS, "seed"),
            f"with {described}, whose gradients are not corrected",
            "leave it out, or use a corrected method such as 'trackstar_train' or 'exp3'",
        ),
        (
            isinstance(arguments.get("scales"), dict),
            ("correction",),
            "beside scales=, which are 1/√V already",
            "leave it out, or give the second moments (tda.second_moments)",
        ),
        (
            "scales" in arguments,
            ("sample",) if is_drawing else ("sample", "seed"),
            "beside scales=: no second moments are estimated",
            "leave it out",
        ),
        (
            all(m.hessian == "none" for m in chosen),
            ("damping", "structure"),
            f"with {described}, which has no R",
            "leave it out, or use a method with R such as 'trackstar_train' or 'exp4'",
        ),
        (
            not has_tokenizer,
            _READING,
            "on batches: it is for texts",
            "leave it out, or give a tokenizer",
        ),
        (
            is_iterator,
            ("seed",),
            "on an iterator of batches, which is read once: its first batches are the sample",
            "leave it out, or give a list of batches",
        ),
        (
            has_tokenizer,
            ("texts",),
            "beside a tokenizer: it is for passages that are batches",
            "leave it out",
        ),
        (
            isinstance(passages, Corpus),
            ("text_field", "id_field"),
            "on a Corpus, which has its own",
            "give it to Corpus",
        ),
    ]
    for applies, names, reason, remedy in rules:
        for argument in names if applies else ():
            if argument in arguments:
                raise ValueError(
                    f"{_describe(argument, arguments[argument])} has no effect {reason}; {remedy}"
                )


def _describe(argument: str, value: Any) -> str:
    return f"{argument}={value!r}" if isinstance(value, str | int | float) else f"{argument}="
