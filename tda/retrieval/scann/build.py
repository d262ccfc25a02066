"""Approximate search by ScaNN over encodings: building an index on disk, part by part.

    DIR/manifest.json   settings, shape, fingerprint of the encodings, recall against exact search
    DIR/00000/...       the first rows of the corpus; 00001/ the next, and so on

Every part covers consecutive rows, so memory does not grow with the corpus, and appears whole or
not at all: a killed build resumes with the missing parts and ends in the same bytes. The directory
may be moved. ScaNN is optional: pip install 'tda[scann]'.
"""

import json
import pathlib
from collections.abc import Callable

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

# Bytes of encodings to read at a time.
_STEP_BYTES = 64 << 20


def build(
    path,
    read: Read,
    shape: tuple[int, int],
    settings: Settings,
    fingerprint: dict,
    check: Callable[[], tuple[np.ndarray, Ranked]] | None = None,
) -> Index:
    """Builds an index, resumes building it, or opens it if no part is missing.

    The recall of a finished index is printed and kept in its manifest. Only one process may build
    an index at a time.

    Args:
        path: a local directory.
        read: a function from row numbers to encodings; rows of missing parts are read once and in
            order. An infinite row is invalid: it is never retrieved.
        shape: C and E.
        settings: settings of ScaNN; `settings_for` chooses them.
        fingerprint: JSON values that identify the encodings.
        check: a function that returns a sample of queries, float32 [Q, E], and their exact ranking,
            called once all parts exist. The recall is that of searches as `Index.search` does them,
            with `read` if the index keeps no encodings to reorder by.

    Raises:
        ScannError: the directory has an index of other encodings or settings; no row is valid;
            ScaNN is not installed.
    """
    root, (rows, width) = pathlib.Path(path), shape
    parts = scann_index.split_rows(rows, settings.part_rows)
    manifest = {
        "format": scann_index.FORMAT,
        "rows": rows,
        "width": width,
        "parts": len(parts),
        "settings": vars(settings),
        "fingerprint": json.loads(json.dumps(fingerprint)),
        "scann": scann_part.version(),
    }
    if (root / "manifest.json").exists():
        stored = scann_index.read_manifest(root)
        scann_index.check_same(root, {k: stored.get(k) for k in manifest}, manifest)
    else:
        root.mkdir(parents=True, exist_ok=True)
        scann_index.write_manifest(root, manifest | {"recall": None})
    directories = {scann_index.part_path(root, i): covered for i, covered in enumerate(parts)}
    missing = {d: covered for d, covered in directories.items() if not d.exists()}
    done = rows - sum(covered.stop - covered.start for covered in missing.values())
    if missing:
        # One buffer serves all parts: it is most of the memory that a build takes.
        buffer = np.empty((max(s.stop - s.start for s in missing.values()), width), np.float32)
        with progress.bar(rows, "index", "row", done) as bar:
            for directory, covered in missing.items():
                rows_N, x_NxE = _read_valid(read, covered, buffer)
                scann_part.write_part(directory, rows_N, x_NxE, settings)
                bar.update(covered.stop - covered.start)
    index = Index.open(root)
    if not index.valid_rows:
        raise ScannError(f"none of the {rows} rows for {root} is valid: there is nothing to search")
    if check is not None and (missing or index.recall is None):
        r = recall(index, *check(), read=None if settings.reorder else read)
        scann_index.write_manifest(root, manifest | {"recall": r})
        index.recall = r
        print(
            f"index {root}: recall@{r['k']} against exact search over {r['queries']} queries: "
            f"proponents {r['proponents']:.3f}, opponents {r['opponents']:.3f}",
            flush=True,
        )
    return index


def _read_valid(read: Read, covered: slice, buffer: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Reads the valid rows of a part into the buffer; returns their numbers and encodings."""
    width = buffer.shape[1]
    step = max(1, _STEP_BYTES // (4 * width))
    numbers, count = [], 0
    for first in range(covered.start, covered.stop, step):
        rows = np.arange(first, min(first + step, covered.stop))
        x = read(rows)
        valid = store.valid(x)
        numbers.append(rows[valid])
        buffer[count : count + len(numbers[-1])] = x[valid]
        count += len(numbers[-1])
    rows_N, x_NxE = np.concatenate(numbers), buffer[:count]
    bad = np.flatnonzero(~np.isfinite(x_NxE.sum(axis=1, dtype=np.float64)))
    if len(bad):
        raise ScannError(
            f"the encoding of row {rows_N[bad[0]]} has a number that is not finite; an invalid "
            "row is infinite throughout"
        )
    return rows_N, x_NxE


def recall(
    index: Index,
    queries_QxE: np.ndarray,
    exact: Ranked,
    k: int | None = None,
    read: Read | None = None,
) -> dict:
    """Returns the share of the exact k best, and k worst, rows that an index finds.

    If equal scores stand on both sides of the k-th, a row that exact search left out counts as
    missed.

    Args:
        index: the index.
        queries_QxE: encodings of the queries.
        exact: the exact ranking of these queries.
        k: rows of each query to compare; all that `exact` has by default.
        read: as in `Index.search`.

    Returns:
        {"k", "queries", "proponents", "opponents"}, the last two from 0 to 1.
    """
    k = k or exact.proponents.shape[1]
    approximate = index.search(queries_QxE, k, read=read)
    return {
        "k": k,
        "queries": len(queries_QxE),
        "proponents": _overlap(approximate.proponents, exact.proponents[:, :k]),
        "opponents": _overlap(approximate.opponents, exact.opponents[:, :k]),
    }


def _overlap(rows_Qxk: np.ndarray, exact_Qxk: np.ndarray) -> float:
    """Returns the share of the exact rows that are among the others."""
    return float((exact_Qxk[:, :, None] == rows_Qxk[:, None, :]).any(axis=2).mean())
