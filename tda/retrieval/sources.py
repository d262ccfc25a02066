"""Sources made of others: rows that something is done to first, and several checkpoints as one.

Scores that are sums over checkpoints, Σ_c ⟨a_c, b_c⟩, are inner products of rows put side by side:
so the search of one store is also that of many, blocks and R^(−1/2) included.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from tda.retrieval.scorer import Source
from tda.store import Form, Rows


class Mapped:
    """A source whose rows are changed as they are read.

    Args:
        source: the rows as they are.
        change: takes gradients, finite float32 [R, E], and their row numbers, int64 [R]; gives
            float32 [R, E]. It must treat every row by itself.
    """

    def __init__(self, source: Source, change: Callable[[np.ndarray, np.ndarray], np.ndarray]):
        self._source, self._change = source, change
        self.form = Form("float32", source.form.widths)

    @property
    def rows(self) -> int:
        """C, the number of rows."""
        return self._source.rows

    def scan(self, step: int) -> Iterator[Rows]:
        """All rows in order, at most `step` at a time."""
        for found in self._source.scan(step):
            numbers = found.first + np.arange(len(found))
            x_RxE = found.decoded(self._source.form.widths)
            yield Rows(found.first, self._changed(x_RxE, numbers), None, found.valid)

    def read(self, numbers) -> np.ndarray:
        """Some rows, float32 [R, E]; an invalid one is infinite throughout."""
        return self._changed(self._source.read(numbers), np.asarray(numbers, np.int64))

    def _changed(self, x_RxE: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        good = np.isfinite(x_RxE).all(axis=1)
        out = np.full(x_RxE.shape, np.inf, np.float32)
        out[good] = self._change(x_RxE[good], numbers[good])
        return out


class Joined:
    """The rows of several sources side by side: [a_1 … a_n].

    A row is valid where it is in all of them.

    Raises:
        ValueError: there is no source, or they have different numbers of rows.
    """

    def __init__(self, sources: Sequence[Source]):
        counts = [s.rows for s in sources]
        if len(set(counts)) != 1:
            raise ValueError(f"sources side by side need as many rows each, not {counts}")
        self._sources = list(sources)
        widths = tuple(w for s in sources for w in s.form.widths)
        dtypes = {s.form.dtype for s in sources}
        self.form = Form(dtypes.pop() if len(dtypes) == 1 else "float32", widths)

    @property
    def rows(self) -> int:
        """C, the number of rows."""
        return self._sources[0].rows

    def scan(self, step: int) -> Iterator[Rows]:
        """All rows in order, at most `step` at a time."""
        for found in zip(*(_Steps(s, step) for s in self._sources), strict=True):
            valid = np.logical_and.reduce([f.valid for f in found])
            if self.form.dtype == "int8":
                values = np.concatenate([f.values for f in found], axis=1)
                scales = np.concatenate([f.scales for f in found], axis=1)
                yield Rows(found[0].first, values, scales, valid)
                continue
            parts = [
                f.values if s.form.dtype == self.form.dtype else f.decoded(s.form.widths)
                for f, s in zip(found, self._sources, strict=True)
            ]
            yield Rows(found[0].first, np.concatenate(parts, axis=1), None, valid)

    def read(self, numbers) -> np.ndarray:
        """Some rows, float32 [R, E]; an invalid one is infinite throughout."""
        out = np.concatenate([s.read(numbers) for s in self._sources], axis=1)
        out[~np.isfinite(out).all(axis=1)] = np.inf
        return out


class _Steps:
    """A source's rows in pieces of just `step`, wherever its files end."""

    def __init__(self, source: Source, step: int):
        self._source, self._step = source, step

    def __iter__(self) -> Iterator[Rows]:
        waiting: list[Rows] = []
        count = 0
        for found in self._source.scan(self._step):
            # Copied: a store gives its buffers to the rows that come next.
            waiting.append(_copy(found))
            count += len(found)
            while count >= self._step:
                whole = _together(waiting)
                yield whole[0 : self._step]
                waiting = [whole[self._step : len(whole)]] if count > self._step else []
                count -= self._step
        if count:
            yield _together(waiting)


def _copy(found: Rows) -> Rows:
    scales = None if found.scales is None else found.scales.copy()
    return Rows(found.first, found.values.copy(), scales, found.valid.copy())


def _together(pieces: list[Rows]) -> Rows:
    if len(pieces) == 1:
        return pieces[0]
    scales = None
    if pieces[0].scales is not None:
        scales = np.concatenate([p.scales for p in pieces])
    return Rows(
        pieces[0].first,
        np.concatenate([p.values for p in pieces]),
        scales,
        np.concatenate([p.valid for p in pieces]),
    )


def scaled(weights_C: np.ndarray) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """A change for `Mapped`: every row times its own weight."""
    return lambda x_RxE, numbers: x_RxE * weights_C[numbers, None].astype(np.float32)


def normalised(x_RxE: np.ndarray, numbers: np.ndarray | None = None) -> np.ndarray:
    """A change for `Mapped`: every row at norm one; a zero row stays zero."""
    norm_R = np.linalg.norm(x_RxE, axis=1)
    return x_RxE / np.where(norm_R > 0, norm_R, 1)[:, None].astype(np.float32)
