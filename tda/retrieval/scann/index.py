"""An approximate index on disk that is finished: opening it, searching it, and its manifest."""

import json
import os
import pathlib
from collections.abc import Callable, Iterator

import numpy as np

from tda.retrieval.ranked import Ranked, top
from tda.retrieval.scann import part as scann_part
from tda.retrieval.scann.part import Part, ScannError
from tda.retrieval.scann.settings import Settings
from tda.runtime import atomic_file

FORMAT = 1
# What is scored again from the rows themselves, for each row that is asked for.
CANDIDATES = 40
# From rows of the corpus, rising, to their encodings, float32 [R, E].
Read = Callable[[np.ndarray], np.ndarray]


class Index:
    """An index that is finished.

    Attributes:
        path: its directory.
        manifest: what is in manifest.json.
        rows, width: C and E.
        valid_rows: how many rows are in it.
        settings: what it was built with.
        recall: against exact search, as `recall` gives it; None where nothing was checked.
    """

    def __init__(self, path: pathlib.Path, manifest: dict, memory_bytes: int):
        self.path, self.manifest = path, manifest
        self.rows, self.width = manifest["rows"], manifest["width"]
        self.settings, self.recall = Settings(**manifest["settings"]), manifest["recall"]
        slices = parts_of(self.rows, self.settings.part_rows)
        self._parts = [directory(path, i) for i in range(len(slices))]
        absent = [p.name for p in self._parts if not p.exists()]
        if absent:
            raise ScannError(
                f"{path} is not finished: parts {', '.join(absent[:5])} are missing "
                f"({len(absent)} of {len(slices)}); build it again, and it goes on"
            )
        scann_part.refuse_pickles(path)
        checked = map(scann_part.check, self._parts, slices)
        sizes, counts = zip(*checked, strict=True)
        self.valid_rows = sum(counts)
        # The first parts that fit stay in memory; the others are read for every search.
        self._resident = int((np.cumsum(sizes) <= memory_bytes).sum())
        self._loaded: dict[int, Part] = {}

    @classmethod
    def open(cls, path, fingerprint: dict | None = None, memory_bytes: int = 8 << 30) -> "Index":
        """Opens an index.

        Args:
            path: its directory.
            fingerprint: what its encodings must be; only the keys given are compared.
            memory_bytes: of parts that stay in memory once they were searched; one more is in
                memory while it is searched.

        Raises:
            ScannError: there is none, it is unfinished or damaged, or of other encodings; the
                message names the file, or what differs.
        """
        root = pathlib.Path(path)
        manifest = read_manifest(root)
        if fingerprint is not None:
            wanted = json.loads(json.dumps(fingerprint))
            there = manifest["fingerprint"]
            compare(root, {k: there.get(k) for k in wanted}, wanted, "fingerprint")
        return cls(root, manifest, memory_bytes)

    def search(
        self,
        encodings_QxE: np.ndarray,
        k: int = 10,
        without: np.ndarray | None = None,
        *,
        leaves_to_search: int = 0,
        reorder: int = 0,
        opponents: bool = True,
        read: Read | None = None,
        candidates: int = 0,
    ) -> Ranked:
        """The rows with the largest and the smallest inner products, as the index finds them.

        Scores are inner products with the rows as `read` gives them, or as they are kept for
        reordering, or else with their codes. Among equal ones the lower row comes first.

        Args:
            encodings_QxE: the queries' encodings.
            k: how many proponents and opponents; all rows, where they are fewer.
            without: rows that were withdrawn since; never returned.
            leaves_to_search, reorder: other than the settings' ones; 0 keeps these.
            opponents: whether they are searched for, which takes as long as proponents do.
            read: gives the encodings of rows; the scores are of these then, and the order theirs.
            candidates: rows that are scored so for each query; 40 k by default.

        Returns:
            The ranking, without first ranks: an index knows no row's rank but those it returns.

        Raises:
            ScannError: the queries do not fit, or a part cannot be read.
        """
        queries_QxE = self._checked(encodings_QxE, k)
        gone = np.unique(np.asarray([] if without is None else without, np.int64))
        count = len(queries_QxE)
        both = np.concatenate([queries_QxE, -queries_QxE]) if opponents else queries_QxE
        rows, scores = np.zeros((len(both), 0), np.int64), np.zeros((len(both), 0), np.float32)
        fetched = k if read is None else max(k, candidates or CANDIDATES * k)
        for number in range(len(self._parts) if count else 0):
            found = self._load(number).search(both, fetched, gone, leaves_to_search, reorder)
            rows, scores = _merged(rows, scores, *found, fetched)
        if read is not None:
            rows, scores = _scored_again(both, rows, read, k)
        if not opponents:
            none = np.zeros((count, 0))
            return Ranked(rows, scores, none.astype(np.int64), none.astype(np.float32), {})
        return Ranked(rows[:count], scores[:count], rows[count:], -scores[count:], {})

    def _checked(self, encodings_QxE, k: int) -> np.ndarray:
        x = np.ascontiguousarray(encodings_QxE, np.float32)
        if x.ndim != 2 or x.shape[1] != self.width:
            raise ScannError(
                f"queries {list(x.shape)} do not fit {self.path}, whose rows have {self.width} "
                "numbers: encode them as its rows were"
            )
        bad = np.flatnonzero(~np.isfinite(x).all(axis=1))
        if len(bad):
            raise ScannError(f"the encoding of query {bad[0]} has a number that is not finite")
        if k < 1:
            raise ScannError(f"k is {k}; at least one row is to be found")
        return x

    def _load(self, number: int) -> Part:
        part = self._loaded.get(number)
        if part is None:
            part = scann_part.load(self._parts[number], self.settings)
            if number < self._resident:
                self._loaded[number] = part
        return part


