"""Encoding a whole table of sequences: into memory, into a store, or as it is searched."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import jax
import numpy as np

from tda.data.batches import BatchLayout
from tda.data.tokens import TokenTable
from tda.gradients.encoder import Encoder, scored_positions
from tda.gradients.together import Together
from tda.runtime import processes, progress, sharding
from tda.store import Form, GradientStore, Rows, StoreError, valid

_SPAN_BYTES = 256 << 20


def encode_rows(
    encoder: Encoder,
    table: TokenTable,
    rows: np.ndarray,
    layout: BatchLayout,
    on_batch: Callable[[int], None] = lambda tokens: None,
) -> np.ndarray:
    """Projected gradients of some rows of a table, float32 [R, E]; see `encode_kinds`."""
    return encode_kinds(encoder, table, rows, layout, on_batch)[0]


def encode_kinds(
    encoder: Encoder | Together,
    table: TokenTable,
    rows: np.ndarray,
    layout: BatchLayout,
    on_batch: Callable[[int], None] = lambda tokens: None,
) -> list[np.ndarray]:
    """Projected gradients of some rows of a table, of every kind that the encoder gives.

    Args:
        encoder: the encoder.
        table: the sequences.
        rows: which of them.
        layout: how the rows are batched.
        on_batch: told the scored tokens of each batch when it is done.

    Returns:
        Of each kind float32 [R, E], in the order of `rows`.
    """
    rows = np.asarray(rows, np.int64)
    out = [np.empty((len(rows), kind.width), np.float32) for kind in encoder.layouts]
    waiting = None  # one batch is computed while the one before it is copied to the host
    for batch in layout.batches(table, rows):
        scored = scored_positions(batch.weights)
        encoded = encoder.all(layout.put(batch.arrays()), scored)
        if waiting is not None:
            _collect(out, waiting)
        waiting = (batch.places, encoded)
        on_batch(int(batch.weights.sum()))
    if waiting is not None:
        _collect(out, waiting)
    return out


def _collect(out: list[np.ndarray], done) -> None:
    places, encoded = done
    for rows_RxE, x_BxE in zip(out, encoded, strict=True):
        rows_RxE[places] = sharding.to_host(x_BxE)[: len(places)]


class OnTheFly:
    """A corpus whose gradients are computed as they are asked for: a source without a store.

    Args:
        encoder: the encoder.
        table: the corpus.
        layout: how rows are batched.
        span_rows: rows that are encoded together; by default as many as take 256 MiB, those of a
            store's shard.
        on_batch: told the scored tokens of each batch when it is done.
    """

    def __init__(
        self,
        encoder: Encoder,
        table: TokenTable,
        layout: BatchLayout,
        span_rows: int = 0,
        on_batch: Callable[[int], None] = lambda tokens: None,
    ):
        self._encoder, self._table, self._layout = encoder, table, layout
        self._on_batch = on_batch
        self.form = Form("float32", tuple(s.stop - s.start for s in encoder.layout.slices))
        self._span = span_rows or max(1, _SPAN_BYTES // self.form.row_bytes)

    @property
    def rows(self) -> int:
        """C, the number of rows."""
        return len(self._table)

    def scan(self, step: int) -> Iterator[Rows]:
        """All rows in order, at most `step` at a time: one pass over the corpus."""
        for start in range(0, self.rows, self._span):
            numbers = np.arange(start, min(self.rows, start + self._span))
            x_RxE = self._encode(numbers, self._on_batch)
            found = Rows(start, x_RxE, None, valid(x_RxE))
            yield from (found[i : i + step] for i in range(0, len(numbers), step))

    def read(self, numbers) -> np.ndarray:
        """Some rows, float32 [R, E]; one with a number that is not finite is infinite."""
        return self._encode(np.asarray(numbers, np.int64))

    def _encode(self, numbers, on_batch=lambda tokens: None) -> np.ndarray:
        x_RxE = encode_rows(self._encoder, self._table, numbers, self._layout, on_batch)
        x_RxE[~np.isfinite(x_RxE).all(axis=1)] = np.inf
        return x_RxE


def fill_store(
    store: GradientStore,
    encoder: Encoder | None,
    table: TokenTable,
    layout: BatchLayout,
    what: str = "encode",
    quiet: bool = False,
) -> None:
    """Encodes the rows of every shard that the store lacks; killed, it goes on where it stopped.

    Of several processes each writes shards of its own. Where the mesh is one process's alone, it
    encodes those alone too; where the mesh spans processes, all encode every shard together.

    Args:
        store: one row for each of the table's sequences.
        encoder: the encoder; not needed where the store lacks nothing.
        table: the corpus.
        layout: how rows are batched, and the devices that a batch is split over.
        what: name of the work in the progress bar.
        quiet: shows no progress.

    Raises:
        StoreError: the table has another number of rows, or a shard cannot be written.
    """
    fill_stores([store], encoder, table, layout, what, quiet)


def fill_stores(
    stores: list[GradientStore],
    encoder: Encoder | Together | None,
    table: TokenTable,
    layout: BatchLayout,
    what: str = "encode",
    quiet: bool = False,
) -> None:
    """Fills several stores of the same corpus in one pass over it; see `fill_store`.

    Args:
        stores: one for each kind of gradients that the encoder gives, whose shards have the same
            rows. What some lack is encoded for all, and written where it is lacking.
        encoder, table, layout, what, quiet: as for `fill_store`.

    Raises:
        StoreError: as `fill_store`, or the stores' shards differ.
    """
    for store in stores:
        if store.rows != len(table):
            raise StoreError(f"{store.path} has {store.rows} rows, the corpus {len(table)}")
    shards = stores[0].shards()
    for store in stores[1:]:
        if store.shards() != shards:
            raise StoreError(f"the shards of {store.path} are not those of {stores[0].path}")
    # A process that came later might find shards that another has written since.
    lacking = processes.on_first_process("list the shards", lambda: [s.missing() for s in stores])
    missing = sorted(set().union(*lacking))
    me, count = jax.process_index(), jax.process_count()
    together = not sharding.is_local(layout.mesh)
    mine = missing if together else missing[me::count]
    tokens = [int(table.scored[table.starts[s.start] : table.starts[s.stop]].sum()) for s in shards]
    if len(mine):
        done = sum(tokens) - sum(tokens[i] for i in missing)
        total = done + sum(tokens[i] for i in mine)
        with (
            progress.bar(total, what, "token", done, quiet) as bar,
            _Writing(stores, lacking, what, bar) as out,
        ):
            for turn, i in enumerate(mine):
                rows = np.arange(shards[i].start, shards[i].stop)
                encoded = encode_kinds(encoder, table, rows, layout, bar.update)
                if not together or turn % count == me:
                    out.write(int(i), encoded)
    if not together:
        for store in stores:
            _await(store)
    processes.wait_for_all("shards written")


class _Writing:
    """Writes a shard while the next is encoded."""

    def __init__(self, stores: list[GradientStore], lacking: list[list[int]], what: str, bar):
        self._stores, self._lacking, self._what, self._bar = stores, lacking, what, bar
        self._thread, self._waiting = ThreadPoolExecutor(1, "write"), None

    def __enter__(self):
        return self

    def __exit__(self, *error):
        with self._thread:
            self._finish()

    def write(self, shard: int, encoded: list[np.ndarray]) -> None:
        """Begins to write a shard of every store, when the one before it is written."""
        self._finish()
        self._waiting: Future = self._thread.submit(self._write, shard, encoded)

    def _write(self, shard: int, encoded: list[np.ndarray]) -> list[str]:
        invalid = []
        for store, lacking, rows_RxE in zip(self._stores, self._lacking, encoded, strict=True):
            if shard in lacking:
                invalid += store.write(shard, rows_RxE)
        return list(dict.fromkeys(invalid))

    def _finish(self) -> None:
        if self._waiting is not None:
            waiting, self._waiting = self._waiting, None
            invalid = waiting.result()
            if invalid:
                self._bar.write(_told(self._what, invalid))


def _await(store: GradientStore) -> None:
    """Waits for the other processes' shards, however much longer these take."""
    seconds = 0.05
    while store.missing():
        time.sleep(seconds)
        seconds = min(2 * seconds, 30.0)


def _told(what: str, invalid: list[str]) -> str:
    named = ", ".join(invalid[:5]) + (" …" if len(invalid) > 5 else "")
    return f"{what}: {len(invalid)} gradients are not finite, of {named}; they are never retrieved"
