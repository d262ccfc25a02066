"""What tracing costs, by counting: floating-point operations, and bytes on disk and in memory.

A product of a row of M numbers and an M × N matrix counts as 2·M·N operations. Only products of
matrices are counted: all else takes little time beside them. `benchmarks.pod` asks the compiler for
an encoder's memory instead, and `tda.plan.calibration` measures how long these operations take.
"""

import collections
import dataclasses
import math
from collections.abc import Iterable, Mapping

import numpy as np

from tda.data import batches
from tda.hessian import Shape

# Products of queries with keys, and the like, that a position takes part in: two forward (scores,
# mixing), and five backward (scores again, and the gradients of probabilities, q, k and v).
_ATTENTION_FORWARD, _ATTENTION_BACKWARD = 2, 5


@dataclasses.dataclass(frozen=True)
class Matrix:
    """Weight matrices of one shape, M × N."""

    rows: int
    columns: int
    count: int = 1
    looked_up: bool = False
    """Whether it is an embedding, whose rows are looked up without a product."""

    @property
    def numbers(self) -> int:
        """Numbers in all of them."""
        return self.rows * self.columns * self.count


@dataclasses.dataclass(frozen=True)
class Model:
    """The products that each position of a sequence takes part in."""

    layers: tuple[Matrix, ...]
    outside: tuple[Matrix, ...]
    """Matrices outside the layers, such as the output head."""
    attention: int
    """Layers × heads × the width of a head."""
    recomputed: bool = False
    """Whether the backward pass runs the layers' forward pass again."""


@dataclasses.dataclass(frozen=True)
class Taps:
    """How gradients are corrected and projected."""

    matrices: tuple[Matrix, ...]
    """The matrices whose gradients are taken."""
    side: int
    """k of the projection."""
    rank: int = 1
    """Outer products of 1/√V that are folded into the projections."""
    exact: bool = False
    """Whether 1/√V has a number for every weight (exact Adam)."""


def products(matrices: Iterable[Matrix]) -> int:
    """Returns the operations of one position through all matrices."""
    return sum(2 * m.numbers for m in matrices if not m.looked_up)


def attention_operations(model: Model, context: float) -> float:
    """Returns the operations of one position's attention, forward and backward.

    `context` is the mean number of keys that a position attends to: (T + 1) / 2 for T positions.
    """
    times = _ATTENTION_FORWARD * (1 + model.recomputed) + _ATTENTION_BACKWARD
    return times * 2 * model.attention * context


def model_operations(model: Model, context: float) -> float:
    """Returns the operations of one position, forward and backward: about 4 a parameter.

    `context` is as for `attention_operations`.
    """
    # Forward 2·M·N, and as many backward for the input's gradient; no weight gradient is formed.
    layers = (2 + model.recomputed) * products(model.layers)
    return layers + 2 * products(model.outside) + attention_operations(model, context)


def training_operations(model: Model, context: float) -> float:
    """Returns the operations of one position of a training step: about 6 a parameter.

    `context` is as for `attention_operations`.
    """
    weights = products(model.layers) + products(model.outside)
    return model_operations(model, context) + weights


def tap_operations(taps: Taps) -> int:
    """Returns the operations of one position for the projected gradients.

    Each matrix's input is multiplied by A and its output's gradient by B, 2·k·(M + N), and their
    outer products are added up, 2·k². An exact 1/√V needs the weight gradient instead, 2·M·N,
    except for looked-up rows.
    """
    total, width = 0, taps.side * taps.rank
    for m in taps.matrices:
        if taps.exact and not m.looked_up:
            total += 2 * m.numbers
        else:
            ends = m.columns if m.looked_up else m.rows + m.columns
            total += m.count * (2 * width * ends + 2 * taps.side * width)
    return total


def example_operations(taps: Taps) -> int:
    """Returns the operations of one example of any length: AᵀGB, 2·k·M·N + 2·k²·M, if exact."""
    k, matrices = taps.side, [m for m in taps.matrices if taps.exact and not m.looked_up]
    return sum(2 * k * m.numbers + 2 * k * k * m.rows * m.count for m in matrices)


def encoding_operations(model: Model, taps: Iterable[Taps], shapes: Mapping[tuple, float]) -> float:
    """Returns the operations of encoding a corpus in one pass, padding included.

    `taps` has one for each kind of gradients; `shapes`, by (B, T), the number of batches of B
    examples of T positions.
    """
    taps = tuple(taps)
    alone, per_position = sum(map(example_operations, taps)), sum(map(tap_operations, taps))
    total = 0.0
    for (examples, positions), count in shapes.items():
        each = model_operations(model, (positions + 1) / 2) + per_position
        total += count * examples * (positions * each + alone)
    return total


