"""Gradients of examples in one call: any model, any loss, batches of any form."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal

import jax
import numpy as np
from flax import nnx
from jax.tree_util import keystr

from tda import loss as losses
from tda.gradients import argument_checks, sites
from tda.gradients.encoder import Encoder, make_encoder
from tda.gradients.moments.scales import Scale
from tda.gradients.moments.second_moments import SecondMoments
from tda.gradients.projection import Projection
from tda.gradients.unseen import count_examples


def per_example(
    model: nnx.Module,
    loss: str | Callable,
    batches: Iterable,
    projection: Projection,
    scales: dict[str, Scale] | SecondMoments | None = None,
    include: str | None = None,
    exclude: str | None = None,
    untapped: Literal["leave", "reference", "error"] = "leave",
    tell: bool = True,
) -> Iterator[np.ndarray]:
    """Encodes every example: the projected gradient P·(∇L/√V) (Chang et al. 2024, eq. 3).

    Args:
        model: any NNX model; in evaluation mode, where it has one.
        loss: L, a function of the model and a batch: one number for each example, [B], that depends
            on that example alone. It calls the model in its own way. Or the name of one, "loss",
            "margin" or "logit", for a model from tokens [B, T] to logits [B, T, V] and batches
            {"tokens", "targets", "weights"}, each [B, T].
        batches: trees of arrays (dicts with any keys, tuples), all with the batch as their first
            axis, typed PRNG keys too. Compiled once for every shape.
        projection: P.
        scales: 1/√V by path of the parameter, or `tda.second_moments`, in its "factored" form; None
            for no correction.
        include, exclude, untapped, tell: see `tda.gradients.encoder.make_encoder`.

    Yields:
        float32 [B, E] for each batch, in order.

    Raises:
        ValueError: an argument is of another type, and the message names it; or `make_encoder`
            raises it; with a batch, also if it is not of arrays of numbers of one length, or the
            loss is not [B].
        KeyError: `scales` lacks a parameter.
    """
    if isinstance(loss, str):
        loss = losses.of_examples(loss)
    if not callable(loss):
        raise ValueError(
            f"loss={loss!r}; give a function of the model and a batch, or one of "
            f"{', '.join(losses.OUTPUTS)}"
        )
    argument_checks.check_model(model)
    argument_checks.check_projection(projection)
    argument_checks.check_batches("batches", batches)
    if isinstance(scales, SecondMoments):
        scales = scales.scales(sites.find_sites(model, include, exclude, untapped))

    def checked(model, batch):
        try:
            return loss(model, batch)
        except Exception as error:
            name_missing_part(error, batch)
            raise

    encoder = make_encoder(
        model, projection, scales, checked, include, exclude, untapped, tell=tell
    )
    return encode_each(encoder, _each_checked(batches))


def _each_checked(batches: Iterable) -> Iterator:
    for number, batch in enumerate(batches):
        argument_checks.check_batch(f"batch {number}", batch, allow_keys=True)
        yield batch


def name_missing_part(error: Exception, batch: Any, label: str = "a batch") -> None:
    """Raises an error that names the part that a batch lacks, if a loss failed for that reason.

    Args:
        error: the loss's error.
        batch: the batch.
        label: the batch's name.

    Raises:
        ValueError: `error` is of a key that the batch, a mapping, does not have.
    """
    part = error.args[0] if isinstance(error, KeyError) and error.args else None
    if isinstance(batch, Mapping) and isinstance(part, str) and part not in batch:
        raise ValueError(
            f"the loss reads {part!r}, which {label} does not have: {describe_batch(batch)}; give "
            "every batch of passages and of queries what the loss reads"
        ) from error


def describe_batch(batch: Any) -> str:
    """Returns the arrays of a batch by place, with dtypes and shapes, as text."""
    leaves = jax.tree_util.tree_leaves_with_path(batch)
    parts = [f"{keystr(path)} {x.dtype}{list(x.shape)}".lstrip() for path, x in leaves]
    return "it has " + (", ".join(parts) or "no array")


def left_out(
    model: nnx.Module,
    include: str | None = None,
    exclude: str | None = None,
    untapped: Literal["leave", "reference", "error"] = "leave",
) -> dict[str, int]:
    """Returns the size of each parameter that the gradients leave out, by path name.

    Args:
        model: any NNX model.
        include, exclude, untapped: see `tda.gradients.sites.find_sites`.
    """
    return sites.left_out(model, sites.find_sites(model, include, exclude, untapped))


def encode_each(encoder: Encoder, batches: Iterable) -> Iterator[np.ndarray]:
    """Yields the gradients of each batch, float32 [B, E]."""
    before = None
    for batch in batches:
        count_examples(batch)
        # jax computes this batch while the caller uses the one before.
        now = encoder(batch)
        if before is not None:
            yield np.asarray(before)
        before = now
    if before is not None:
        yield np.asarray(before)
