"""A finished approximate index on disk: opening it, searching it, and its manifest."""

import json
import os
import pathlib
from collections.abc import Callable

import numpy as np

from tda.retrieval.ranked import Ranked, top
from tda.retrieval.scann import part as scann_part
from tda.retrieval.scann.part import Part, ScannError
from tda.retrieval.scann.settings import Settings
from tda.runtime import atomic_file
from tda.runtime.differences import differences

FORMAT = 1
# Candidates to score again by their encodings, for each row that a search returns.
CANDIDATES = 40
# From rising row numbers of the corpus to their encodings, float32 [R, E].
Read = Callable[[np.ndarray], np.ndarray]


class Index:
    """A finished index.

    Attributes:
        path: its directory.
        manifest: the contents of manifest.json.
        rows: C.
        width: E.
        valid_rows: number of rows in the index.
        settings: the settings that it was built with.
        recall: recall against exact search (`build.recall`); None if it was not measured.
    """

    def __init__(self, path: pathlib.Path, manifest: dict, memory_bytes: int):
        self.path, self.manifest = path, manifest
        self.rows, self.width = manifest["rows"], manifest["width"]
        self.settings, self.recall = Settings(**manifest["settings"]), manifest["recall"]
        slices = split_rows(self.rows, self.settings.part_rows)
        self._parts = [part_path(path, i) for i in range(len(slices))]
        missing = [p.name for p in self._parts if not p.exists()]
        if missing:
            raise ScannError(
                f"{path} is not finished: parts {', '.join(missing[:5])} are missing "
                f"({len(missing)} of {len(slices)}); build it again, and the build resumes"
            )
        checked = map(scann_part.check_part, self._parts)
        sizes, counts = zip(*checked, strict=True)
        self.valid_rows = sum(counts)
        # The first parts that fit stay in memory; the others are loaded for every search.
        self._resident = int((np.cumsum(sizes) <= memory_bytes).sum())
        self._loaded: dict[int, Part] = {}

    @classmethod
    def open(cls, path, memory_bytes: int = 8 << 30) -> "Index":
        """Opens an index.

        Args:
            path: its directory.
            memory_bytes: memory for parts that stay loaded between searches; one more part is in
                memory while it is searched.

        Raises:
            ScannError: there is no index, or it is unfinished or damaged; the message names the
                file.
        """
        root = pathlib.Path(path)
        return cls(root, read_manifest(root), memory_bytes)

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
        """Returns the rows with the largest and the smallest inner products that the index finds.

        Scores are inner products with the rows as `read` returns them, else with the encodings kept
        for reordering, else with the codes. Among equal scores the lower row comes first.

        Args:
            encodings_QxE: the queries' encodings.
            k: number of proponents and opponents; all rows if they are fewer.
            without: rows that were withdrawn after the build; never returned.
            leaves_to_search: overrides the settings unless 0.
            reorder: overrides the settings unless 0.
            opponents: whether to search for them too, which takes as long as for proponents.
            read: a function from row numbers to encodings, by which candidates are scored and
                ordered again. An index that keeps codes alone needs it for a good recall.
            candidates: rows of each query to score so; 40 k by default.

        Returns:
            The ranking, without first ranks: an index knows the ranks of no other rows.

        Raises:
            ScannError: an encoding is not finite, or a part cannot be read.
        """
        queries_QxE = np.ascontiguousarray(encodings_QxE, np.float32)
        bad = np.flatnonzero(~np.isfinite(queries_QxE).all(axis=1))
        if len(bad):
            raise ScannError(f"the encoding of query {bad[0]} has a number that is not finite")
        without = np.unique(np.asarray([] if without is None else without, np.int64))
        count = len(queries_QxE)
        # The smallest inner products with q are the largest with −q.
        both = np.concatenate([queries_QxE, -queries_QxE]) if opponents else queries_QxE
        rows, scores = np.zeros((len(both), 0), np.int64), np.zeros((len(both), 0), np.float32)
        depth = k if read is None else max(k, candidates or CANDIDATES * k)
        for number in range(len(self._parts) if count else 0):
            part = self._load(number)
            part_rows, part_scores = part.search(both, depth, without, leaves_to_search, reorder)
            rows, scores = np.hstack([rows, part_rows]), np.hstack([scores, part_scores])
            order = np.lexsort((rows, -scores), axis=1)[:, :depth]
            rows = np.take_along_axis(rows, order, 1)
            scores = np.take_along_axis(scores, order, 1)
        if read is not None:
            rows, scores = _score_again(both, rows, read, k)
        if not opponents:
            empty = np.zeros((count, 0))
            return Ranked(rows, scores, empty.astype(np.int64), empty.astype(np.float32), {})
        return Ranked(rows[:count], scores[:count], rows[count:], -scores[count:], {})

    def _load(self, number: int) -> Part:
        part = self._loaded.get(number)
        if part is None:
            part = scann_part.load_part(self._parts[number], self.settings)
            if number < self._resident:
                self._loaded[number] = part
        return part


def _score_again(queries_QxE, rows_QxN, read: Read, k: int):
    """Returns the k best of every query's candidates by their encodings."""
    k = min(k, rows_QxN.shape[1])
    rows = np.zeros((len(rows_QxN), k), np.int64)
    scores = np.zeros((len(rows_QxN), k), np.float32)
    for q, candidates in enumerate(np.sort(rows_QxN, axis=1)):
        with np.errstate(invalid="ignore"):
            scores_N = read(candidates) @ queries_QxE[q]
        bad = np.flatnonzero(~np.isfinite(scores_N))
        if len(bad):
            raise ScannError(
                f"row {candidates[bad[0]]} is invalid now: give `without` what was withdrawn"
            )
        best = top(scores_N, k)
        rows[q], scores[q] = candidates[best], scores_N[best]
    return rows, scores


def split_rows(rows: int, part_rows: int) -> list[slice]:
    """Splits rows into parts of nearly equal size, so that none is too small to learn codes."""
    parts = -(-rows // part_rows)
    ends = [rows * i // parts for i in range(parts + 1)]
    return [slice(a, b) for a, b in zip(ends[:-1], ends[1:], strict=True)]


def part_path(root: pathlib.Path, number: int) -> pathlib.Path:
    """Returns the directory of a part."""
    return root / f"{number:05d}"


def read_manifest(root: pathlib.Path) -> dict:
    """Reads the manifest of an index.

    Raises:
        ScannError: there is none, or it is damaged or of another format.
    """
    try:
        manifest = json.loads((root / "manifest.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise ScannError(f"no index at {root}: {error}") from error
    except ValueError as error:
        raise ScannError(f"{root / 'manifest.json'} is damaged ({error}); build again") from error
    stored = manifest.get("format") if isinstance(manifest, dict) else None
    if stored != FORMAT:
        raise ScannError(f"{root} has format {stored}, this version reads {FORMAT}; build it again")
    return manifest


def write_manifest(root: pathlib.Path, manifest: dict) -> None:
    """Writes the manifest, which appears whole or not at all."""
    with atomic_file.open_atomic(root / "manifest.json") as out:
        json.dump(manifest, out, indent=1)
        out.write("\n")
        out.flush()
        os.fsync(out.fileno())


def check_same(root: pathlib.Path, stored: dict, expected: dict) -> None:
    """Checks that an index was built with the expected values, and raises ScannError otherwise."""
    lines = list(differences(stored, expected, "the index"))
    if lines:
        raise ScannError(
            f"{root} was built with other values:\n  "
            + "\n  ".join(lines)
            + "\nremove it, or use the values that it was built with"
        )
