"""What tracing costs, by counting: floating-point operations, and bytes on disk and in memory.

A product of a row of M numbers and an M × N matrix counts as 2·M·N operations. Only products of
matrices are counted: the rest is little beside them. `benchmarks.pod` asks the compiler for an
encoder's memory instead, and `tda.plan.calibration` measures how long these operations take.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping

import numpy as np

from tda.data import batches

# Bytes of a number in a store, and whether a block of a row has a float32 scale beside it.
NUMBER_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}
_SCALE_BYTES = {"float32": 0, "bfloat16": 0, "int8": 4}

# Products of queries with keys, and the like, that a position takes part in: two forward (scores,
# mixing), and five backward (scores again, and the gradients of probabilities, q, k and v).
_ATTENTION_FORWARD, _ATTENTION_BACKWARD = 2, 5


@dataclasses.dataclass(frozen=True)
class Matrix:
    """Weight matrices of one shape.

    Attributes:
        rows, columns: M and N.
        count: how many there are.
        looked_up: rows are looked up by number (an embedding), so that there is no product.
    """

    rows: int
    columns: int
    count: int = 1
    looked_up: bool = False

    @property
    def numbers(self) -> int:
        """Numbers in all of them."""
        return self.rows * self.columns * self.count


@dataclasses.dataclass(frozen=True)
class Model:
    """What a position of a sequence is multiplied by.

    Attributes:
        layers: the matrices of the layers.
        outside: the others, such as the output head.
        attention: width of all layers' queries: layers × heads × the width of a head.
        recomputed: the layers' forward pass is run again in the backward pass.
    """

    layers: tuple[Matrix, ...]
    outside: tuple[Matrix, ...]
    attention: int
    recomputed: bool = False


@dataclasses.dataclass(frozen=True)
class Taps:
    """How gradients are corrected and projected.

    Attributes:
        matrices: those whose gradients are taken.
        side: k of the projection.
        rank: outer products of a scale that are folded into the projections.
        exact: the scale is one number for every weight (exact Adam).
    """

    matrices: tuple[Matrix, ...]
    side: int
    rank: int = 1
    exact: bool = False


def products(matrices: Iterable[Matrix]) -> int:
    """Operations of one position through all matrices: 2·M·N of each that is not looked up."""
    return sum(2 * m.numbers for m in matrices if not m.looked_up)


def attention_operations(model: Model, context: float) -> float:
    """Operations of one position's attention, forward and backward.

    Args:
        model: the model.
        context: keys that a position meets on average: (T + 1) / 2 of T positions.
    """
    times = _ATTENTION_FORWARD * (1 + model.recomputed) + _ATTENTION_BACKWARD
    return times * 2 * model.attention * context


def model_operations(model: Model, context: float) -> float:
    """Operations of one position, forward and backward, without any weight gradient: about 4·N.

    Args:
        model: the model.
        context: as `attention_operations` takes it.
    """
    layers = (2 + model.recomputed) * products(model.layers)
    return layers + 2 * products(model.outside) + attention_operations(model, context)


def tap_operations(taps: Taps) -> int:
    """Operations of one position for the projected gradients.

    Each matrix's input is multiplied by A and its output's gradient by B, 2·k·(M + N), and their
    outer products are added up, 2·k². An exact scale needs the weight gradient instead, 2·M·N, but
    for looked-up rows.
    """
    total = 0
    for m in taps.matrices:
        width = taps.side * taps.rank
        if taps.exact and not m.looked_up:
            each = 2 * m.rows * m.columns
        else:
            ends = m.columns if m.looked_up else m.rows + m.columns
            each = 2 * width * ends + 2 * taps.side * width
        total += m.count * each
    return total


def example_operations(taps: Taps) -> int:
    """Operations of one example however long it is: an exact scale's AᵀGB, 2·k·M·N + 2·k²·M."""
    k, matrices = taps.side, [m for m in taps.matrices if taps.exact and not m.looked_up]
    return sum(2 * k * m.numbers + 2 * k * k * m.rows * m.count for m in matrices)


def encoding_operations(model: Model, taps: Iterable[Taps], shapes: Mapping[tuple, float]) -> float:
    """Operations of encoding a corpus in one pass, padding included.

    Args:
        model: the model.
        taps: what is taken of it, for each kind of gradients.
        shapes: how many batches there are of B examples of T positions, by (B, T).
    """
    taps = tuple(taps)
    alone, per_position = sum(map(example_operations, taps)), sum(map(tap_operations, taps))
    total = 0.0
    for (examples, positions), count in shapes.items():
        each = model_operations(model, (positions + 1) / 2) + per_position
        total += count * examples * (positions * each + alone)
    return total


