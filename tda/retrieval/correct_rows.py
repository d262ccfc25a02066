"""The correct passages of queries, laid out for a scan over rows."""

import numpy as np


class CorrectRows:
    """The correct (query, row) pairs of a set of labels, sorted by row: `queries` and `rows`, [N].

    Args:
        lists: the correct rows of each query.
        device_rows: rows that a device takes in a step.
    """

    def __init__(self, lists: list[np.ndarray], device_rows: int):
        # A row that is named twice is one correct row.
        lists = [np.unique(np.asarray(rows, np.int64)) for rows in lists]
        rows = np.concatenate([*lists, np.zeros(0, np.int64)])
        queries = np.repeat(np.arange(len(lists)), [len(rows) for rows in lists])
        order = np.argsort(rows, kind="stable")
        self.rows, self.queries = rows[order], queries[order].astype(np.int32)
        self._device_rows = device_rows
        ends = np.searchsorted(self.rows, self.rows + device_rows)
        # The most pairs that `device_rows` consecutive rows can have.
        self._most = int((ends - np.arange(len(ends))).max(initial=1))

    def among(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the pairs whose row is among `rows`, as places in `rows` and queries.

        Args:
            rows: ascending rows, with every correct row between the first and the last.
        """
        pairs = slice(*np.searchsorted(self.rows, [rows[0], rows[-1] + 1]))
        return np.searchsorted(rows, self.rows[pairs]), self.queries[pairs]

    def within(self, first: int, devices: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the pairs of each device's rows: queries and local rows, int32 [devices, N].

        N is the same for all `first`, so that one compiled program suffices; unused places hold a
        number out of bounds, which scatters drop.
        """
        bounds = np.searchsorted(self.rows, first + self._device_rows * np.arange(devices + 1))
        queries = np.full((devices, self._most), np.iinfo(np.int32).max, np.int32)
        rows = queries.copy()
        for d, (a, b) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
            queries[d, : b - a] = self.queries[a:b]
            rows[d, : b - a] = self.rows[a:b] - (first + d * self._device_rows)
        return queries, rows
