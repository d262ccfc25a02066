"""Length-bucketed batches of a few fixed shapes: deterministic, and found by their number alone."""

import dataclasses
from collections.abc import Iterator

import numpy as np

from tda.data.tokens import TokenTable


@dataclasses.dataclass(frozen=True)
class Batch:
    """B sequences of T positions; position t holds token t and predicts token t + 1.

    Attributes:
        tokens: int32 [B, T], padded to the right.
        targets: int32 [B, T], the token after each.
        weights: float32 [B, T], 1 where the prediction carries a loss, 0 elsewhere (padding too).
        rows: int64 [R ≤ B], the table's rows that the first R sequences are; the rest is padding.
    """

    tokens: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    rows: np.ndarray

    def arrays(self) -> dict[str, np.ndarray]:
        """What a loss needs, as a pytree."""
        return {"tokens": self.tokens, "targets": self.targets, "weights": self.weights}


def buckets(context: int, ratio: float = 1.16, smallest: int = 8) -> tuple[int, ...]:
    """Padded lengths up to `context`: multiples of 8, each about `ratio` times the one before."""
    if context < 1:
        raise ValueError(f"context={context} must be positive")
    lengths = [min(smallest, context)]
    while lengths[-1] < context:
        longer = max(lengths[-1] + 8, -(-int(lengths[-1] * ratio) // 8) * 8)
        lengths.append(min(longer, context))
    return tuple(lengths)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which rows go into which batch: an index of batches, without their contents.

    Attributes:
        order: int64 [N], the rows, batch after batch.
        starts: int64 [batches + 1]; batch i holds `order[starts[i]:starts[i + 1]]`.
        lengths: int64 [batches], T of each.
        sizes: int64 [batches], B of each (a batch that is not full is padded up to it).
    """

    order: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    sizes: np.ndarray

    def __len__(self) -> int:
        return len(self.lengths)


def plan(
    positions: np.ndarray,
    bucket_lengths: tuple[int, ...],
    tokens_per_batch: int,
    multiple: int = 1,
    seed: int | None = None,
) -> Plan:
    """Groups sequences of like length into batches of about `tokens_per_batch` positions.

    Args:
        positions: int [N], positions of each sequence.
        bucket_lengths: the lengths T that batches may have, rising.
        tokens_per_batch: B × T of a batch at most (but at least `multiple` sequences).
        multiple: B is a multiple of this (the devices that the batch axis is split over).
        seed: shuffles sequences among the batches of a length, and the batches; None keeps order
            within a length and puts short batches first.

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
    which = np.searchsorted(bucket_lengths, positions)
    rows = np.arange(len(positions)) if rng is None else rng.permutation(len(positions))
    rows = rows[np.argsort(which[rows], kind="stable")]
    reached = np.cumsum(np.bincount(which, minlength=len(bucket_lengths)))
    starts, lengths, sizes = [], [], []
    first = 0
    for i, length in enumerate(bucket_lengths):
        size = max(1, tokens_per_batch // int(length) // multiple) * multiple
        waiting = int(reached[i]) - first
        # What does not fill a batch rolls over into the next length; only the last is partial.
        count = waiting // size if i + 1 < len(bucket_lengths) else -(-waiting // size)
        starts.append(first + size * np.arange(count))
        lengths.append(np.full(count, length))
        sizes.append(np.full(count, size))
        first = min(first + size * count, len(rows))
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


def materialise(table: TokenTable, rows: np.ndarray, length: int, size: int, pad: int) -> Batch:
    """The batch of `rows`, padded to `size` sequences of `length` positions."""
    if len(rows) > size:
        raise ValueError(f"{len(rows)} rows do not fit a batch of {size}")
    tokens = np.full((size, length + 1), pad, np.int32)
    scored = np.zeros((size, length + 1), np.float32)
    for i, row in enumerate(rows):
        begin, end = table.starts[row], table.starts[row + 1]
        tokens[i, : end - begin] = table.tokens[begin:end]
        scored[i, : end - begin] = table.scored[begin:end]
    return Batch(tokens[:, :-1], tokens[:, 1:], scored[:, 1:], np.asarray(rows, np.int64))


def batches(table: TokenTable, planned: Plan, pad: int, first: int = 0) -> Iterator[Batch]:
    """The batches of a plan from number `first` on."""
    for i in range(first, len(planned)):
        rows = planned.order[planned.starts[i] : planned.starts[i + 1]]
        yield materialise(table, rows, int(planned.lengths[i]), int(planned.sizes[i]), pad)
