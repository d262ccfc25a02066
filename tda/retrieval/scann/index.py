"""An approximate index over encodings, by ScaNN: built and searched part by part.

    DIR/manifest.json   settings, shape, fingerprint of the encodings, recall against exact search
    DIR/00000/...       the first rows of the corpus; 00001/ the next, and so on

Every part covers consecutive rows, so memory does not grow with the corpus, and appears whole or
not at all: a killed build resumes with the missing parts and ends in the same bytes. The directory
may be moved. ScaNN is optional: pip install 'tda-jax[scann]'.
"""

import dataclasses
import functools
import importlib.metadata
import pathlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from tda import store
from tda.retrieval.ranked import Ranked, best_of
from tda.retrieval.scann.part import Part, ScannError, import_scann, write_part
from tda.retrieval.scann.settings import Settings
from tda.runtime import preemption, processes, progress
from tda.runtime.differences import check_same
from tda.runtime.engine import Engine, Work
from tda.runtime.fingerprint import fingerprint, fingerprint_arrays, plain
from tda.runtime.groups import ONE_GROUP, Groups
from tda.store.location import Location

# How many candidates an index of codes alone scores by their encodings, per returned row.
CANDIDATES = 40
_FORMAT = 1
# Bytes of encodings to read at a time.
_STEP_BYTES = 64 << 20
# Parts stay in memory up to this many bytes; the others are loaded for every search.
_RESIDENT_BYTES = 8 << 30


@dataclasses.dataclass(frozen=True)
class Encodings:
    """The encodings of a corpus, C rows of E numbers, that an index is built from."""

    read: Callable[[np.ndarray], np.ndarray]
    """From ascending row numbers, int64 [R], to float32 [R, E]; an invalid row is all infinite."""
    rows: int
    width: int
    fingerprint: dict
    """JSON values that identify the encodings."""


