"""zarr v3 arrays in shard files, each chunk with its CRC32C."""

import tensorstore as ts

from tda.store.location import Location, StoreError


def metadata(shape: list[int], dtype: str, chunk_rows: int, shard_rows: int) -> dict:
    """Returns zarr's metadata of an array that is cut into chunks and shards along its first axis.

    A row that was never written reads as NaN, or as 0 in an array of integers.
    """
    chunk, shard = ([rows, *shape[1:]] for rows in (chunk_rows, shard_rows))
    inner = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
    codec = {"chunk_shape": chunk, "codecs": inner}
    return {
        "shape": shape,
        "data_type": dtype,
        "fill_value": 0 if "int" in dtype else "NaN",
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": shard}},
        "codecs": [{"name": "sharding_indexed", "configuration": codec}],
    }


def open_array(location: Location, metadata: dict, create: bool = False) -> ts.TensorStore:
    """Opens an array, or creates it, in place of the one that may be there.

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
