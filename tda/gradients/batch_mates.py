"""Checks that an example's gradient is its own: the same whatever else its batch holds.

A loss with batch statistics, or one that is centred over the batch, is no sum of functions of one
example each, so no example has a gradient of its own. A model may also reorder its examples inside,
where a tap takes one for another. Either way the gradients look like any others. So the first batch
is encoded a few times more, by the same compiled program, with some of its examples replaced.
"""

import dataclasses
import functools
import types
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tda.gradients.unseen import count_examples
from tda.model import functional


@dataclasses.dataclass(frozen=True)
class _Tolerance:
    """The largest change of an example's numbers that may be rounding."""

    relative: float
    """Relative to the norm of the example's numbers."""
    floor: float
    """The least norm that counts, relative to the batch's largest."""


# Each row of a batch is computed by the same instructions whatever the other rows hold, so a row
# that stays in its place does not change. In another place it may be rounded otherwise: in bfloat16
# a loss near 0 by more than itself, so there only the batch's largest rows are compared.
_IN_PLACE, _MOVED = _Tolerance(1e-3, 0.01), _Tolerance(0.2, 1.0)


class MatesCheck:
    """A check of the first batch of different examples, and of the order in a few later ones."""

    def __init__(self, model: nnx.Module, losses: Callable):
        """Makes the check.

        Args:
            model: the model whose gradients are taken.
            losses: a function of the model and a batch to each example's loss, [B]. The gradients
                are not enough: those of a loss that is centred over the batch add up to 0.
        """
        self._model, self._plain_losses, self._batches = model, losses, 0
        model_fn, parameters = functional.split(model)
        compiled = jax.jit(lambda parameters, batch: losses(model_fn.merge(parameters), batch))
        self._losses: Callable | None = functools.partial(compiled, parameters)

    def __call__(self, encode: Callable, batch, encodings: tuple) -> None:
        """Checks a batch's encodings and losses.

        Args:
            encode: a function from a batch to a tuple of arrays [B, E].
            batch: a tree of arrays, the examples first.
            encodings: what `encode` returns for it.

        Raises:
            ValueError: an example's encoding or loss changes with the other examples of its batch.
        """
        count = count_examples(batch)
        self._batches += 1
        if count < 2 or not is_local(batch):
            return
        if self._losses is None:
            # A model may sort its examples by what is equal in the first batch, such as a length.
            # The 2nd, 4th, 8th, … batch tells, at little cost however many there are.
            if not self._batches & (self._batches - 1):
                self._check_order(encode, batch, encodings)
            return
        # Three more batches: copies of the first half replace the second half; copies of the
        # second replace the first; the second half moves to the front.
        half, at = count // 2, np.arange(count)
        first, second = at % half, half + at % (count - half)
        orders = first, np.where(at < half, second, at), second
        batches = [_take(batch, order) for order in orders]
        if _is_equal(batch, batches[0]):
            return  # examples that are all the same tell nothing
        for quantity, compute, rows in (
            ("loss", lambda batch: (self._losses(batch),), (self._losses(batch),)),
            ("gradient", encode, encodings),
        ):
            rows, *reordered = (_flat(x) for x in (rows, *map(compute, batches)))
            change = max(
                _change(rows[:half], reordered[0][:half], _IN_PLACE),
                _change(rows[half:], reordered[1][half:], _IN_PLACE),
                _change(rows[half:], reordered[2][: count - half], _MOVED),
            )
            if not change and quantity == "loss":
                change = self._change_among_copies(batch, rows[:, 0])
            if change:
                culprit = _name_culprit(self._model, self._plain_losses, batch, batches[:2], half)
                _refuse(quantity, change, culprit)
        self._losses = self._model = None  # done: release the model's arrays

    def _check_order(self, encode: Callable, batch, encodings: tuple) -> None:
        """Checks that the encodings of a batch from back to front are the same, back to front."""
        backwards = encode(_take(batch, np.arange(count_examples(batch))[::-1]))
        if change := _change(_flat(encodings), _flat(backwards)[::-1], _MOVED):
            _refuse("gradient", change)

    def _change_among_copies(self, batch, losses_B: np.ndarray) -> float:
        """Returns how much the least and the largest loss change in batches of their own copies.

        A loss that counts only if it is among the batch's largest is the same in many batches.
        """
        changes = []
        for i in {int(np.argmin(losses_B)), int(np.argmax(losses_B))}:
            copies = _flat((self._losses(_take(batch, np.full(len(losses_B), i))),))
            # The change of a loss near 0 is measured against the batch's largest loss.
            size = max(abs(losses_B[i]), _IN_PLACE.floor * np.abs(losses_B).max())
            changes.append(abs(copies[i, 0] - losses_B[i]) / size if size > 0 else 0.0)
        largest = max(x if np.isfinite(x) else 0.0 for x in changes)
        return largest if largest > _IN_PLACE.relative else 0


def _refuse(quantity: str, change: float, culprit: str = "") -> None:
    share = f"{change:.0%}" if change >= 0.01 else f"{change:.1%}"
    raise ValueError(
        f"the {quantity} of an example changes by {share} with the batch that it is in{culprit}; "
        "it must depend on that example alone: use no statistics of the batch, no other order of "
        "its examples, and no dropout (model.eval())"
    )


