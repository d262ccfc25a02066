"""zarr v3 arrays in shard files, each chunk with its CRC32C."""

import numpy as np
import tensorstore as ts

from tda.store.location import Location, StoreError


def fill_value(dtype: np.dtype) -> float | int:
    """Returns the number that rows read as before they are written: NaN, or the largest integer."""
    return int(np.iinfo(dtype).max) if np.issubdtype(dtype, np.integer) else np.nan


def metadata(shape: list[int], dtype: np.dtype, chunk_rows: int, shard_rows: int) -> dict:
    """Returns zarr's metadata of an array cut into chunks and shards along its first axis."""
    fill = fill_value(dtype)
    chunk, shard = ([rows, *shape[1:]] for rows in (chunk_rows, shard_rows))
    inner = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
    codec = {"chunk_shape": chunk, "codecs": inner}
    return {
        "shape": shape,
        "data_type": dtype.name,
        "fill_value": "NaN" if np.isnan(fill) else fill,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": shard}},
        "codecs": [{"name": "sharding_indexed", "configuration": codec}],
    }


def open_array(location: Location, metadata: dict, create: bool = False) -> ts.TensorStore:
    """Opens an array, or creates it anew.

    Raises:
        StoreError: there is no such array, or it has other metadata.
    """
    spec = {
        "driver": "zarr3",
        "kvstore": location.spec(),
        "metadata": metadata,
        # A shard must appear even if all of its numbers equal the fill value.
        "store_data_equal_to_fill_value": True,
    }
    mode = dict(create=True, delete_existing=True) if create else dict(open=True)
    try:
        return ts.open(spec, **mode).result()
    except (ValueError, OSError) as error:
        raise StoreError(f"{location.name}: {error}") from error
