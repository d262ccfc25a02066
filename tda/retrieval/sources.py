"""Sources of projected gradients: arrays, rows changed while they are read, and joined sources.

A sum of scores over checkpoints, Σ_c ⟨a_c, b_c⟩, is the inner product of rows put side by side. So
one search over joined sources serves several checkpoints, each with its own blocks and R^(−1/2).
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np

from tda import store
from tda.store import Form, Rows


class Source(Protocol):
    """Projected gradients of a corpus: a `GradientStore`, an array, or an encoder at work."""

    form: Form

    @property
    def rows(self) -> int:
        """C, the number of rows."""

    def scan(self, step: int, rows: range | None = None) -> Iterator[Rows]:
        """Yields a range of rows, by default all, in order, at most `step` at a time."""

    def read(self, numbers) -> np.ndarray:
        """Reads the rows with these numbers, float32 [R, E]; invalid rows are all infinite."""


class InMemory:
    """An array as a source.

    Args:
        gradients_CxE: float32; infinite rows are invalid.
        slices: the columns of each block.
    """

    def __init__(self, gradients_CxE: np.ndarray, slices: list[slice]):
        self._gradients = gradients_CxE
        self.form = Form("float32", tuple(s.stop - s.start for s in slices))
        self.rows = len(gradients_CxE)

    def scan(self, step: int, rows: range | None = None) -> Iterator[Rows]:
        """Yields a range of rows in order, at most `step` at a time."""
        rows = range(self.rows) if rows is None else rows
        for first in rows[::step]:
            x_RxE = self._gradients[first : min(first + step, rows.stop)]
            yield Rows(first, x_RxE, store.valid(x_RxE))

    def read(self, numbers) -> np.ndarray:
        """Reads the rows with these numbers, float32 [R, E]."""
        return self._gradients[numbers]


class Mapped:
    """A source that changes another's rows while they are read.

    Args:
        source: the original rows.
        change: a function of gradients, finite float32 [R, E], and their row numbers, int64 [R],
            that returns float32 [R, E]. It must treat every row independently, since scans and
            reads group rows differently.
    """

    def __init__(self, source: Source, change: Callable[[np.ndarray, np.ndarray], np.ndarray]):
        self._source, self._change, self.rows = source, change, source.rows
        self.form = Form("float32", source.form.widths)

    def scan(self, step: int, rows: range | None = None) -> Iterator[Rows]:
        """Yields a range of rows in order, at most `step` at a time."""
        for piece in self._source.scan(step, rows):
            numbers = piece.first + np.arange(len(piece))
            x_RxE = piece.decoded(self._source.form)
            yield Rows(piece.first, self._change_valid(x_RxE, numbers), piece.valid)

    def read(self, numbers) -> np.ndarray:
        """Reads the rows with these numbers, float32 [R, E]; invalid rows are all infinite."""
        return self._change_valid(self._source.read(numbers), np.asarray(numbers, np.int64))

    def _change_valid(self, x_RxE: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        valid = np.isfinite(x_RxE).all(axis=1)
        out = np.full(x_RxE.shape, np.inf, np.float32)
        out[valid] = self._change(x_RxE[valid], numbers[valid])
        return out


class Joined:
    """The rows of several sources side by side, [a_1 … a_n], decoded.

    A row is valid if it is valid in all of them.

    Raises:
        ValueError: there is no source, or the sources differ in their number of rows.
    """

    def __init__(self, sources: Sequence[Source]):
        counts = [s.rows for s in sources]
        if len(set(counts)) != 1:
            raise ValueError(f"joined sources must have equally many rows, not {counts}")
        self._sources, self.rows = list(sources), counts[0]
        widths = tuple(w for s in sources for w in s.form.widths)
        self.form = Form("float32", widths)

    def scan(self, step: int, rows: range | None = None) -> Iterator[Rows]:
        """Yields a range of rows in order, at most `step` at a time."""
        scans = (scan_full_steps(s, step, rows) for s in self._sources)
        for pieces in zip(*scans, strict=True):
            valid = np.logical_and.reduce([p.valid for p in pieces])
            pairs = zip(pieces, self._sources, strict=True)
            x_RxE = np.concatenate([p.decoded(s.form) for p, s in pairs], axis=1)
            yield Rows(pieces[0].first, x_RxE, valid)

    def read(self, numbers) -> np.ndarray:
        """Reads the rows with these numbers, float32 [R, E]; invalid rows are all infinite."""
        out = np.concatenate([s.read(numbers) for s in self._sources], axis=1)
        out[~np.isfinite(out).all(axis=1)] = np.inf
        return out


def scan_full_steps(source: Source, step: int, rows: range | None = None) -> Iterator[Rows]:
    """Yields a range of a source's rows in pieces of `step`, whatever pieces the source yields."""
    waiting: list[Rows] = []
    count = 0
    for piece in source.scan(step, rows):
        # Copied, since a store reuses its buffers for the next rows.
        waiting.append(Rows(piece.first, *piece.map(np.copy)))
        count += len(piece)
        while count >= step:
            joined = _concatenate(waiting)
            yield joined[0:step]
            waiting = [joined[step : len(joined)]] if count > step else []
            count -= step
    if count:
        yield _concatenate(waiting)


def _concatenate(pieces: list[Rows]) -> Rows:
    return Rows(pieces[0].first, *pieces[0].map(lambda *x: np.concatenate(x), *pieces[1:]))


def scale_by(weights_C: np.ndarray) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Returns a change for `Mapped` that multiplies every row by its own weight."""
    return lambda x_RxE, numbers: x_RxE * weights_C[numbers, None].astype(np.float32)


def normalise(x_RxE: np.ndarray, numbers: np.ndarray | None = None) -> np.ndarray:
    """Divides every row by its norm, a change for `Mapped`; a zero row stays zero."""
    norm_R = np.linalg.norm(x_RxE, axis=1)
    return x_RxE / np.where(norm_R > 0, norm_R, 1)[:, None].astype(np.float32)
