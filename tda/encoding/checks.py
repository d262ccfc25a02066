"""Checks of the arguments of `tda.trace`, before anything is encoded."""

import math
import numbers
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tda import loss as losses
from tda.data.rows import is_whole
from tda.data.tokens import TokenTable
from tda.encoding.settings import TextSettings, TraceSettings
from tda.gradients import examples
from tda.gradients.argument_checks import check_batch, check_model, check_projection
from tda.gradients.encoder import check_blocks
from tda.gradients.factors import check_sites
from tda.gradients.moments.scales import parse_correction
from tda.gradients.pair_metrics import NOT_FACTORED
from tda.gradients.unseen import count_examples
from tda.methods import Method
from tda.model import functional
from tda.retrieval.hessian_settings import HessianSettings
from tda.runtime import sharding
from tda.runtime.directories import check_directory
from tda.runtime.patterns import compile_pattern

# With fewer queries than this, the mixture removes each query's own direction.
_FEWEST_QUERIES = 16


def check_settings(settings: TraceSettings) -> None:
    """Checks the arguments that need no data and decide the gradients.

    Raises:
        ValueError: an argument is out of range, or of another type; the message names it.
    """
    check_model(settings.model)
    check_count("tokens_per_batch", settings.tokens_per_batch)
    check_count("sample", settings.moments.sample)
    seed = settings.moments.seed
    if not is_whole(seed) or seed < 0:
        raise ValueError(f"seed={seed!r}; give a whole number, 0 or more")
    sharding.check_mesh(settings.mesh)
    check_projection(settings.projection)
    check_blocks(settings.model, settings.projection)
    for name in ("include", "exclude"):
        compile_pattern(name, settings.scope[name] or "")
    if settings.structure != "auto":
        HessianSettings(structure=settings.structure).shapes_of(settings.layout().shapes, 0)


def check_question(k: Any, damping: Any, joiner: Any) -> None:
    """Checks the arguments of a question that need no data.

    Raises:
        ValueError: an argument is out of range, or of another type; the message names it.
    """
    check_count("k", k)
    is_number = isinstance(damping, numbers.Real) and math.isfinite(damping)
    if not is_number or (damping < 0 and damping != -1):  # -1, the default, shrinks R
        raise ValueError(f"damping={damping!r}; give 0 or more, such as 1e-3, or leave it out")
    if not (joiner is None or isinstance(joiner, str)):
        raise ValueError(f"joiner={joiner!r}; give a string, such as ' ' or ''")


def check_curvature(settings: TraceSettings, has_tokenizer: bool) -> None:
    """Checks that the gradients' curvature can be computed.

    Raises:
        ValueError: it cannot; the message says why, and what to do.
    """
    if settings.curvature == "none":
        return
    if not has_tokenizer or callable(settings.loss):
        raise ValueError(
            "EK-FAC draws labels from the model's own logits: it is for texts and loss='loss', "
            "'margin' or 'logit'; give them and a tokenizer, or use another method"
        )
    if settings.scope["untapped"] == "reference":
        raise ValueError(
            "untapped='reference' has no effect with EK-FAC, which takes layers that multiply by a "
            "matrix alone; leave it out"
        )


def check_contrast(contrast: Any, rerank: Any, methods: Sequence[Method]) -> None:
    """Checks that a question about the difference of two mean gradients is possible.

    Raises:
        ValueError: it is not; the message says why, and what to do.
    """
    if contrast is None:
        return
    if rerank:
        raise ValueError(
            f"rerank={rerank} scores each query by its own whole gradient, and contrast takes a "
            "mean of several; leave one of them out"
        )
    if any(m.hessian == "mixed" for m in methods):
        raise ValueError(
            "R of the queries is for single queries, and contrast takes the mean of several; use a "
            "method such as 'trackstar_train'"
        )