class Index:
    """A finished index, returned by `build`.

    Attributes:
        path: its directory.
        settings: settings of ScaNN; a search uses the current `leaves_to_search` and `reorder`.
        parts: its parts, in the order of their rows.
        valid_rows: number of rows in the index.
        recall: recall against exact search (`measure_recall`); None if it was not measured.
    """

    def __init__(
        self,
        path: pathlib.Path,
        encodings: Encodings,
        settings: Settings,
        recall,
        groups: Groups = ONE_GROUP,
    ):
        self.path, self.settings, self.recall = path, settings, recall
        self._read, self._groups = encodings.read, groups
        self._identity = [plain(encodings.fingerprint), encodings.rows]
        self.parts = [Part(directory) for directory in _parts(path, encodings.rows, settings)]
        self.valid_rows = sum(part.count for part in self.parts)
        if not self.valid_rows:
            raise ScannError(f"none of the {encodings.rows} rows for {path} is valid")

    def search(
        self,
        queries_QxE: np.ndarray,
        k: int = 10,
        without: np.ndarray | None = None,
        opponents: bool = True,
        candidates: int = 0,
    ) -> Ranked | None:
        """Ranks the rows with the largest and the smallest inner products that the index finds.

        Among equal scores the lower row comes first. The ranking has no first ranks, since an index
        does not score all rows.

        Args:
            queries_QxE: the queries' encodings.
            k: number of proponents and opponents; all rows if they are fewer.
            without: rows that were withdrawn after the build; never returned.
            opponents: whether to search for opponents too, which doubles the time.
            candidates: if the index has codes alone, the rows of each query that are read and
                scored by their encodings; 40 k by default.

        Returns:
            The ranking; None in all processes but the first of those that share groups.

        Raises:
            ScannError: an encoding is not finite, or a part cannot be read.
        """
        queries_QxE = np.ascontiguousarray(queries_QxE, np.float32)
        bad = np.flatnonzero(~np.isfinite(queries_QxE).all(axis=1))
        if len(bad):
            raise ScannError(f"the encoding of query {bad[0]} has a number that is not finite")
        without = np.asarray([] if without is None else without, np.int64)
        count = len(queries_QxE)
        # The smallest inner products with q are the largest with −q.
        both = np.concatenate([queries_QxE, -queries_QxE]) if opponents else queries_QxE
        rescored = self.settings.has_codes_alone
        depth = max(k, candidates or CANDIDATES * k) if rescored else k
        if not count:
            rows, scores = np.zeros((0, 0), np.int64), np.zeros((0, 0), np.float32)
        elif (best := self._search_parts(both, depth, without)) is None:
            return None
        else:
            rows, scores = best
        if rescored:
            rows = np.sort(rows, axis=1)
            scores, rows = best_of(self._score(both, rows), rows, k)
        if not opponents:
            return Ranked.of_proponents(rows, scores)
        return Ranked(rows[:count], scores[:count], rows[count:], -scores[count:], {})

    def _search_parts(
        self, queries_QxE: np.ndarray, depth: int, without: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """Returns the best rows of all parts and their scores; each part is a group."""
        loaded_bytes = 0

        def work(numbers: range) -> dict[str, np.ndarray]:
            nonlocal loaded_bytes
            part = self.parts[numbers.start]
            rows, scores = part.search(queries_QxE, depth, without, self.settings)
            loaded_bytes += part.bytes
            if loaded_bytes > _RESIDENT_BYTES:
                part.release()
            return {"rows": rows, "scores": scores}

        def merge(results: Iterator[dict[str, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
            rows = np.zeros((len(queries_QxE), 0), np.int64)
            scores = np.zeros(rows.shape, np.float32)
            for result in results:
                rows = np.hstack([rows, result["rows"]])
                scores = np.hstack([scores, result["scores"]])
                scores, rows = best_of(scores, rows, depth)
            return rows, scores

        ranges = [range(i, i + 1) for i in range(len(self.parts))]
        if self._groups.directory is None:
            return merge(map(work, ranges))
        arrays = {"queries": queries_QxE, "without": without}
        parts = [self._identity, vars(self.settings), depth, fingerprint_arrays(arrays)]
        return self._groups.reduce(f"scann-{fingerprint(parts)}", ranges, work, merge)

    def _score(self, queries_QxE: np.ndarray, rows_QxN: np.ndarray) -> np.ndarray:
        """Returns the scores of every query's candidates, ascending rows, by their encodings."""
        scores_QxN = np.zeros(rows_QxN.shape, np.float32)
        for query_E, rows_N, scores_N in zip(queries_QxE, rows_QxN, scores_QxN, strict=True):
            with np.errstate(invalid="ignore"):
                scores_N[:] = self._read(rows_N) @ query_E
            bad = np.flatnonzero(~np.isfinite(scores_N))
            if len(bad):
                raise ScannError(
                    f"row {rows_N[bad[0]]} is invalid now: give `without` what was withdrawn"
                )
        return scores_QxN


def build(
    path,
    encodings: Encodings,
    settings: Settings,
    check: Callable[[], tuple[np.ndarray, Ranked | None]] | None = None,
    groups: Groups = ONE_GROUP,
) -> Index:
    """Builds an index, resumes building it, or opens it if no part is missing.

    The recall of a finished index is printed and kept in its manifest. Of several processes all
    call it.

    Args:
        path: a local directory.
        encodings: what to index; rows of missing parts are read once and in order.
        settings: settings of ScaNN; `settings_for` chooses them.
        check: a function that returns a sample of queries, float32 [Q, E], and their exact ranking
            (in process 0), called once all parts exist.
        groups: assigns parts to processes, and keeps rankings of parts.

    Raises:
        ScannError: the directory has an index of other encodings or settings; no row is valid; a
            part is damaged; ScaNN is not installed.
    """
    import_scann()
    root, location = pathlib.Path(path), Location(path)
    manifest = {
        "format": _FORMAT,
        "rows": encodings.rows,
        "width": encodings.width,
        "settings": vars(settings),
        "fingerprint": plain(encodings.fingerprint),
        "scann": importlib.metadata.version("scann"),
    }

    def describe() -> dict:
        stored = location.read_json("manifest.json")
        if stored is None:
            location.write_json("manifest.json", manifest)
            stored = manifest
        check_same(root, {k: stored.get(k) for k in manifest}, manifest, ScannError)
        return stored

    with groups.engine.alone():
        stored = processes.on_first_process(f"describe the index {root}", describe)
    _build_missing_parts(root, encodings, settings, groups.engine)
    index = Index(root, encodings, settings, stored.get("recall"), groups)
    if check is not None and index.recall is None:
        # All processes share both searches; process 0 compares.
        queries_QxE, exact = check()
        shares = measure_recall(index, queries_QxE, exact)

        def keep() -> dict:
            location.write_json("manifest.json", manifest | {"recall": shares})
            return shares

        index.recall = r = processes.on_first_process("keep the recall", keep)
        print(
            f"index {root}: recall@{r['k']} against exact search over {r['queries']} queries: "
            f"proponents {r['proponents']:.3f}, opponents {r['opponents']:.3f}",
            flush=True,
        )
    return index


def _build_missing_parts(
    root: pathlib.Path, encodings: Encodings, settings: Settings, engine: Engine
) -> None:
    parts = list(_parts(root, encodings.rows, settings).items())

    def compute(numbers: Sequence[int]) -> None:
        if not numbers:
            return
        rows = [len(parts[i][1]) for i in numbers]
        # One buffer serves all parts: it is most of the memory that a build takes.
        buffer = np.empty((max(rows), encodings.width), np.float32)
        with progress.bar(encodings.rows, "index", "row", encodings.rows - sum(rows)) as bar:
            for i in numbers:
                directory, covered = parts[i]
                rows_N, x_NxE = _read_valid(encodings, covered, buffer)
                # ScaNN may take longer than the time between a notice and the kill.
                preemption.heed(functools.partial(write_part, directory, rows_N, x_NxE, settings))
                bar.update(len(covered))

    def list_missing() -> list[int]:
        return [i for i, (directory, _) in enumerate(parts) if not directory.exists()]

    engine.compute(Work(f"index {root.name}", compute, list_missing, list_missing))


def _parts(root: pathlib.Path, rows: int, settings: Settings) -> dict[pathlib.Path, range]:
    """Returns the directory of every part and the rows that it covers.

    The parts are of nearly equal size, so that none is too small to learn codes from.
    """
    count = -(-rows // settings.part_rows)
    ends = [rows * i // count for i in range(count + 1)]
    return {root / f"{i:05d}": range(ends[i], ends[i + 1]) for i in range(count)}


def _read_valid(encodings: Encodings, covered: range, buffer) -> tuple[np.ndarray, np.ndarray]:
    """Reads the valid rows of a part into the buffer; returns their numbers and encodings."""
    step = max(1, _STEP_BYTES // (4 * encodings.width))
    numbers, count = [], 0
    for first in range(covered.start, covered.stop, step):
        preemption.check()
        rows = np.arange(first, min(first + step, covered.stop))
        x = encodings.read(rows)
        valid = store.valid(x)
        numbers.append(rows[valid])
        buffer[count : count + len(numbers[-1])] = x[valid]
        count += len(numbers[-1])
    rows_N, x_NxE = np.concatenate(numbers), buffer[:count]
    # A row's sum is not finite if one of its numbers is not, and needs no boolean array.
    bad = np.flatnonzero(~np.isfinite(x_NxE.sum(axis=1, dtype=np.float64)))
    if len(bad):
        raise ScannError(
            f"the encoding of row {rows_N[bad[0]]} has a number that is not finite; an invalid "
            "row is infinite throughout"
        )
    return rows_N, x_NxE


def measure_recall(index: Index, queries_QxE: np.ndarray, exact: Ranked | None) -> dict | None:
    """Returns the shares, from 0 to 1, of the exact best and worst rows that an index finds.

    If equal scores are on both sides of the cut, a row that exact search left out counts as missed.

    Args:
        index: the index.
        queries_QxE: the queries' encodings.
        exact: their exact ranking; needed in process 0 alone.

    Returns:
        {"k", "queries", "proponents", "opponents"}; None in all processes but the first of those
        that share groups.
    """
    k = processes.on_first_process("count the rows", lambda: exact.proponents.shape[1])
    approximate = index.search(queries_QxE, k)
    if exact is None or approximate is None:
        return None

    def share(exact_Qxk: np.ndarray, rows_Qxk: np.ndarray) -> float:
        return float((exact_Qxk[:, :, None] == rows_Qxk[:, None, :]).any(axis=2).mean())

    return {
        "k": k,
        "queries": len(queries_QxE),
        "proponents": share(exact.proponents, approximate.proponents),
        "opponents": share(exact.opponents, approximate.opponents),
    }
