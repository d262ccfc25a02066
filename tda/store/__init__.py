"""The gradient store: raw projected gradients on disk, with their passages.

    DIR/manifest.json           shape, blocks, and a fingerprint of the inputs of the rows
    DIR/withdrawn.json          rows that were withdrawn, if any
    DIR/0/gradients             zarr v3 array [C, E] of floats, or uint8 of codes and their scales
                                (`tda.store.codec`); one file a shard, each chunk with its CRC32C
    DIR/0/passages              id, document and text of every row (array_record)
    DIR/0/ids, DIR/0/documents  zarr v3 arrays: from the hash of a name to its row
    DIR/1/...                   the same for passages that were appended, and so on

A shard appears whole or not at all, so a killed run resumes with the missing shards. DIR
is local, `gs://` or `s3://`, and any zarr reader opens the arrays.
"""

from tda.store.codec import DTYPES, Form, decode
from tda.store.gradient_store import GradientStore
from tda.store.location import StoreError
from tda.store.making import (
    append,
    check_root,
    create,
    exists,
    finished,
    open_store,
    remove,
    withdrawn,
)
from tda.store.passages import Passage
from tda.store.rows import Rows, valid
