"""One part of an approximate index: consecutive rows of a corpus, as ScaNN's files in a directory.

    rows.npy        int64 [N]: which rows of the corpus are in the part (the valid ones)
    part.json       the rows that it covers, and the size of every file
    scann_*, *.npy  ScaNN's own files

A directory is data: nothing in it is unpickled, and its files name each other by relative paths.
"""

import dataclasses
import json
import os
import pathlib
import re
import shutil

import numpy as np

from tda.retrieval.scann.settings import Settings

# Below, codes cannot be learned, and scoring every row costs nothing.
_FEWEST = 256
# Queries that a thread takes at a time.
_BATCH = 32


class ScannError(ValueError):
    """An index cannot be made, is absent, unfinished, damaged, or not of what it is used with."""


def library():
    """ScaNN's module of searchers, imported when first needed: it is optional.

    Raises:
        ScannError: it is not installed, or does not load here.
    """
    try:
        from scann.scann_ops.py import scann_ops_pybind
    except ImportError as error:
        raise ScannError(
            f"approximate search needs ScaNN, which cannot be imported ({error}); install it by "
            "pip install 'tda[scann]' (there are builds for Linux only), or search exactly"
        ) from error
    return scann_ops_pybind


def version() -> str:
    """ScaNN's version."""
    from importlib import metadata

    library()
    return metadata.version("scann")


