"""Encodes a whole table of sequences: into memory, into a store, or while it is searched."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import jax
import numpy as np

from tda.data.batches import BatchLayout
from tda.data.tokens import TokenTable
from tda.gradients.encoder import Encoder, scored_positions
from tda.runtime import code_version, preemption, processes, progress, sharding
from tda.runtime.differences import as_text, differences, shorten
from tda.runtime.engine import PROCESSES, Engine, Work
from tda.store import Form, GradientStore, Rows, StoreError, codec, valid

# As many bytes as a shard of a store has by default.
_SPAN_BYTES = 256 << 20
# Rows that are encoded again if other code began a store: few enough to share a batch.
_COMPARED_ROWS = 4
# The largest distance between two encodings of a row, as a share of its norm less what storing
# takes off, that rounding explains. Products in bfloat16 are off by 2^-9 each, and other shapes of
# batches or versions of XLA sum them in another order. At 3 % the cosine of the two is 0.9995, and
# no ranking changes; another projection, loss or correction moves a row by tens of per cent.
_ROUNDING = 0.03


def encode_rows(
    encoder: Encoder,
    table: TokenTable,
    rows: np.ndarray,
    layout: BatchLayout,
    on_batch: Callable[[int], None] = lambda tokens: None,
) -> np.ndarray:
    """Returns projected gradients of some rows of a table, float32 [R, E]; see `encode_kinds`."""
    return encode_kinds(encoder, table, rows, layout, on_batch)[0]


def encode_kinds(
    encoder: Encoder,
    table: TokenTable,
    rows: np.ndarray,
    layout: BatchLayout,
    on_batch: Callable[[int], None] = lambda tokens: None,
    forms: tuple[Form, ...] | None = None,
) -> list[np.ndarray]:
    """Returns projected gradients of some rows of a table, of every kind that the encoder computes.

    Args:
        encoder: the encoder.
        table: the sequences.
        rows: numbers of the rows to encode, [R].
        layout: how the rows are batched, and the devices that a batch is split over.
        on_batch: called after each batch with its number of scored tokens.
        forms: how each kind is stored; None for float32.

    Returns:
        For each kind of gradients float32 [R, E], or rows as stored, in the order of `rows`.
    """
    rows = np.asarray(rows, np.int64)
    if forms is None:
        out = [np.empty((len(rows), kind.width), np.float32) for kind in encoder.layouts]
    else:
        out = [np.empty((len(rows), form.columns), form.array_dtype) for form in forms]
    # JAX runs asynchronously: a batch is computed while the one before is copied to the host.
    waiting = None
    for batch in layout.batches(table, rows):
        scored = scored_positions(batch.weights)
        encoded = encoder.encode_all(layout.put(batch.arrays()), scored, forms)
        if waiting is not None:
            _collect(out, waiting)
        waiting = (batch.places, encoded)
        on_batch(int(batch.weights.sum()))
    if waiting is not None:
        _collect(out, waiting)
    return out


def _collect(out: list[np.ndarray], batch) -> None:
    """Copies a batch's gradients, without those of padding, to the places of its rows."""
    places, encoded = batch
    for of_kind, x in zip(out, encoded, strict=True):
        of_kind[places] = sharding.to_host(x)[: len(places)]


def mark_invalid(x_RxE: np.ndarray, id_of: Callable[[int], str]) -> None:
    """Makes rows with a number that is not finite infinite throughout, and warns of them.

    Args:
        x_RxE: gradients, changed in place.
        id_of: returns the id of a row's passage.
    """
    invalid = np.flatnonzero(~np.isfinite(x_RxE).all(axis=1)).tolist()
    if invalid:
        x_RxE[invalid] = np.inf
        warnings.warn(_describe_invalid([id_of(row) for row in invalid]), stacklevel=2)


def _describe_invalid(ids: Sequence[str]) -> str:
    return (
        f"the gradients of {len(ids)} passages are not finite, so they are never retrieved: "
        f"{shorten(ids, 5)}"
    )


