"""How gradients become encodings: R^(−1/2) and the norm; and where gradients come from."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from tda import hessian, store
from tda.hessian import blocks
from tda.store import Form, Rows


class Source(Protocol):
    """Projected gradients of a corpus: a `GradientStore`, an array, or an encoder at work."""

    form: Form

    @property
    def rows(self) -> int:
        """C, the number of rows."""

    def scan(self, step: int) -> Iterator[Rows]:
        """All rows in order, at most `step` at a time."""

    def read(self, numbers) -> np.ndarray:
        """Some rows, float32 [R, E]; an invalid one is infinite throughout."""


class InMemory:
    """An array as a source.

    Args:
        gradients_CxE: float32; rows that are infinite are invalid.
        slices: where each block stands in a row.
    """

    def __init__(self, gradients_CxE: np.ndarray, slices: list[slice]):
        self._gradients = gradients_CxE
        self.form = Form("float32", tuple(s.stop - s.start for s in slices))
        self.rows = len(gradients_CxE)

    def scan(self, step: int) -> Iterator[Rows]:
        """All rows in order, at most `step` at a time."""
        for first in range(0, self.rows, step):
            some = self._gradients[first : first + step]
            yield Rows(first, some, None, store.valid(some))

    def read(self, numbers) -> np.ndarray:
        """Some rows, float32 [R, E]."""
        return self._gradients[numbers]


@dataclasses.dataclass(frozen=True)
class Scorer:
    """score(passage, query) = ⟨N(W g_passage), N(W g_query)⟩.

    Attributes:
        roots: W = R^(−1/2) by block, or None for the identity.
        unit_norm: N divides by the norm (a zero stays zero), else it does nothing.
        own: β of each block where every query is scored with R − β g gᵀ, g its own gradient, in
            R's place (`tda.hessian`: its part in R_eval taken out); empty where not. Needs `roots`.
    """

    roots: list[np.ndarray] | None
    unit_norm: bool
    own: tuple[float, ...] = ()

    def __post_init__(self):
        if self.own and len(self.own) != len(self.roots or ()):
            raise ValueError(
                f"a query's part is taken out of R: own has {len(self.own)} blocks, and roots "
                f"{len(self.roots or ())}"
            )

    @functools.cached_property
    def whitening(self):
        """W on the device, as programs take it (`blocks.stacked`); None for the identity."""
        return None if self.roots is None else blocks.stacked(self.roots)


def slices_of(widths: tuple[int, ...]) -> list[slice]:
    """Where each block stands in a row."""
    ends = np.cumsum([0, *widths]).tolist()
    return [slice(a, b) for a, b in zip(ends[:-1], ends[1:], strict=True)]


def inverse_norms(x_RxE):
    """1 / |x| of every row, float32 [R]; 0 of a zero row."""
    norm_R = jnp.linalg.norm(x_RxE, axis=-1)
    return jnp.where(norm_R > 0, 1 / jnp.where(norm_R > 0, norm_R, 1.0), 0.0)


def _encode(x_RxE, roots, unit_norm, widths):
    if roots is not None:
        x_RxE = hessian.whiten(x_RxE, roots, slices_of(widths))
    return x_RxE * inverse_norms(x_RxE)[:, None] if unit_norm else x_RxE


encode = jax.jit(_encode, static_argnames=("unit_norm", "widths"))


@jax.jit
def _cleaned(x_RxE, valid_R):
    return jnp.where(valid_R[:, None], x_RxE, 0.0)


def encodings(source: Source, scorer: Scorer, step: int) -> Iterator[tuple[int, np.ndarray]]:
    """The encodings of a whole source, as (first row, float32 [≤ step, E]).

    A row that is invalid in the source is infinite throughout.
    """
    widths = source.form.widths
    for found in source.scan(step):
        x = padded(found, step)
        gradients = store.decode(x.values, x.scales, widths)
        out = np.array(
            encode(_cleaned(gradients, x.valid), scorer.whitening, scorer.unit_norm, widths)
        )[: len(found)]
        out[~found.valid] = np.inf
        yield found.first, out


def padded(found: Rows, step: int) -> Rows:
    """Rows with invalid ones behind them up to `step`, so that one program fits all."""
    lacking = step - len(found)
    if not lacking:
        return found

    def longer(x):
        return None if x is None else np.pad(x, [(0, lacking), *[(0, 0)] * (x.ndim - 1)])

    return Rows(found.first, *map(longer, (found.values, found.scales, found.valid)))
