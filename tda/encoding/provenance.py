"""Names and JSON values of everything that decides the gradients in a directory of `tda.trace`."""

import dataclasses
import pathlib
import re

import jax

from tda.encoding import loss_identity
from tda.encoding.settings import TraceSettings
from tda.gradients.moments.scales import Scale
from tda.model import functional
from tda.runtime import sharding
from tda.runtime.fingerprint import fingerprint, fingerprint_arrays, plain


def describe_gradients(settings: TraceSettings, directory: pathlib.Path) -> dict:
    """Returns, as JSON values, what decides the gradients of a passage except their correction."""
    _, params = functional.split(settings.model)
    return plain(
        {
            "model": _fingerprint_arrays(functional.flat_parameters(params)),
            "projection": dataclasses.asdict(settings.projection),
            "loss": loss_identity.identify_or_load(
                settings.example_losses, settings.model, directory
            ),
            "parameters": {s.path: list(s.shape) for s in settings.sites()},
            **settings.scope,
        }
    )


def name_correction(settings: TraceSettings, scales: dict[str, Scale] | None) -> str:
    """Returns the folder's name of gradients with one correction; `scales` is 1/√V if known."""
    if settings.curvature != "none":
        return f"{settings.curvature}_seed{settings.moments.seed}"
    if not settings.corrected:
        return "uncorrected"
    moments = settings.moments
    if settings.needs_estimate:
        made_from = [moments.sample, moments.seed, settings.tokens_per_batch]
    else:
        made_from = describe_correction(settings, scales)
    digest = fingerprint(plain([moments.correction, made_from]))
    return re.sub(r"\W+", "_", f"{moments.correction}_{digest[:8]}")


def describe_correction(settings: TraceSettings, scales: dict[str, Scale] | None) -> dict:
    """Returns the correction of the gradients as JSON values."""
    if settings.curvature != "none":
        # The factors are of passages and labels that the seed draws.
        return {"correction": settings.curvature, "seed": settings.moments.seed}
    if scales is None:
        return {"correction": "none"}
    arrays = {f"{p}/{n}": x for p, s in scales.items() for n, x in vars(s).items() if x is not None}
    return {"correction": settings.moments.correction, "scales": _fingerprint_arrays(arrays)}


def _fingerprint_arrays(arrays: dict[str, jax.Array]) -> str:
    return fingerprint_arrays({name: sharding.to_host(x) for name, x in arrays.items()})