def pair_operations(matrices: Iterable[Matrix], positions: float, query_positions: float) -> float:
    """Returns the operations of one product of whole gradients (`tda.gradients.pair_products`).

    S·T·(M + N) a matrix with S positions of the passage and T of the query, or T·M·N; of a table
    S·T·N.
    """

    def each(m: Matrix) -> float:
        if m.looked_up:
            return positions * m.columns
        return min(positions * (m.rows + m.columns), m.rows * m.columns)

    return sum(2 * query_positions * m.count * each(m) for m in matrices)


def batch_shapes(
    positions: np.ndarray,
    bucket_lengths: tuple[int, ...],
    tokens_per_batch: int,
    multiple: int,
    shard_rows: int,
) -> dict[tuple[int, int], int]:
    """Returns the number of batches of each shape (B, T) that a corpus is encoded in, by rising T.

    Args:
        positions: positions of each passage, in the corpus's order.
        bucket_lengths, tokens_per_batch, multiple: as for `tda.data.batches.plan`.
        shard_rows: passages in a shard of the store.
    """
    counts: collections.Counter[tuple[int, int]] = collections.Counter()
    # A batch never spans two shards, so that a killed run loses at most one shard.
    for first in range(0, len(positions), shard_rows):
        shard = positions[first : first + shard_rows]
        planned = batches.plan(shard, bucket_lengths, tokens_per_batch, multiple)
        counts.update(zip(planned.sizes.tolist(), planned.lengths.tolist(), strict=True))
    return dict(sorted(counts.items(), key=lambda item: item[0][1]))


def code_bytes(width: int) -> int:
    """Returns the bytes of a row's code: 4 bits for every 2 dimensions (Guo et al. 2020, ScaNN)."""
    return math.ceil(math.ceil(width / 2) / 2)


def gram_operations(shapes: Iterable[Shape]) -> int:
    """Returns the operations of adding a row to R by block; whitening it takes as many.

    `shapes` are those of R's blocks (`tda.hessian.blocks`): 2·E_b² for (E_b,), a dense one;
    2·k₁·k₂·(k₁ + k₂) for (k₁, k₂), a Kronecker product.
    """
    return 2 * sum(math.prod(s) * sum(s) for s in shapes)


def score_operations(width: int, rows: int, queries: int) -> int:
    """Returns the operations of the products of every row with every query."""
    return 2 * rows * width * queries


def eigen_operations(shapes: Iterable[Shape]) -> int:
    """Returns the operations of R's eigenvectors: about 9·N³ (Golub & Van Loan 2013, 8.3)."""
    return sum(9 * n**3 for shape in shapes for n in shape)


def r_bytes(shapes: Iterable[Shape], number: int = 8) -> int:
    """Returns the bytes of block-diagonal R with numbers of `number` bytes, by default float64."""
    return sum(number * n * n for shape in shapes for n in shape)


def eigen_bytes(width: int) -> int:
    """Returns the bytes that eigendecomposition of an N × N matrix needs beside the matrix: 28·N².

    A scaled copy in float64, two in float32 (one is the solver's own), the vectors, and two more
    matrices as the solver's work space (LAPACK's syevd: 1 + 6·n + 2·n² numbers).
    """
    return (8 + 2 * 4 + 4 + 2 * 4) * width * width


def hessian_bytes(shapes: Iterable[Shape], matrices: int, roots: int) -> int:
    """Returns the peak bytes of memory for R: its blocks, and the largest decomposition.

    In memory are `matrices` (R of passages, R of queries) in float64, and `roots` in float32, with
    k₁·k₂ more numbers for the root of a Kronecker product.
    """
    shapes = list(shapes)
    scales = sum(4 * math.prod(s) for s in shapes if len(s) == 2)
    stored = matrices * r_bytes(shapes) + roots * (r_bytes(shapes, 4) + scales)
    return stored + eigen_bytes(max(n for shape in shapes for n in shape))


def held_bytes(parameters: int, tapped: Iterable[Matrix], width: int, exact: bool) -> int:
    """Returns the float32 bytes of parameters, projections and exact 1/√V while encoding.

    Args:
        parameters: numbers in the model.
        tapped: the matrices whose gradients are taken.
        width: columns of A and of B: side × rank.
        exact: whether 1/√V has a number for every weight.
    """
    tapped = list(tapped)
    ends = sum(width * (m.rows + m.columns) * m.count for m in tapped)
    return 4 * (parameters + ends + exact * sum(m.numbers for m in tapped))


def lacking(needs: Mapping[str, tuple[float, float | None]]) -> list[str]:
    """Describes what does not fit, given bytes needed and bytes available (None if unknown)."""
    return [
        f"{name}: {as_bytes(needed)} needed, {as_bytes(available)} available"
        for name, (needed, available) in needs.items()
        if available is not None and needed > available
    ]


def as_bytes(count: float) -> str:
    """Formats a number of bytes, such as "87.0 TiB"."""
    units = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
    power = min(int(math.log(max(count, 1), 1024)), len(units) - 1)
    return f"{count:.0f} B" if power == 0 else f"{count / 1024**power:,.1f} {units[power]}"
