"""Length-bucketed batches of a few fixed shapes: deterministic, and each built from its number.

A `BatchLayout` says how sequences are cut into batches; `BatchLayout.batches` plans them for some
rows of a table, and returns a sequence that builds batch i on demand.
"""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from tda.data.tokens import TokenTable
from tda.runtime import sharding


def draw(count: int, size: int, seed: int) -> np.ndarray:
    """Draws `size` of `count` row numbers, ascending; all of them if `size` is 0 or too large."""
    if not size or size >= count:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).permutation(count)[:size])


@dataclasses.dataclass(frozen=True)
class Batch:
    """B sequences of T positions; position t holds token t and predicts token t + 1.

    Attributes:
        tokens: int32 [B, T], padded to the right.
        targets: int32 [B, T], the token after each.
        weights: float32 [B, T], 1 where the prediction carries a loss, 0 elsewhere (padding too).
        rows: int64 [R ≤ B], the table's rows of the first R sequences; the rest is padding.
        places: int64 [R], the places of these rows among all the batched rows.
    """

    tokens: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    rows: np.ndarray
    places: np.ndarray

    def arrays(self) -> dict[str, np.ndarray]:
        """Returns the arrays that a loss needs, as a pytree."""
        return {"tokens": self.tokens, "targets": self.targets, "weights": self.weights}