class OnTheFly:
    """A corpus without a store, whose gradients are computed whenever they are read.

    Args:
        encoder: the encoder.
        table: the corpus.
        layout: how rows are batched.
    """

    def __init__(self, encoder: Encoder, table: TokenTable, layout: BatchLayout):
        self._encoder, self._table, self._layout = encoder, table, layout
        self.form = Form("float32", tuple(s.stop - s.start for s in encoder.layout.slices))
        # Rows that are planned and encoded at a time.
        self._span = max(1, _SPAN_BYTES // self.form.row_bytes)

    @property
    def rows(self) -> int:
        """C, the number of rows."""
        return len(self._table)

    def scan(self, step: int, rows: range | None = None) -> Iterator[Rows]:
        """Yields a range of rows in order, at most `step` at a time: one pass over the corpus."""
        rows = range(self.rows) if rows is None else rows
        for start in rows[:: self._span]:
            numbers = np.arange(start, min(rows.stop, start + self._span))
            x_RxE = self.read(numbers)
            preemption.check()
            span = Rows(start, x_RxE, valid(x_RxE))
            yield from (span[i : i + step] for i in range(0, len(numbers), step))

    def read(self, numbers) -> np.ndarray:
        """Returns some rows, float32 [R, E]; a row with a number that is not finite is infinite."""
        x_RxE = encode_rows(self._encoder, self._table, numbers, self._layout)
        mark_invalid(x_RxE, lambda row: self._table.ids[int(numbers[row])])
        return x_RxE


def fill_stores(
    stores: list[GradientStore],
    encoder: Encoder | None,
    table: TokenTable,
    layout: BatchLayout,
    description: str = "encode",
    engine: Engine = PROCESSES,
) -> None:
    """Encodes the rows of every shard that one of the stores lacks; resumes after a kill.

    Every process writes shards of its own. If each has a mesh of its own devices, it also encodes
    its shards alone; if the mesh spans processes, all of them encode every shard together.

    Args:
        stores: for each kind of gradients that the encoder computes a store, with one row for each
            of the table's sequences; their shards have the same rows. A shard is encoded for all,
            and written to those that lack it.
        encoder: the encoder; None if no store lacks a shard.
        table: the corpus.
        layout: how rows are batched, and the devices that a batch is split over.
        description: the name of the work in the progress bar.
        engine: who encodes which shard.

    Raises:
        StoreError: the table has another number of rows, the stores' shards differ, a shard cannot
            be written, or other code has stored rows that this code encodes otherwise.
    """
    processes.check_same_code()
    for store in stores:
        if store.rows != len(table):
            raise StoreError(f"{store.path} has {store.rows} rows, the corpus {len(table)}")
    shards = stores[0].shards()
    for store in stores[1:]:
        if store.shards() != shards:
            raise StoreError(f"the shards of {store.path} are not those of {stores[0].path}")
    # Only process 0 looks: a process that looked later might see new shards of another, and the
    # processes would no longer agree on who writes which.
    lacking = processes.on_first_process("list the shards", lambda: [s.missing() for s in stores])
    missing = sorted(set().union(*lacking))
    if encoder is not None:
        _check_stored_rows(stores, lacking, encoder, table, layout)
    process, count = jax.process_index(), jax.process_count()
    is_shared = not sharding.is_local(layout.mesh)
    tokens = [table.count_scored(s.start, s.stop) for s in shards]
    forms = tuple(store.form for store in stores)

    def compute(numbers: Sequence[int]) -> None:
        if not len(numbers):
            return
        done = sum(tokens) - sum(tokens[i] for i in missing)
        total = done + sum(tokens[i] for i in numbers)
        with (
            progress.bar(total, description, "token", done, saves_work=True) as bar,
            _Writer(stores, lacking, description, bar) as writer,
        ):
            for turn, i in enumerate(numbers):
                rows = np.arange(shards[i].start, shards[i].stop)
                encoded = encode_kinds(encoder, table, rows, layout, bar.update, forms)
                if not is_shared or turn % count == process:
                    writer.write(int(i), encoded)
                # If preempted, the writer's exit writes the waiting shard. Processes that encode a
                # shard together must all leave after the same one.
                processes.check_preemption(is_shared)

    def list_missing() -> list[int]:
        return sorted(set().union(*(s.missing() for s in stores)))

    names = " and ".join(s.path.rpartition("/")[2] for s in stores)
    engine.compute(Work(f"encode {names}", compute, lambda: missing, list_missing, is_shared))
    processes.wait_for_all("shards written")


def check_stored_rows(
    store: GradientStore, encoder: Encoder, table: TokenTable, layout: BatchLayout
) -> None:
    """Checks that an encoder computes the same rows as the code that began a store.

    Rows of two versions of the code may not be comparable. If the version differs, a few rows are
    encoded again, and they decide. All processes of a run call it.

    Raises:
        StoreError: a row differs by more than rounding explains.
    """
    if store.manifest.get("code") != code_version.describe():
        lacking = processes.on_first_process("list the shards", store.missing)
        _check_stored_rows([store], [lacking], encoder, table, layout)


def _check_stored_rows(stores, lacking: list[list[int]], encoder, table, layout) -> None:
    code = code_version.describe()
    for kind, (store, missing) in enumerate(zip(stores, lacking, strict=True)):
        stored_code = store.manifest.get("code") or {}
        numbers = _comparable_rows(store, missing) if stored_code != code else np.zeros(0, np.int64)
        if not len(numbers):
            continue
        encoded_RxE = encode_kinds(encoder, table, numbers, layout)[kind]
        stored_RxE = store.read(numbers)
        anew = codec.encode_on_host(encoded_RxE, store.form)
        # Less what storing takes off every row.
        distances = np.linalg.norm(encoded_RxE - stored_RxE, axis=1) - np.linalg.norm(
            encoded_RxE - codec.decode_on_host(anew, store.form), axis=1
        )
        distances /= np.linalg.norm(stored_RxE, axis=1)
        # A NaN is not rounding either.
        worst = int(np.argmax(np.where(np.isnan(distances), np.inf, distances)))
        if not distances[worst] <= _ROUNDING:
            raise StoreError(
                f"{store.path} was begun by other code:{as_text(differences(stored_code, code))}\n"
                f"and this code's gradient of passage {table.ids[numbers[worst]]!r} is off by "
                f"{distances[worst]:.1%} of its norm more than storing explains; rounding explains "
                f"{_ROUNDING:.0%}. Resume with the code that began it, or remove the store to "
                "encode the corpus anew"
            )


def _comparable_rows(store: GradientStore, missing: list[int]) -> np.ndarray:
    """Returns a few rows of the first written shard, at even distances.

    Rows that are zero or not finite are left out: their norm cannot be compared with.
    """
    written = [rows for i, rows in enumerate(store.shards()) if i not in missing]
    if not written:
        return np.zeros(0, np.int64)
    rows = np.arange(written[0].start, written[0].stop)[: 16 * _COMPARED_ROWS]
    norms = np.linalg.norm(store.read(rows), axis=1)
    rows = rows[np.isfinite(norms) & (norms > 0)]
    return rows[np.linspace(0, len(rows) - 1, min(_COMPARED_ROWS, len(rows))).astype(np.int64)]


class _Writer:
    """Writes a shard in another thread while the next one is encoded."""

    def __init__(self, stores: list[GradientStore], lacking: list[list[int]], description, bar):
        self._stores, self._lacking = stores, lacking
        self._description, self._bar = description, bar
        self._thread = ThreadPoolExecutor(1, "write")
        self._waiting: Future | None = None

    def __enter__(self):
        return self

    def __exit__(self, *error):
        with self._thread:
            self._finish()

    def write(self, shard: int, encoded: list[np.ndarray]) -> None:
        """Starts writing a shard to every store that lacks it, after finishing the last one."""
        self._finish()
        self._waiting = self._thread.submit(self._write, shard, encoded)

    def _write(self, shard: int, encoded: list[np.ndarray]) -> list[str]:
        invalid = []
        for store, lacking, rows in zip(self._stores, self._lacking, encoded, strict=True):
            if shard in lacking:
                invalid += store.write(shard, rows)
        return list(dict.fromkeys(invalid))

    def _finish(self) -> None:
        if self._waiting is not None:
            waiting, self._waiting = self._waiting, None
            invalid = waiting.result()
            if invalid:
                self._bar.write(f"{self._description}: {_describe_invalid(invalid)}")
