"""A run's board of methods against retraining (`board.json`, `board.npz`), cut into pieces."""

import json
import math
import pathlib

import numpy as np

from tda.results import ResultsError
from tda.runtime.atomic_file import read_arrays
from tda.runtime.fingerprint import fingerprint
from tda.viewer.results_file import finite, signature
from tda.viewer.summary import query_key


class Board:
    """A board. Numbers that are not finite become None.

    Args:
        path: `board.json`. Without `board.npz` beside it there are no figures of single queries.

    Attributes:
        digest: a hash of `board.json`'s contents.

    Raises:
        OSError, ResultsError: a file cannot be read, or is not a board's.
    """

    def __init__(self, path: pathlib.Path):
        # `board.json` is written last, so both files are new if it is.
        self._path, self._seen = path, signature(path)
        try:
            text = path.read_text(encoding="utf-8")
            self.digest = fingerprint(text)
            self._record = json.loads(text, parse_float=finite, parse_constant=finite)
            self.titles = {n: m["title"] for n, m in self._record["methods"].items()}
            self._labels = {
                fraction: [label for label in lds if ", less " not in label]
                for fraction, lds in next(iter(self._record["methods"].values()))["lds"].items()
            }
        except (ValueError, KeyError, TypeError, AttributeError, StopIteration) as error:
            raise ResultsError(
                f"{path} is not a board of methods ({type(error).__name__}: {error}); compute it "
                "again"
            ) from error
        arrays = path.with_suffix(".npz")
        self._arrays = read_arrays(arrays) if arrays.exists() else {}
        self.queries = self._record.get("texts", []) if self._arrays else []

    def stale(self) -> bool:
        """Returns whether `board.json` has changed since it was read."""
        return signature(self._path) != self._seen

    def figures(self) -> dict:
        """Returns the record of `board.json`, with each query's key and LDS by method."""
        texts = [t | {"query": query_key(t["id"], t["prompt"], t["target"])} for t in self.queries]
        lds = {
            f"{fraction}/{label}/{name}": _plain(self._arrays[f"{fraction}/{label}/{name}"])
            for fraction, labels in (self._labels if texts else {}).items()
            for label in labels
            for name in self.titles
        }
        return self._record | {"texts": texts, "labels": self._labels, "lds": lds}

    def changes(self, query: int) -> dict:
        """Returns a query's changes of loss in each retraining.

        FRACTION/LABEL has those that happened; FRACTION/METHOD those that the method predicted.

        Raises:
            KeyError: there is no such query.
        """
        if query >= len(self.queries):
            raise KeyError(query)
        names = [f"{f}/{name}" for f in self._labels for name in (*self._labels[f], *self.titles)]
        return {name: _plain(self._arrays[name][:, query]) for name in names}


def _plain(array: np.ndarray) -> list[float | None]:
    return [x if math.isfinite(x) else None for x in array.tolist()]