def batch_shapes(
    positions: np.ndarray,
    bucket_lengths: tuple[int, ...],
    tokens_per_batch: int,
    multiple: int,
    shard_rows: int,
) -> dict[tuple[int, int], int]:
    """How many batches of each shape (B, T) a corpus is encoded in, shard by shard.

    Args:
        positions: of each passage, in the corpus's order.
        bucket_lengths, tokens_per_batch, multiple: as `tda.data.batches.plan` takes them.
        shard_rows: passages in a shard of the store.
    """
    counts: dict[tuple[int, int], int] = {}
    for first in range(0, len(positions), shard_rows):
        shard = positions[first : first + shard_rows]
        planned = batches.plan(shard, bucket_lengths, tokens_per_batch, multiple)
        for size, length in zip(planned.sizes.tolist(), planned.lengths.tolist(), strict=True):
            counts[size, length] = counts.get((size, length), 0) + 1
    return dict(sorted(counts.items(), key=lambda item: item[0][1]))


def row_bytes(widths: Iterable[int], dtype: str) -> int:
    """Bytes of a gradient on disk: its numbers, and for int8 a float32 scale for each block.

    Args:
        widths: numbers in each block.
        dtype: "float32", "bfloat16" or "int8".

    Raises:
        ValueError: an unknown dtype.
    """
    widths = list(widths)
    if dtype not in NUMBER_BYTES:
        raise ValueError(f"unknown dtype {dtype!r}; use {', '.join(NUMBER_BYTES)}")
    return sum(widths) * NUMBER_BYTES[dtype] + len(widths) * _SCALE_BYTES[dtype]


def code_bytes(width: int) -> int:
    """Bytes of a row's asymmetric hash: 4 bits for every 2 dimensions (Guo et al. 2020, ScaNN)."""
    return math.ceil(math.ceil(width / 2) / 2)


def gram_operations(widths: Iterable[int], rows: int) -> int:
    """Operations of adding ΦᵀΦ up over rows, block by block; whitening each row takes as many."""
    return 2 * rows * sum(w * w for w in widths)


def score_operations(width: int, rows: int, queries: int) -> int:
    """Operations of the products of every row with every query."""
    return 2 * rows * width * queries


def eigen_operations(widths: Iterable[int]) -> int:
    """Operations of all eigenvalues and vectors of R: about 9·E_b³ (Golub & Van Loan 2013, 8.3)."""
    return sum(9 * w**3 for w in widths)


def r_bytes(widths: Iterable[int], number: int = 8) -> int:
    """Bytes of R, block-diagonal, of numbers of so many bytes: float64 by default."""
    return sum(number * w * w for w in widths)


def eigen_bytes(width: int) -> int:
    """Bytes that the eigendecomposition of one block takes beside R: 28·E_b².

    A scaled copy in float64, two in float32 (one is the solver's own), the vectors, and two more
    matrices as the solver's work space (LAPACK's syevd: 1 + 6·n + 2·n² numbers).
    """
    return (8 + 2 * 4 + 4 + 2 * 4) * width * width


def hessian_bytes(widths: Iterable[int], matrices: int, roots: int) -> int:
    """Bytes of memory at the most for R: what is kept, and the largest block's decomposition.

    Args:
        widths: numbers in each block.
        matrices: how many R there are (of passages, of queries), float64.
        roots: how many R^(−1/2) are stored, float32.
    """
    widths = list(widths)
    stored = matrices * r_bytes(widths) + roots * r_bytes(widths, 4)
    return stored + eigen_bytes(max(widths))


def held_bytes(parameters: int, tapped: Iterable[Matrix], width: int, exact: bool) -> int:
    """Bytes of what encoding holds for every batch: parameters, projections and exact scales.

    Args:
        parameters: numbers in the model; float32.
        tapped: the matrices whose gradients are taken.
        width: columns of A and of B: side × rank.
        exact: a scale is held for every weight.
    """
    tapped = list(tapped)
    ends = sum(width * (m.rows + m.columns) * m.count for m in tapped)
    return 4 * (parameters + ends + exact * sum(m.numbers for m in tapped))


def lacking(needs: Mapping[str, tuple[float, float | None]]) -> list[str]:
    """What does not fit, in sentences.

    Args:
        needs: bytes needed and bytes available, None where that is not known, by name.
    """
    return [
        f"{name}: {as_bytes(needed)} needed, {as_bytes(available)} there"
        for name, (needed, available) in needs.items()
        if available is not None and needed > available
    ]


def as_bytes(count: float) -> str:
    """A number of bytes to read: "87.0 TiB"."""
    units = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
    power = min(int(math.log(max(count, 1), 1024)), len(units) - 1)
    return f"{count:.0f} B" if power == 0 else f"{count / 1024**power:,.1f} {units[power]}"
