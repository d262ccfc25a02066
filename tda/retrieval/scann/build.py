"""Approximate search by ScaNN over encodings: an index on disk, built part by part.

    DIR/manifest.json   settings, shape, a fingerprint of the encodings, the recall against exact
    DIR/00000/...       the first rows of the corpus; 00001/ the next, and so on

Every part covers consecutive rows, so memory does not grow with the corpus, and is in its place
whole or not at all: a killed build goes on with the parts that are missing, and ends in the same
bytes. The directory may be moved. ScaNN is optional: pip install 'tda[scann]'.
"""

import json
import pathlib
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from tda import store
from tda.retrieval.ranked import Ranked
from tda.retrieval.scann import index as scann_index
from tda.retrieval.scann import part as scann_part
from tda.retrieval.scann.index import Index, Read
from tda.retrieval.scann.part import ScannError
from tda.retrieval.scann.settings import Settings, settings_for
from tda.runtime import progress

__all__ = ["Index", "ScannError", "Settings", "build", "recall", "settings_for"]

Chunks = Iterable[tuple[int, np.ndarray]]


def build(
    path,
    chunks: Callable[[int], Chunks],
    rows: int,
    width: int,
    settings: Settings,
    fingerprint: dict,
    check: Callable[[], tuple[np.ndarray, Ranked]] | None = None,
    read: Read | None = None,
) -> Index:
    """Builds an index, goes on building it, or opens it where nothing is missing.

    The recall of a finished index is printed and kept in its manifest. One process builds at a
    time.

    Args:
        path: a local directory.
        chunks: called with a row's number, gives the encodings in order as (first row,
            float32 [R, E]), from that row or from any before it. A row that is infinite is
            invalid: it is never retrieved.
        rows, width: C and E.
        settings: how; `settings_for` chooses.
        fingerprint: JSON values that say what the encodings are.
        check: gives a sample of queries, float32 [Q, E], and their exact ranking; called when the
            parts are there.
        read: what searches will be given to score the candidates again; the recall is that of such
            searches.

    Raises:
        ScannError: another index is there, or one of other settings; the rows given are not those
            announced; no row is valid; ScaNN is not installed.
    """
    root = pathlib.Path(path)
    if rows < 1 or width < 1:
        raise ScannError(f"there is nothing to index: {rows} rows of {width} numbers")
    manifest = {
        "format": scann_index.FORMAT,
        "rows": rows,
        "width": width,
        "parts": len(scann_index.parts_of(rows, settings.part_rows)),
        "settings": vars(settings),
        "fingerprint": json.loads(json.dumps(fingerprint)),
        "scann": scann_part.version(),
    }
    if (root / "manifest.json").exists():
        there = scann_index.read_manifest(root)
        scann_index.compare(root, {k: there.get(k) for k in manifest}, manifest)
    else:
        root.mkdir(parents=True, exist_ok=True)
        scann_index.write_manifest(root, manifest | {"recall": None})
    built = _fill(root, chunks, rows, width, settings)
    index = Index.open(root)
    if not index.valid_rows:
        raise ScannError(f"none of the {rows} rows for {root} is valid: there is nothing to search")
    if check is not None and (built or index.recall is None):
        found = recall(index, *check(), read=read)
        scann_index.write_manifest(root, manifest | {"recall": found})
        index.recall = found
        print(
            f"index {root}: recall@{found['k']} against exact search over {found['queries']} "
            f"queries: proponents {found['proponents']:.3f}, opponents {found['opponents']:.3f}",
            flush=True,
        )
    return index


def _fill(root: pathlib.Path, chunks, rows: int, width: int, settings: Settings) -> int:
    """Builds the parts that are missing; how many these were."""
    missing = [
        (scann_index.directory(root, i), covered)
        for i, covered in enumerate(scann_index.parts_of(rows, settings.part_rows))
        if not scann_index.directory(root, i).exists()
    ]
    if not missing:
        return 0
    done = rows - sum(s.stop - s.start for _, s in missing)
    given = chunks(missing[0][1].start)
    with progress.bar(rows, "index", "row", done) as bar:
        gathered = _gathered(given, [s for _, s in missing], rows, width)
        for (directory, covered), (rows_N, x_NxE) in zip(missing, gathered, strict=True):
            scann_part.write(directory, covered, rows_N, x_NxE, settings)
            bar.update(covered.stop - covered.start)
    return len(missing)


def _gathered(
    chunks: Chunks, wanted: list[slice], rows: int, width: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The valid rows of every part wanted and their encodings, which the next ones overwrite."""
    buffer = np.empty((max(s.stop - s.start for s in wanted), width), np.float32)
    stream, first, x = iter(chunks), 0, np.empty((0, width), np.float32)
    for part in wanted:
        at, numbers = part.start, []
        while at < part.stop:
            while first + len(x) <= at:
                first, x = next(stream, (rows, None))
                if x is None or first > at:
                    raise ScannError(f"the encodings of rows {at} to {min(first, rows)} are absent")
                if x.ndim != 2 or x.shape[1] != width or first + len(x) > rows:
                    raise ScannError(
                        f"encodings {list(x.shape)} of rows from {first} do not fit an index of "
                        f"{rows} rows, {width} numbers each"
                    )
            some = x[at - first : part.stop - first]
            own = at + np.flatnonzero(store.valid(some))
            kept = sum(map(len, numbers))
            buffer[kept : kept + len(own)] = x[own - first]
            numbers.append(own)
            at += len(some)
        rows_N = np.concatenate(numbers)
        x_NxE = buffer[: len(rows_N)]
        bad = np.flatnonzero(~np.isfinite(x_NxE.sum(axis=1, dtype=np.float64)))
        if len(bad):
            raise ScannError(
                f"the encoding of row {rows_N[bad[0]]} has a number that is not finite; an invalid "
                "row is infinite throughout"
            )
        yield rows_N, x_NxE


def recall(
    index: Index,
    queries_QxE: np.ndarray,
    exact: Ranked,
    k: int | None = None,
    read: Read | None = None,
) -> dict:
    """The share of the exact k best, and k worst, rows that an index finds.

    Where equal scores stand on both sides of the k-th, the other row found counts as missed.

    Args:
        index: the index.
        queries_QxE: encodings of the queries.
        exact: what exact search ranks for these.
        k: how many of each; as many as `exact` has by default.
        read: what the search is given to score the candidates again.

    Returns:
        {"k", "queries", "proponents", "opponents"}, the last two from 0 to 1.

    Raises:
        ScannError: the exact ranking has no queries, other queries, or fewer rows.
    """
    kept = exact.proponents.shape[1]
    k = k or kept
    if not 0 < k <= kept or len(exact.proponents) != len(queries_QxE) or not len(queries_QxE):
        raise ScannError(
            f"recall@{k} of {len(queries_QxE)} queries cannot be told from an exact ranking of "
            f"{len(exact.proponents)} queries, {kept} rows each"
        )
    found = index.search(queries_QxE, k, read=read)
    return {
        "k": k,
        "queries": len(queries_QxE),
        "proponents": _shared(found.proponents, exact.proponents[:, :k]),
        "opponents": _shared(found.opponents, exact.opponents[:, :k]),
    }


def _shared(found_Qxk: np.ndarray, exact_Qxk: np.ndarray) -> float:
    """The share of the exact rows that are among those found."""
    return float((exact_Qxk[:, :, None] == found_Qxk[:, None, :]).any(axis=2).mean())