def check_rerank(
    rerank: Any, k: int, methods: Sequence[Method], settings: TraceSettings, has_tokenizer: bool
) -> None:
    """Checks that the first passages of methods can be scored again by whole gradients.

    Raises:
        ValueError: they cannot; the message says why, and what to do.
    """
    if is_whole(rerank) and rerank == 0:
        return
    check_count("rerank", rerank)
    if rerank < k:
        raise ValueError(f"rerank={rerank} is below k={k}: rankings would be too short; raise it")
    if not has_tokenizer:
        raise ValueError(f"rerank={rerank} has no effect on batches: it is for texts; leave it out")
    is_exact = parse_correction(settings.moments.correction)[0] == "adam"
    if is_exact and any(m.corrected and m.hessian != "none" for m in methods):
        raise ValueError(f"rerank={rerank}: {NOT_FACTORED}")
    check_sites(settings.sites())


def check_candidates(candidates: Any, rerank: int) -> None:
    """Checks which further passages a second stage takes.

    Raises:
        ValueError: they are of an unknown kind, or there is no second stage.
    """
    if candidates not in (None, "bm25"):
        raise ValueError(f"candidates={candidates!r}; give 'bm25', or leave it out")
    if candidates and not rerank:
        raise ValueError(
            f"candidates={candidates!r} has no effect without rerank; give a number, such as "
            "rerank=100"
        )


def check_names(**arguments: Any) -> None:
    """Checks arguments that are names or paths, or None; the argument `directory` can be a folder.

    Raises:
        ValueError: one is of another type or empty, or `directory` is a file.
    """
    for name, value in arguments.items():
        if not isinstance(value, str | os.PathLike | None):
            raise ValueError(f"{name}={value!r}; give a string, or leave it out")
        if value == "":
            raise ValueError(f"{name}='' is empty; give a name, or leave it out")
    if (directory := arguments.get("directory")) is not None:
        check_directory(directory, f"directory={os.fspath(directory)!r}")


def check_count(name: str, value: Any) -> None:
    """Checks that an argument is a whole number, 1 or more.

    Raises:
        ValueError: it is not.
    """
    if not is_whole(value) or value < 1:
        raise ValueError(f"{name}={value!r}; give a whole number, 1 or more")


def check_queries(method: Method, count: int) -> None:
    """Checks that there are enough queries for the method.

    Raises:
        ValueError: there are none, or too few for the R of the queries that the method mixes in.
    """
    if not count:
        raise ValueError("there are no queries; give one or more")
    if method.hessian == "mixed" and count < _FEWEST_QUERIES:
        raise ValueError(
            f"R of {count} queries contains little but their own gradients, and mixing it in would "
            "remove what they ask for; use method='trackstar_train' with fewer than "
            f"{_FEWEST_QUERIES} queries"
        )


def check_reading(settings: TraceSettings, reading: TextSettings) -> None:
    """Checks that tokenizer, context, model and loss fit each other, by shapes alone.

    Raises:
        ValueError: they do not.
    """
    check_count("context", reading.context)
    check_context(reading.context, getattr(settings.model, "max_positions", 0))
    shape = (2, min(reading.context, 8))
    batch = {k: np.zeros(shape, np.int32) for k in ("tokens", "targets")}
    batch["weights"] = np.ones(shape, np.float32)
    vocab_size = getattr(settings.model, "vocab_size", None)
    if not callable(settings.loss):
        width = _count_logits(settings.model, batch["tokens"])
        # A padded table of embeddings has more rows than the model uses.
        vocab_size = width if vocab_size is None else vocab_size
    if vocab_size is not None and reading.tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"the tokenizer has {reading.tokenizer.vocab_size} tokens, the model {vocab_size}: "
            "give the model's own tokenizer"
        )
    check_loss(settings, batch)


def check_context(context: int, positions: int) -> None:
    """Checks that a context fits a model's table of positions; 0: it has none.

    Raises:
        ValueError: it does not.
    """
    if positions and context > positions:
        raise ValueError(
            f"context={context} is beyond the model's table of {positions} positions; "
            f"give context={positions}"
        )


