"""One part of an approximate index: consecutive rows of a corpus, as ScaNN's files in a directory.

rows.npy        int64 [N], the valid rows of the part, as row numbers of the corpus
part.json       the number of these rows, and the size of every file
scann_*, *.npy  the files of ScaNN's `serialize`
"""

import functools
import json
import os
import pathlib
import re

import numpy as np

from tda.retrieval.scann.settings import Settings
from tda.runtime import atomic_file

# ScaNN's codes cannot be learned from fewer rows, and scoring so few one by one costs nothing.
_FEWEST_ROWS = 256
# Queries that a thread takes at a time.
_BATCH = 32


class ScannError(ValueError):
    """An index that cannot be built, is damaged, or was built from other encodings."""


def import_scann():
    """Imports ScaNN when it is first needed, since it is optional.

    Raises:
        ScannError: ScaNN is not installed or does not load on this machine.
    """
    try:
        from scann.scann_ops.py import scann_ops_pybind
    except ImportError as error:
        raise ScannError(
            f"approximate search needs ScaNN, which cannot be imported ({error}); install it by "
            "pip install 'tda-jax[scann]' (there are builds for Linux only), or search exactly"
        ) from error
    return scann_ops_pybind


class Part:
    """A part that `write_part` wrote; its files are loaded by the first search.

    Args:
        path: its directory. Its files are checked by their sizes: ScaNN's own loader may crash on a
            truncated file.

    Attributes:
        count: number of valid rows.
        bytes: size of all files.

    Raises:
        ScannError: a file is missing or has another size.
    """

    def __init__(self, path: pathlib.Path):
        self.path = path
        advice = "remove the directory and build the index again, which makes only this part"
        try:
            description = json.loads((path / "part.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ScannError(f"{path / 'part.json'} cannot be read ({error}); {advice}") from error
        for name, size in description["files"].items():
            actual = (path / name).stat().st_size if (path / name).exists() else "no"
            if actual != size:
                raise ScannError(f"{path / name} has {actual} bytes, not {size}; {advice}")
        self.count: int = description["valid"]
        self.bytes: int = sum(description["files"].values())

    def search(
        self, queries_QxE: np.ndarray, k: int, without: np.ndarray, settings: Settings
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns the rows with the largest inner products and these, each [Q, ≤ k], best first.

        Args:
            queries_QxE: the queries' encodings, float32.
            k: number of rows; all rows of the part if they are fewer.
            without: rows of the corpus to leave out.
            settings: how many leaves to search and how many rows to score again.
        """
        rows_N, searcher = self._loaded
        excluded_N = np.isin(rows_N, without)
        k, count = min(k, int((~excluded_N).sum())), len(queries_QxE)
        rows, scores = np.zeros((count, k), np.int64), np.zeros((count, k), np.float32)
        pending = np.arange(count if k else 0)
        fetched = min(self.count, k + min(k, int(excluded_N.sum())))
        leaves = settings.leaves_to_search
        while len(pending):
            batch = min(_BATCH, -(-len(pending) // (os.cpu_count() or 1)))
            places, values = searcher.search_batched_parallel(
                queries_QxE[pending], fetched, max(fetched, settings.reorder), leaves or None, batch
            )
            # ScaNN fills up with NaN scores if the searched leaves hold too few rows.
            usable = ~np.isnan(values) & ~excluded_N[places]
            enough = np.flatnonzero(usable.sum(axis=1) >= k)
            # A stable sort moves the usable ones to the front and keeps their order.
            front = np.argsort(~usable[enough], axis=1, kind="stable")[:, :k]
            rows[pending[enough]] = rows_N[np.take_along_axis(places[enough], front, 1)]
            scores[pending[enough]] = np.take_along_axis(values[enough], front, 1)
            pending = np.delete(pending, enough)
            if len(pending) and fetched == self.count and leaves == settings.leaves:
                raise ScannError(f"ScaNN returned fewer than {k} rows though there are as many")
            # The searched leaves hold too few rows, or too many of them are left out: ask for more.
            fetched, leaves = min(self.count, 4 * fetched), settings.leaves
        return rows, scores

    @functools.cached_property
    def _loaded(self) -> tuple[np.ndarray, object]:
        """The rows, and ScaNN's searcher (None if no row is valid).

        Reads what ScaNN's `load_searcher` reads, except for `scann_docids.pkl`, which it would
        unpickle: an index has no document ids, and a pickle could run anything.
        """
        scann = import_scann()
        try:
            rows = np.load(self.path / "rows.npy", allow_pickle=False)
            if not self.count:
                return rows, None
            assets = (self.path / "scann_assets.pbtxt").read_text(encoding="utf-8")
            for name in re.findall(r'asset_path: *"([^"]*)"', assets):
                # Otherwise an index from someone else could read files from anywhere.
                if pathlib.PurePath(name).name != name:
                    file = self.path / "scann_assets.pbtxt"
                    raise ScannError(f"{file} names a file elsewhere: {name}")
            return rows, scann.ScannSearcher(scann.scann_pybind.ScannNumpy(str(self.path), assets))
        except (OSError, RuntimeError, ValueError) as error:
            raise ScannError(f"cannot load {self.path}: {error}") from error

    def release(self) -> None:
        """Frees the memory of the loaded files; the next search loads them again."""
        self.__dict__.pop("_loaded", None)


def write_part(path: pathlib.Path, rows_N: np.ndarray, encodings_NxE, settings: Settings) -> None:
    """Builds a part; its directory appears whole or not at all.

    The same rows give the same bytes, with any number of threads.

    Args:
        path: the directory.
        rows_N: the valid rows of the part, as row numbers of the corpus.
        encodings_NxE: encodings of the valid rows, float32.
        settings: settings of ScaNN.

    Raises:
        ScannError: ScaNN fails, or the disk does.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with atomic_file.replacing(path, is_directory=True) as temporary:
            if len(rows_N):
                searcher = _build_searcher(encodings_NxE, settings)
                # Relative paths, so that the directory may be moved.
                searcher.serialize(str(temporary), relative_path=True)
            np.save(temporary / "rows.npy", rows_N)
            sizes = {p.name: p.stat().st_size for p in sorted(temporary.iterdir())}
            text = json.dumps({"valid": len(rows_N), "files": sizes}, indent=1) + "\n"
            (temporary / "part.json").write_text(text, encoding="utf-8")
            # On disk before the directory gets its name, so that not even a power cut leaves half.
            for file in [*temporary.iterdir(), temporary]:
                _flush(file)
        _flush(path.parent)
    except (OSError, RuntimeError, ValueError) as error:
        raise ScannError(f"cannot build {path}: {error}") from error


def _build_searcher(encodings_NxE, settings: Settings):
    scann = import_scann()
    from scann.scann_ops.py.scann_builder import ReorderType

    count = len(encodings_NxE)
    training = {
        "training_sample_size": settings.training_rows,
        "training_iterations": settings.training_iterations,
    }
    builder = scann.builder(encodings_NxE, 10, "dot_product").set_n_training_threads(os.cpu_count())
    leaves = min(settings.leaves, count // 16) if count >= _FEWEST_ROWS else 0
    if leaves > 1:
        builder = builder.tree(
            leaves,
            min(leaves, settings.leaves_to_search),
            # k-means++ has a fixed generator; random centres would differ between two builds.
            random_init=False,
            soar_lambda=settings.soar or None,
            **training,
        )
    if count < _FEWEST_ROWS or not settings.dims_per_block:
        return builder.score_brute_force().build()
    builder = builder.score_ah(
        settings.dims_per_block,
        # ScaNN takes NaN for quantisation that weights all errors alike.
        anisotropic_quantization_threshold=settings.threshold or float("nan"),
        residual_quantization=settings.residual and leaves > 1,
        **training,
    )
    if settings.reorder:
        builder = builder.reorder(settings.reorder, ReorderType[settings.reorder_dtype.upper()])
    return builder.build()


def _flush(path: pathlib.Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
