"""The gradient store: raw projected gradients on disk, written shard by shard.

    DIR/manifest.json   what the rows are: shape, blocks, and a fingerprint of all that made them
    DIR/gradients       zarr v3 array [C, E] (TensorStore), one file a shard, each chunk with CRC32C
    DIR/ids.json        the id of every row

A shard appears whole or not at all, so a killed run goes on with the shards that are missing; any
zarr reader opens the array.
"""

import json
import os
from collections.abc import Iterator, Sequence

import numpy as np
import tensorstore as ts
from etils import epath

from tda import processes

FORMAT = 1
_CHUNK_BYTES = 4 << 20
_READ_BYTES = 256 << 20


def valid(rows_RxE: np.ndarray) -> np.ndarray:
    """Which rows hold a gradient, bool [R]; an invalid one is infinite throughout."""
    return np.isfinite(rows_RxE[:, 0])


class StoreError(ValueError):
    """A store is absent, unfinished, damaged, or not of what it is used with."""


class GradientStore:
    """Rows of projected gradients with their ids. Made by `create` or `open_store`."""

    def __init__(self, path: epath.Path, manifest: dict, array: ts.TensorStore):
        self.path, self.manifest, self._array = path, manifest, array

    @property
    def rows(self) -> int:
        """C, the number of rows when finished."""
        return self.manifest["rows"]

    @property
    def width(self) -> int:
        """E, the numbers in a row."""
        return self.manifest["width"]

    @property
    def slices(self) -> list[slice]:
        """Where each block stands in a row."""
        ends = np.cumsum([0, *self.manifest["block_widths"]])
        return [slice(int(a), int(b)) for a, b in zip(ends[:-1], ends[1:], strict=True)]

    @property
    def ids(self) -> list[str]:
        """The rows' ids, in order."""
        return json.loads((self.path / "ids.json").read_text())

    def shards(self) -> list[slice]:
        """The rows of every shard."""
        size = self.manifest["shard_rows"]
        return [slice(i, min(i + size, self.rows)) for i in range(0, self.rows, size)]

    def missing(self) -> list[int]:
        """Numbers of the shards that are not written yet."""
        there = self.path / "gradients" / "c"
        return [i for i in range(len(self.shards())) if not (there / str(i) / "0").exists()]

    def write(self, shard: int, encodings_RxE: np.ndarray) -> list[str]:
        """Writes a whole shard, atomically.

        A row with a number that is not finite is stored as invalid: all of it is infinite. It takes
        no part in R and is never retrieved.

        Returns:
            The ids of the invalid rows.

        Raises:
            StoreError: the rows are not the shard's.
        """
        rows = self.shards()[shard]
        wanted = (rows.stop - rows.start, self.width)
        if encodings_RxE.shape != wanted:
            raise StoreError(
                f"shard {shard} takes rows of shape {wanted}, not {encodings_RxE.shape}"
            )
        bad = ~np.isfinite(encodings_RxE).all(axis=1)
        if bad.any():
            encodings_RxE = np.where(bad[:, None], np.float32(np.inf), encodings_RxE)
        self._array[rows].write(encodings_RxE.astype(self._array.dtype.numpy_dtype)).result()
        ids = self.ids if bad.any() else []
        return [ids[rows.start + i] for i in np.flatnonzero(bad)]

    def read(self, rows) -> np.ndarray:
        """Rows by slice or by an array of row numbers: float32 [R, E].

        Raises:
            StoreError: a row is not written, or a checksum is wrong.
        """
        index = rows if isinstance(rows, slice) else np.asarray(rows, np.int64)
        try:
            out = np.asarray(self._array[index].read().result()).astype(np.float32)
        except ValueError as error:
            raise StoreError(f"{self.path} is damaged: {error}") from error
        if out.size and np.isnan(out[:, 0]).any():
            raise StoreError(f"{self.path} is unfinished: shards {self.missing()} are missing")
        return out

    def chunks(self, rows: int | None = None) -> Iterator[tuple[int, np.ndarray]]:
        """All rows in order as (first row, float32 [≤ rows, E]); the next chunk is read ahead.

        By default a chunk has 4096 rows, or fewer where these would take more than 256 MiB.
        """
        rows = rows or max(1, min(4096, _READ_BYTES // (4 * self.width)))
        starts = list(range(0, self.rows, rows))
        ahead = self._array[0 : min(rows, self.rows)].read() if starts else None
        for start in starts:
            now, following = ahead, start + rows
            if following < self.rows:
                ahead = self._array[following : min(following + rows, self.rows)].read()
            out = np.asarray(now.result()).astype(np.float32)
            if np.isnan(out[:, 0]).any():
                raise StoreError(f"{self.path} is unfinished: shards {self.missing()} are missing")
            yield start, out


def _spec(path: epath.Path, manifest: dict) -> dict:
    width = manifest["width"]
    itemsize = {"float32": 4, "bfloat16": 2}[manifest["dtype"]]
    # A shard is a whole number of chunks of a few megabytes.
    chunk_rows = max(1, min(manifest["shard_rows"], _CHUNK_BYTES // (width * itemsize)))
    while manifest["shard_rows"] % chunk_rows:
        chunk_rows -= 1
    inner = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
    url = os.fspath(path / "gradients")
    url = url if "://" in url else os.path.abspath(url)
    return {
        "driver": "zarr3",
        "kvstore": f"{url}/" if "://" in url else {"driver": "file", "path": f"{url}/"},
        "metadata": {
            "shape": [manifest["rows"], width],
            "data_type": manifest["dtype"],
            # A row that was never written reads as NaN, not as a gradient of zero.
            "fill_value": "NaN",
            "chunk_grid": {
                "name": "regular",
                "configuration": {"chunk_shape": [manifest["shard_rows"], width]},
            },
            "codecs": [
                {
                    "name": "sharding_indexed",
                    "configuration": {"chunk_shape": [chunk_rows, width], "codecs": inner},
                }
            ],
        },
    }


def create(
    path,
    ids: Sequence[str],
    blocks: dict[str, int],
    fingerprint: dict,
    dtype: str = "float32",
    shard_bytes: int = 256 << 20,
) -> GradientStore:
    """Makes a store, or opens the unfinished or finished one that is there already.

    Of several processes the first makes it, and the others open it when it is there.

    Args:
        path: a directory, local or `gs://`, `s3://`.
        ids: of the rows.
        blocks: name and width of each block of a row, in order.
        fingerprint: JSON values that say what the rows were made with and from.
        dtype: of the numbers on disk: "float32" or "bfloat16".
        shard_bytes: size of a shard, about; what is lost at most by a kill.

    Raises:
        StoreError: another store is there, the corpus is empty, or the directory is not writable.
    """
    if not len(ids):
        raise StoreError("there are no rows to store: the corpus is empty")
    if dtype not in ("float32", "bfloat16"):
        raise StoreError(f"unknown dtype {dtype!r}; use float32 or bfloat16")
    width = sum(blocks.values())
    row_bytes = width * (4 if dtype == "float32" else 2)
    manifest = {
        "format": FORMAT,
        "rows": len(ids),
        "width": width,
        "dtype": dtype,
        "shard_rows": int(min(len(ids), max(1, shard_bytes // row_bytes))),
        "blocks": list(blocks),
        "block_widths": list(blocks.values()),
        "fingerprint": fingerprint,
    }
    path = epath.Path(path)
    processes.by_first(f"make the store {path}", lambda: _make_absent(path, ids, manifest))
    store = open_store(path)
    _check(path, store.manifest, manifest)
    if store.ids != list(ids):
        raise StoreError(f"{path} holds other passages than the corpus; remove it to start over")
    return store


def _make_absent(path: epath.Path, ids: Sequence[str], manifest: dict) -> None:
    if not (path / "manifest.json").exists():
        _make(path, ids, manifest)


def _make(path: epath.Path, ids: Sequence[str], manifest: dict) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
        (path / "ids.json").write_text(json.dumps(list(ids), ensure_ascii=False))
        ts.open(_spec(path, manifest), create=True, delete_existing=True).result()
        # The manifest comes last: a directory without one is not a store yet.
        part = path / "manifest.json.part"
        part.write_text(json.dumps(manifest, indent=1))
        part.rename(path / "manifest.json")
    except OSError as error:
        raise StoreError(f"cannot write a store to {path}: {error}") from error


def open_store(path, fingerprint: dict | None = None) -> GradientStore:
    """Opens a store.

    Args:
        path: its directory.
        fingerprint: what its rows must have been made with; only the keys given are compared.

    Raises:
        StoreError: there is none, its format is unknown, or it differs; the message says in what.
    """
    path = epath.Path(path)
    if not (path / "manifest.json").exists():
        raise StoreError(f"no store at {path} (it has no manifest.json)")
    try:
        manifest = json.loads((path / "manifest.json").read_text())
    except json.JSONDecodeError as error:
        raise StoreError(f"{path / 'manifest.json'} is not JSON: {error}") from error
    if manifest.get("format") != FORMAT:
        raise StoreError(f"{path} has format {manifest.get('format')}, this version reads {FORMAT}")
    if fingerprint is not None:
        there = manifest["fingerprint"]
        _check(path, {k: there.get(k) for k in fingerprint}, fingerprint)
    array = ts.open(_spec(path, manifest), open=True).result()
    return GradientStore(path, manifest, array)


def finished(path) -> bool:
    """Whether there is a store at `path` that lacks no shard."""
    return (epath.Path(path) / "manifest.json").exists() and not open_store(path).missing()


def _check(path, there: dict, wanted: dict) -> None:
    differing = list(_differences("", there, wanted))
    if differing:
        raise StoreError(
            f"{path} was not made with what it is used with:\n  "
            + "\n  ".join(differing)
            + "\nremove it, or use what it was made with"
        )


def _differences(name: str, there, wanted) -> Iterator[str]:
    if isinstance(there, dict) and isinstance(wanted, dict):
        for key in sorted(there.keys() | wanted.keys()):
            inner = f"{name}.{key}" if name else key
            yield from _differences(inner, there.get(key), wanted.get(key))
    elif there != wanted:
        yield f"{name}: {there} in the store, {wanted} wanted"