@dataclasses.dataclass(frozen=True)
class Part:
    """A part that is loaded.

    Attributes:
        rows: int64 [N], rows of the corpus, rising.
        searcher: ScaNN's; None where no row is valid.
        settings: what it was built with.
    """

    rows: np.ndarray
    searcher: object
    settings: Settings

    def search(
        self, encodings_QxE: np.ndarray, k: int, gone: np.ndarray, leaves: int = 0, reorder: int = 0
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k rows with the largest inner products: rows and scores, each [Q, ≤ k], best first.

        Args:
            encodings_QxE: queries, float32.
            k: how many; all that there are, where they are fewer.
            gone: sorted rows of the corpus that are not to be returned.
            leaves, reorder: instead of the settings' `leaves_to_search` and `reorder`, unless 0.
        """
        gone_N = np.isin(self.rows, gone)
        wanted = min(k, int((~gone_N).sum()))
        count = len(encodings_QxE)
        rows, scores = np.zeros((count, wanted), np.int64), np.zeros((count, wanted), np.float32)
        lacking = np.arange(count) if wanted else np.arange(0)
        fetched = min(len(self.rows), wanted + min(wanted, int(gone_N.sum())))
        while len(lacking):
            at, found = self._nearest(encodings_QxE[lacking], fetched, leaves, reorder)
            kept = ~np.isnan(found) & ~gone_N[at]
            enough = np.flatnonzero(kept.sum(axis=1) >= wanted)
            # Those kept move to the front, in their order.
            front = np.argsort(~kept[enough], axis=1, kind="stable")[:, :wanted]
            rows[lacking[enough]] = self.rows[np.take_along_axis(at[enough], front, 1)]
            scores[lacking[enough]] = np.take_along_axis(found[enough], front, 1)
            lacking = np.delete(lacking, enough)
            if len(lacking) and fetched == len(self.rows) and leaves == self.settings.leaves:
                raise ScannError(f"ScaNN found fewer than {wanted} rows where there are as many")
            # The leaves held too few, or too many of the rows are gone.
            fetched, leaves = min(len(self.rows), 4 * fetched), self.settings.leaves
        return rows, scores

    def _nearest(self, encodings_QxE, k: int, leaves: int, reorder: int):
        """Places in `rows` and scores, each [Q, k]; a score is NaN where fewer were found."""
        reorder = max(k, reorder or self.settings.reorder)
        threads = min(_BATCH, -(-len(encodings_QxE) // (os.cpu_count() or 1)))
        at, scores = self.searcher.search_batched_parallel(
            encodings_QxE, k, reorder, leaves or self.settings.leaves_to_search or None, threads
        )
        return at.astype(np.int64), scores


def write(
    path: pathlib.Path, covered: slice, rows_N: np.ndarray, encodings_NxE, settings: Settings
) -> None:
    """Builds a part; the directory appears whole or not at all.

    The same rows give the same bytes, with any number of threads: k-means starts from centres that
    are chosen by k-means++ with a fixed generator (from random ones, it would not).

    Args:
        path: the directory.
        covered: rows of the corpus that the part covers.
        rows_N: those of them that are valid.
        encodings_NxE: float32, of these.
        settings: how.

    Raises:
        ScannError: ScaNN refuses, or the disk does.
    """
    temporary = path.with_name(path.name + ".part")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        if len(rows_N):
            _searcher(encodings_NxE, settings).serialize(str(temporary), relative_path=True)
        np.save(temporary / "rows.npy", rows_N)
        files = {p.name: p.stat().st_size for p in sorted(temporary.iterdir())}
        about = {"first": covered.start, "stop": covered.stop, "valid": len(rows_N)}
        about["files"] = files
        (temporary / "part.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        for file in [*temporary.iterdir(), temporary]:
            _to_disk(file)
        os.replace(temporary, path)
        _to_disk(path.parent)
    except (OSError, RuntimeError, ValueError) as error:
        raise ScannError(f"cannot build {path}: {error}") from error


def _searcher(encodings_NxE, settings: Settings):
    scann = library()
    count, nan = len(encodings_NxE), float("nan")
    builder = scann.builder(encodings_NxE, 10, "dot_product").set_n_training_threads(os.cpu_count())
    if count < _FEWEST or not (settings.dims_per_block or settings.leaves):
        return builder.score_brute_force().build()
    leaves = min(settings.leaves, count // 16)
    if leaves > 1:
        builder = builder.tree(
            leaves,
            min(leaves, settings.leaves_to_search),
            training_sample_size=settings.training_rows,
            training_iterations=settings.training_iterations,
            # Random centres would be other ones in every run.
            random_init=False,
            soar_lambda=settings.soar or None,
        )
    if not settings.dims_per_block:
        return builder.score_brute_force().build()
    from scann.scann_ops.py.scann_builder import ReorderType

    builder = builder.score_ah(
        settings.dims_per_block,
        anisotropic_quantization_threshold=settings.threshold or nan,
        training_sample_size=settings.training_rows,
        training_iterations=settings.training_iterations,
        residual_quantization=settings.residual and leaves > 1,
    )
    if settings.reorder:
        dtype = ReorderType[settings.reorder_dtype.upper()]
        builder = builder.reorder(settings.reorder, dtype)
    return builder.build()


def _to_disk(path: pathlib.Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def refuse_pickles(path: pathlib.Path) -> None:
    """Nothing, where no file below a directory is a pickle.

    Raises:
        ScannError: one is.
    """
    for file in path.rglob("*"):
        if file.suffix in (".pkl", ".pickle"):
            raise ScannError(
                f"{file} is a pickle, which could run anything: an index has none, and this one is "
                "not opened"
            )


def check(path: pathlib.Path, covered: slice) -> tuple[int, int]:
    """Looks for what is wrong with a part's files, without reading the large ones.

    Returns:
        Bytes of all its files, and the rows in it.

    Raises:
        ScannError: one is missing, truncated, or not its own.
    """
    advice = "remove the directory and build the index again: only this part is made anew"
    names = sorted(p.name for p in path.iterdir())
    try:
        about = json.loads((path / "part.json").read_text(encoding="utf-8"))
        sizes = {str(name): int(size) for name, size in about["files"].items()}
        there, valid = slice(about["first"], about["stop"]), int(about["valid"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ScannError(f"{path / 'part.json'} cannot be read ({error}); {advice}") from error
    if there != covered:
        raise ScannError(
            f"{path} has rows {there.start} to {there.stop}, not {covered.start} to {covered.stop};"
            f" {advice}"
        )
    for name, size in sizes.items():
        file = path / name
        if name not in names:
            raise ScannError(f"{file} is missing; {advice}")
        if file.stat().st_size != size:
            raise ScannError(f"{file} has {file.stat().st_size} bytes, not {size}; {advice}")
    for name in set(names) - sizes.keys() - {"part.json"}:
        raise ScannError(f"{path / name} is not a file of the index; remove it")
    return sum(sizes.values()), valid


def load(path: pathlib.Path, settings: Settings) -> Part:
    """Reads a part that `check` found nothing wrong with.

    Raises:
        ScannError: its files do not fit together.
    """
    scann = library()
    try:
        rows = np.load(path / "rows.npy", allow_pickle=False)
        if not len(rows):
            return Part(rows, None, settings)
        assets = (path / "scann_assets.pbtxt").read_text(encoding="utf-8")
        for name in re.findall(r'asset_path: *"([^"]*)"', assets):
            # An index could else read files from anywhere.
            if pathlib.PurePath(name).name != name:
                raise ScannError(f"{path / 'scann_assets.pbtxt'} names a file elsewhere: {name}")
        # Not by ScaNN's own loader, which unpickles.
        searcher = scann.ScannSearcher(scann.scann_pybind.ScannNumpy(str(path), assets))
    except (OSError, RuntimeError, ValueError) as error:
        raise ScannError(f"cannot load {path}: {error}") from error
    if searcher.size() != len(rows):
        raise ScannError(f"{path} has {searcher.size()} encodings for {len(rows)} rows")
    return Part(rows, searcher, settings)