def check_loss(settings: TraceSettings, batch: Any, label: str = "a batch") -> None:
    """Checks that the loss of a batch is one number for each example, without computing it.

    Args:
        settings: the arguments of `tda.trace`.
        batch: the batch.
        label: the batch's name in messages.

    Raises:
        ValueError: it is not, or the batch lacks a key that the loss reads.
    """
    count = count_examples(batch)
    model_fn, params = functional.split(settings.model)
    try:
        shaped = jax.eval_shape(
            lambda params, batch: settings.example_losses(model_fn.merge(params), batch),
            params,
            batch,
        )
    except Exception as error:
        examples.name_missing_part(error, batch, label)
        error.add_note(f"This was the loss of {label}: {examples.describe_batch(batch)}.")
        raise
    losses.check_shape(shaped, count)
    if not jnp.issubdtype(shaped.dtype, jnp.floating):
        raise ValueError(f"the loss has the dtype {shaped.dtype}; return floating-point numbers")


class BatchChecks:
    """Checks batches one by one, and the loss once for each form of their arrays.

    Args:
        settings: the arguments of `tda.trace`.
        label: "passages" or "queries".
    """

    def __init__(self, settings: TraceSettings, label: str):
        self._settings, self._label = settings, label
        self._forms: set = set()
        self._count = 0

    def __call__(self, batch: Any) -> None:
        """Checks the next batch.

        Raises:
            ValueError: it is not a tree of arrays, or its loss is not one number for each example;
                the message names the batch.
        """
        name = f"batch {self._count} of {self._label}"
        self._count += 1
        check_batch(name, batch)
        leaves, structure = jax.tree.flatten(batch)
        # Which axes are of equal length, not the lengths: batches differ in examples and positions.
        sizes = [n for x in leaves for n in x.shape]
        axes = tuple(sizes.index(n) for n in sizes)
        form = structure, axes, tuple((x.ndim, x.dtype) for x in leaves)
        if form not in self._forms:
            check_loss(self._settings, batch, name)
            self._forms.add(form)


def check_query_gradients(gradients_QxE: np.ndarray, names: list[str]) -> None:
    """Checks that the queries' gradients are finite.

    Raises:
        ValueError: one is not; the message names the query.
    """
    invalid = np.flatnonzero(~np.isfinite(gradients_QxE).all(axis=1))
    if len(invalid):
        raise ValueError(
            f"the gradient of query {names[invalid[0]]!r} is not finite; look at "
            "the model's output for it"
        )


def _count_logits(model: nnx.Module, tokens_BxT: np.ndarray) -> int:
    model_fn, params = functional.split(model)
    logits = jax.eval_shape(model_fn.apply, params, tokens_BxT)
    shape = getattr(logits, "shape", None)
    if shape is None or len(shape) != 3 or shape[:2] != tokens_BxT.shape:
        raise ValueError(
            f"the model maps tokens {tokens_BxT.shape} to "
            f"{'several arrays' if shape is None else shape}, not to logits [B, T, V]; give a "
            "function of the model and a batch as loss"
        )
    return shape[-1]


def check_token_ids(settings: TraceSettings, table: TokenTable, label: str) -> None:
    """Checks that the model has every token of the passages, or of the queries.

    A user's ids may be those of another tokenizer, and jax does not refuse a look-up beyond a table
    of embeddings.

    Raises:
        ValueError: the model lacks a token.
    """
    vocab_size = getattr(settings.model, "vocab_size", None)
    if vocab_size is None and not callable(settings.loss):
        vocab_size = _count_logits(settings.model, np.zeros((1, 2), np.int32))
    smallest, largest = table.token_range
    if smallest < 0 or (vocab_size is not None and largest >= vocab_size):
        raise ValueError(
            f"the {label} have token ids from {smallest} to {largest}, the model has 0 to "
            f"{'…' if vocab_size is None else vocab_size - 1}; give ids of the model's tokenizer"
        )