def buckets(context: int, ratio: float = 1.16, smallest: int = 8) -> tuple[int, ...]:
    """Returns padded lengths up to `context`: multiples of 8, each about `ratio` times the last.

    Each length costs a compilation; a smaller ratio means more of them and less padding. 1.16 was
    measured on sentences of T-REx (benchmarks/lengths.py).
    """
    if context < 1:
        raise ValueError(f"context={context} must be positive")
    lengths = [min(smallest, context)]
    while lengths[-1] < context:
        longer = max(lengths[-1] + 8, -(-int(lengths[-1] * ratio) // 8) * 8)
        lengths.append(min(longer, context))
    return tuple(lengths)


@dataclasses.dataclass(frozen=True)
class Plan:
    """An index of batches: which sequences go into which batch, without their contents.

    Attributes:
        order: int64 [N], the sequences' numbers, batch after batch.
        starts: int64 [batches + 1]; batch i holds `order[starts[i]:starts[i + 1]]`.
        lengths: int64 [batches], T of each batch.
        sizes: int64 [batches], B of each batch (one that is not full is padded up to it).
    """

    order: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    sizes: np.ndarray

    def __len__(self) -> int:
        return len(self.lengths)

    def members(self, i: int) -> np.ndarray:
        """Returns the numbers of the sequences in batch i, int64 [R ≤ B]."""
        return self.order[self.starts[i] : self.starts[i + 1]]


def plan(
    positions: np.ndarray,
    bucket_lengths: tuple[int, ...],
    tokens_per_batch: int,
    multiple: int = 1,
    seed: int | None = None,
    spread: bool = False,
) -> Plan:
    """Groups sequences of similar length into batches of about `tokens_per_batch` positions.

    Args:
        positions: positions of each sequence, int [N].
        bucket_lengths, tokens_per_batch, spread: see `BatchLayout`.
        multiple: a divisor of every B (the number of devices that the batch axis is split over).
        seed: shuffles sequences among the batches of a length, and the batches; with None the
            order within a length is kept, and short batches come first.

    Raises:
        ValueError: a sequence is longer than the longest bucket.
    """
    positions = np.asarray(positions, np.int64)
    bucket_lengths = np.asarray(bucket_lengths, np.int64)
    if len(positions) and positions.max() > bucket_lengths[-1]:
        row = int(positions.argmax())
        raise ValueError(
            f"row {row} has {positions[row]} positions, the longest batch {bucket_lengths[-1]}"
        )
    rng = None if seed is None else np.random.default_rng(seed)
    longest = positions.max(initial=1)
    bucket_lengths = bucket_lengths[: 1 + np.searchsorted(bucket_lengths, longest)]
    bucket = np.searchsorted(bucket_lengths, positions)
    rows = np.arange(len(positions)) if rng is None else rng.permutation(len(positions))
    rows = rows[np.argsort(bucket[rows], kind="stable")]
    reached = np.cumsum(np.bincount(bucket, minlength=len(bucket_lengths)))
    starts, lengths, sizes = [], [], []
    first = 0
    for i, length in enumerate(bucket_lengths):
        size = max(1, tokens_per_batch // int(length) // multiple) * multiple
        waiting = int(reached[i]) - first
        if spread and waiting:
            each = -(-waiting // -(-waiting // size))
            size = -(-each // multiple) * multiple
        # Sequences that do not fill a batch move on to the next length; only the last is partial.
        is_last = spread or i + 1 == len(bucket_lengths)
        count = -(-waiting // size) if is_last else waiting // size
        starts.append(first + size * np.arange(count))
        lengths.append(np.full(count, length))
        sizes.append(np.full(count, size))
        first = min(first + size * count, int(reached[i]))
    starts, lengths, sizes = map(np.concatenate, (starts, lengths, sizes))
    ends = np.append(starts[1:], len(rows))[: len(starts)]
    if rng is not None:
        shuffled = rng.permutation(len(starts))
        pieces = [rows[starts[i] : ends[i]] for i in shuffled]
        rows = np.concatenate(pieces) if pieces else rows
        lengths, sizes = lengths[shuffled], sizes[shuffled]
        ends = np.cumsum((ends - starts)[shuffled])
    bounds = np.concatenate([[0], ends]).astype(np.int64)
    return Plan(rows, bounds, lengths.astype(np.int64), sizes.astype(np.int64))


def materialise(
    table: TokenTable,
    rows: np.ndarray,
    length: int,
    size: int,
    pad: int,
    places: np.ndarray | None = None,
) -> Batch:
    """Returns the batch of `rows`, padded to `size` sequences of `length` positions."""
    if len(rows) > size:
        raise ValueError(f"{len(rows)} rows do not fit a batch of {size}")
    tokens = np.full((size, length + 1), pad, np.int32)
    scored = np.zeros((size, length + 1), np.float32)
    for i, row in enumerate(rows):
        sequence, is_scored = table.sequence(row)
        tokens[i, : len(sequence)] = sequence
        scored[i, : len(sequence)] = is_scored
    places = np.arange(len(rows)) if places is None else places
    rows = np.asarray(rows, np.int64)
    return Batch(tokens[:, :-1], tokens[:, 1:], scored[:, 1:], rows, places)


class Batches(Sequence):
    """The batches of some rows of a table, each built on demand.

    Args:
        table: the sequences.
        rows: the rows that are batched, int64 [R].
        plan: which of `rows` go into which batch.
        pad: the padding token.
    """

    def __init__(self, table: TokenTable, rows: np.ndarray, plan: Plan, pad: int):
        self.plan = plan
        self._table, self._rows, self._pad = table, rows, pad

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, i: int) -> Batch:
        if not 0 <= i < len(self):
            raise IndexError(f"there is no batch {i}, there are {len(self)}")
        places = self.plan.members(i)
        length, size = int(self.plan.lengths[i]), int(self.plan.sizes[i])
        return materialise(self._table, self._rows[places], length, size, self._pad, places)


@dataclasses.dataclass(frozen=True)
class BatchLayout:
    """How sequences are cut into batches, and the devices that a batch is split over."""

    bucket_lengths: tuple[int, ...]
    """The lengths T that batches may have, ascending; each costs a compilation."""

    tokens_per_batch: int
    """The largest B × T of a batch (which has at least one sequence for each device)."""

    pad: int
    """The padding token; it never carries a loss."""

    mesh: jax.sharding.Mesh | None = None
    """The devices that the batch axis is split over; one device where None."""

    spread: bool = False
    """Whether a length's sequences are spread evenly over as few batches as hold them.

    This pads a few sequences least. Otherwise sequences that do not fill a batch move on to the
    next length, and all batches of a length have one size, whichever rows are planned."""

    @property
    def multiple(self) -> int:
        """The number that divides every B: the devices that the batch axis is split over."""
        return 1 if self.mesh is None else sharding.batch_devices(self.mesh)

    def batches(
        self, table: TokenTable, rows: np.ndarray | None = None, seed: int | None = None
    ) -> Batches:
        """Plans batches of some rows of a table.

        Args:
            table: the sequences.
            rows: the rows to batch; all of them by default.
            seed: see `plan`.

        Raises:
            ValueError: a row is longer than the longest bucket.
        """
        rows = np.arange(len(table)) if rows is None else np.asarray(rows, np.int64)
        planned = plan(
            table.lengths_of(rows) - 1,
            self.bucket_lengths,
            self.tokens_per_batch,
            self.multiple,
            seed,
            self.spread,
        )
        return Batches(table, rows, planned, self.pad)

    def padded_length(self, positions: int) -> int:
        """Returns the shortest length that holds this many positions."""
        return next(length for length in self.bucket_lengths if length >= positions)

    def put(self, arrays: dict[str, np.ndarray]) -> dict:
        """Splits the arrays of a batch over the mesh's devices.

        A batch that they do not divide is filled with sequences of padding, without a loss.
        """
        if self.mesh is None:
            return arrays
        lacking = -len(next(iter(arrays.values()))) % self.multiple
        if lacking:
            fill = dict.fromkeys(arrays, self.pad) | {"weights": 0}
            arrays = {
                k: np.pad(x, [(0, lacking), (0, 0)], constant_values=fill[k])
                for k, x in arrays.items()
            }
        return sharding.put_batch(self.mesh, arrays)
