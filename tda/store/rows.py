"""Rows of gradients as stored."""

import dataclasses
from collections.abc import Callable

import jax
import numpy as np

from tda.store import codec
from tda.store.codec import Form


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """R consecutive rows of a store, as stored."""

    first: int
    """Number of the first row."""
    values: np.ndarray
    """[R, columns], floats or codes (`tda.store.codec`)."""
    valid: np.ndarray
    """bool [R], false if a row holds no finite gradient or was withdrawn."""

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, part: slice) -> "Rows":
        return Rows(self.first + part.start, *self.map(lambda x: x[part]))

    def map(self, change: Callable, *more_rows: "Rows") -> tuple:
        """Applies `change` to the values, then to `valid`, each with those of `more_rows`."""
        arrays = ((rows.values, rows.valid) for rows in (self, *more_rows))
        return tuple(map(change, *arrays))

    def decoded(self, form: Form) -> np.ndarray:
        """Returns the gradients, float32 [R, E]; an invalid row is infinite throughout."""
        out = codec.decode_on_host(self.values, form)
        out[~self.valid] = np.inf
        return out


def valid(rows_RxE: np.ndarray) -> np.ndarray:
    """Returns which rows hold a gradient, bool [R]; an invalid one is infinite throughout."""
    # An invalid row is infinite throughout, so its first number is enough.
    return np.isfinite(rows_RxE[:, 0])