def change_by_order(encode: Callable, batch) -> float:
    """Returns how much rows change if the examples change places, relative to the largest row.

    Each row must move with its example, whatever else the rows depend on. Of all fixed orders of
    three or more examples, only the batch's own is the same after both moves; of two, all are.

    Args:
        encode: a function from a batch to rows [B, E].
        batch: a tree of arrays, the examples first.

    Returns:
        The share; 0 within what rounding explains.
    """
    at, rows = np.arange(count_examples(batch)), _flat((encode(batch),))
    turned, swapped = np.roll(at, 1), at.copy()
    # The two neighbours that differ most, so that a row which stays behind stands out.
    i = int(np.argmax(np.linalg.norm(rows - rows[turned], axis=1)))
    swapped[[i, i - 1]] = swapped[[i - 1, i]]
    moves = turned, swapped
    return max(_change(rows[m], _flat((encode(_take(batch, m)),)), _MOVED) for m in moves)


def is_local(batch) -> bool:
    """Returns whether this process can address all of a batch."""
    arrays = [x for x in jax.tree.leaves(batch) if isinstance(x, jax.Array)]
    return all(x.is_fully_addressable for x in arrays)


def _take(batch, rows: np.ndarray):
    """Returns some examples of a batch, laid out on the devices as the batch is."""

    def take(x):
        drawn = examples_of(x, rows)
        return jax.device_put(drawn, x.sharding) if isinstance(x, jax.Array) else drawn

    return jax.tree.map(take, batch)


def examples_of(x, rows: np.ndarray):
    """Returns some rows of an array, not laid out as it is; typed PRNG keys stay keys."""
    drawn = _numbers(x)[rows]
    return jax.random.wrap_key_data(drawn, impl=jax.random.key_impl(x)) if _is_keys(x) else drawn


def _is_keys(x) -> bool:
    return isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _numbers(x) -> np.ndarray:
    return np.asarray(jax.random.key_data(x) if _is_keys(x) else x)


def _is_equal(batch, other) -> bool:
    pairs = zip(jax.tree.leaves(batch), jax.tree.leaves(other), strict=True)
    return all(np.array_equal(_numbers(x), _numbers(y)) for x, y in pairs)


def _flat(arrays) -> np.ndarray:
    """Returns arrays [B, …] side by side: float64 [B, N]."""
    flat = [np.asarray(x, np.float64).reshape(len(x), -1) for x in arrays]
    return np.concatenate(flat, axis=1)


def _change(rows: np.ndarray, reordered: np.ndarray, tolerance: _Tolerance) -> float:
    """Returns the largest change of a row relative to its norm; 0 within the tolerance."""
    norms = np.linalg.norm(rows, axis=1)
    scales = np.maximum(norms, tolerance.floor * norms.max(initial=0))
    changes = np.linalg.norm(reordered - rows, axis=1) / np.where(scales > 0, scales, 1)
    largest = float(np.where(np.isfinite(changes), changes, 0).max(initial=0))
    return largest if largest > tolerance.relative else 0


def _name_culprit(model: nnx.Module, losses: Callable, batch, reordered, half: int) -> str:
    """Names the innermost module whose output changes though its input does not; "" if none does.

    The loss is computed once more for each batch, without compilation, so that each module's inputs
    and outputs can be compared, except inside a scan or vmap.
    """
    traces = [_calls(model, losses, x) for x in (batch, *reordered)]
    halves = slice(None, half), slice(half, None)
    for calls in zip(*traces, strict=False):
        path, *first = calls[0]
        for (_, *other), rows in zip(calls[1:], halves, strict=True):
            if any(len(x) != count_examples(batch) for x in (*first, *other)):
                continue
            pairs = zip(first, other, strict=True)
            inputs, outputs = (
                _change(_flat([x])[rows], _flat([y])[rows], _IN_PLACE) for x, y in pairs
            )
            if outputs and not inputs:
                return f", in {path}"
    return ""


def _calls(model: nnx.Module, losses: Callable, batch) -> list[tuple]:
    """Returns the path, the first input and the output of each module's call, inner ones first."""
    calls: list[tuple] = []
    watched = nnx.clone(model)
    for path, module in list(nnx.iter_modules(watched)):
        kind = type(module)
        if callable(module):
            name = f"{'/'.join(map(str, path)) or 'the model'} ({kind.__name__})"

            def call(self, *args, kind=kind, name=name, **kwargs):
                output = kind.__call__(self, *args, **kwargs)
                arrays = [*args[:1], output]
                if all(isinstance(x, np.ndarray | jax.Array) and x.ndim for x in arrays):
                    if not any(isinstance(x, jax.core.Tracer) for x in arrays):
                        calls.append((name, *arrays))
                return output

            subclass = types.new_class(
                kind.__name__, (kind,), {}, lambda ns, f=call: ns.update({"__call__": f})
            )
            object.__setattr__(module, "__class__", subclass)
    losses(watched, batch)
    return calls
