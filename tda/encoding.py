"""Encoding a whole table of sequences: into memory (queries) or into a store (a corpus)."""

import time
from collections.abc import Callable

import jax
import numpy as np

from tda import processes, progress, sharding
from tda.data import batches as batching
from tda.data.tokens import TokenTable
from tda.gradients.encoder import Encoder, scored_positions
from tda.store import GradientStore


def encode_rows(
    encoder: Encoder,
    table: TokenTable,
    rows: np.ndarray,
    *,
    bucket_lengths: tuple[int, ...],
    tokens_per_batch: int,
    pad: int,
    mesh=None,
    on_batch: Callable[[int], None] = lambda tokens: None,
) -> np.ndarray:
    """Projected gradients of some rows of a table, float32 [R, E] in the order of `rows`.

    Args:
        encoder: the encoder.
        table: the sequences.
        rows: which of them.
        bucket_lengths, tokens_per_batch, pad: see `tda.data.batches`.
        mesh: the devices that a batch is split over; one device where None.
        on_batch: told the scored tokens of each batch when it is done.
    """
    rows = np.asarray(rows, np.int64)
    multiple = 1 if mesh is None else sharding.batch_devices(mesh)
    planned = batching.plan(
        table.lengths[rows] - 1, bucket_lengths, tokens_per_batch, multiple=multiple
    )
    out = np.empty((len(rows), encoder.layout.width), np.float32)
    waiting = None  # one batch is computed while the one before it is copied to the host
    for i in range(len(planned)):
        local = planned.order[planned.starts[i] : planned.starts[i + 1]]
        batch = batching.materialise(
            table, rows[local], int(planned.lengths[i]), int(planned.sizes[i]), pad
        )
        scored = scored_positions(batch.weights)
        arrays = batch.arrays()
        if mesh is not None:
            arrays = sharding.put_batch(mesh, arrays)
        encoded = encoder(arrays, scored)
        if waiting is not None:
            _collect(out, waiting)
        waiting = (local, encoded)
        on_batch(int(batch.weights.sum()))
    if waiting is not None:
        _collect(out, waiting)
    return out


def _collect(out: np.ndarray, done) -> None:
    local, encoded = done
    out[local] = sharding.to_host(encoded)[: len(local)]


def fill(
    store: GradientStore,
    encoder: Encoder,
    table: TokenTable,
    what: str = "encode",
    mesh=None,
    **layout,
) -> None:
    """Encodes the rows of every shard that the store lacks; killed, it goes on where it stopped.

    Of several processes each writes shards of its own. Where the mesh is one process's alone, it
    encodes those alone too; where the mesh spans processes, all encode every shard together.

    Args:
        store: one row for each of the table's sequences.
        encoder: the encoder.
        table: the corpus.
        what: name of the work in the progress bar.
        mesh: the devices that a batch is split over; one device where None.
        **layout: as for `encode_rows`.
    """
    shards = store.shards()
    # A process that came later might find shards that another has written since.
    missing = processes.by_first("list the shards", store.missing)
    me, count = jax.process_index(), jax.process_count()
    together = not sharding.is_local(mesh)
    mine = missing if together else missing[me::count]
    tokens = [int(table.scored[table.starts[s.start] : table.starts[s.stop]].sum()) for s in shards]
    if len(mine):
        done = sum(tokens) - sum(tokens[i] for i in missing)
        with progress.bar(done + sum(tokens[i] for i in mine), what, "token", done) as bar:
            for turn, i in enumerate(mine):
                rows = np.arange(shards[i].start, shards[i].stop)
                encoded = encode_rows(
                    encoder, table, rows, mesh=mesh, on_batch=bar.update, **layout
                )
                if together and turn % count != me:
                    continue
                invalid = store.write(int(i), encoded)
                if invalid:
                    bar.write(_told(what, invalid))
    if not together:
        _await(store)
    processes.wait_for_all("shards written")


def _await(store: GradientStore) -> None:
    """Waits for the other processes' shards, however much longer these take."""
    seconds = 0.05
    while store.missing():
        time.sleep(seconds)
        seconds = min(2 * seconds, 30.0)


def _told(what: str, invalid: list[str]) -> str:
    named = ", ".join(invalid[:5]) + (" …" if len(invalid) > 5 else "")
    return f"{what}: {len(invalid)} gradients are not finite, of {named}; they are never retrieved"