def _merged(rows_Qxk, scores_Qxk, more_rows, more_scores, k: int):
    """The k best of two rankings; among equal scores the lower row."""
    rows = np.concatenate([rows_Qxk, more_rows], axis=1)
    scores = np.concatenate([scores_Qxk, more_scores], axis=1)
    order = np.lexsort((rows, -scores), axis=1)[:, :k]
    return np.take_along_axis(rows, order, 1), np.take_along_axis(scores, order, 1)


def _scored_again(queries_QxE, rows_QxN, read: Read, k: int):
    """The k best of every query's candidates by their encodings."""
    kept = min(k, rows_QxN.shape[1])
    rows = np.zeros((len(rows_QxN), kept), np.int64)
    scores = np.zeros((len(rows_QxN), kept), np.float32)
    for q, some in enumerate(np.sort(rows_QxN, axis=1)):
        with np.errstate(invalid="ignore"):
            scores_N = read(some) @ queries_QxE[q]
        bad = np.flatnonzero(~np.isfinite(scores_N))
        if len(bad):
            raise ScannError(
                f"row {some[bad[0]]} is invalid now: give `without` what was withdrawn"
            )
        best = top(scores_N, kept)
        rows[q], scores[q] = some[best], scores_N[best]
    return rows, scores


def parts_of(rows: int, part_rows: int) -> list[slice]:
    """The rows of each part: as equal as may be, so that no part is too small to learn from."""
    parts = -(-rows // part_rows)
    ends = [rows * i // parts for i in range(parts + 1)]
    return [slice(a, b) for a, b in zip(ends[:-1], ends[1:], strict=True)]


def directory(root: pathlib.Path, number: int) -> pathlib.Path:
    """Where a part is."""
    return root / f"{number:05d}"


def read_manifest(root: pathlib.Path) -> dict:
    """The manifest of an index.

    Raises:
        ScannError: there is none, it is damaged, or of another format.
    """
    try:
        manifest = json.loads((root / "manifest.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise ScannError(f"no index at {root}: {error}") from error
    except ValueError as error:
        raise ScannError(f"{root / 'manifest.json'} is damaged ({error}); build again") from error
    there = manifest.get("format") if isinstance(manifest, dict) else None
    if there != FORMAT:
        raise ScannError(f"{root} has format {there}, this version reads {FORMAT}; build it again")
    return manifest


def write_manifest(root: pathlib.Path, manifest: dict) -> None:
    """Writes the manifest, which appears whole or not at all."""
    with atomic_file.open_atomic(root / "manifest.json") as out:
        json.dump(manifest, out, indent=1)
        out.write("\n")
        out.flush()
        os.fsync(out.fileno())


def compare(root: pathlib.Path, there: dict, wanted: dict, name: str = "") -> None:
    """Nothing, where two descriptions are the same.

    Raises:
        ScannError: they are not; says in what.
    """
    differing = list(_differences(name, there, wanted))
    if differing:
        raise ScannError(
            f"{root} was not built with what it is used with:\n  "
            + "\n  ".join(differing)
            + "\nremove it, or use what it was built with"
        )


def _differences(name: str, there, wanted) -> Iterator[str]:
    if isinstance(there, dict) and isinstance(wanted, dict):
        for key in sorted(there.keys() | wanted.keys()):
            inner = f"{name}.{key}" if name else key
            yield from _differences(inner, there.get(key), wanted.get(key))
    elif there != wanted:
        yield f"{name}: {there} in the index, {wanted} wanted"
