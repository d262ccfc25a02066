"""Measures how fast this machine encodes and multiplies, with random weights and tokens.

A computation takes as long with random numbers as with real ones.
"""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from tda.data.batches import BatchLayout
from tda.data.tokens import TokenTable
from tda.encoding import table as encoding
from tda.gradients import sites
from tda.gradients.encoder import Encoder
from tda.gradients.moments.scales import Scale, parse_correction
from tda.runtime import host_blas, progress, sharding

# Shapes of batches that are measured: compiling each takes seconds, and the time of a position
# changes little between neighbouring lengths.
_SHAPES = 6
# The median of five rounds ignores two that other programs disturbed.
_ROUNDS = 5
# Long enough for the overhead of a call and the clock's resolution to be negligible.
_SECONDS_A_TURN = 0.4


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes that a compiled computation needs on each device."""

    arguments: int
    """Parameters, projections, scales and the batch."""
    outputs: int
    temporary: int

    @property
    def total(self) -> int:
        """Bytes on each device in all."""
        return self.arguments + self.outputs + self.temporary


def memory_of(compiled) -> Memory:
    """Returns a computation's memory as the compiler states it."""
    m = compiled.memory_analysis()
    # An output in a donated argument's buffer needs none of its own.
    outputs = m.output_size_in_bytes - m.alias_size_in_bytes
    return Memory(m.argument_size_in_bytes, outputs, m.temp_size_in_bytes)


@dataclasses.dataclass(frozen=True)
class EncoderTimes:
    """Measured times of an encoder on this machine."""

    compile: float
    """Mean seconds to compile one shape of batch."""
    position: dict[int, float]
    """Seconds per position, padding included, by rising T."""
    memory: int
    """Bytes on each device for the largest batch, as the compiler states them."""

    def seconds(self, shapes: Mapping[tuple[int, int], float]) -> float:
        """Returns the seconds for a number of batches of each shape (B, T)."""
        lengths, times = list(self.position), list(self.position.values())
        running = sum(
            count * examples * positions * float(np.interp(positions, lengths, times))
            for (examples, positions), count in shapes.items()
        )
        return running + self.compile * len(shapes)


@dataclasses.dataclass(frozen=True)
class ProductTimes:
    """FLOP/s of one device in the work on a store."""

    gram: float
    """ΦᵀΦ of a block, and whitening."""
    scores: float
    """Products of rows with queries."""
    eigen: float
    """Eigendecomposition, counted as in `tda.plan.cost.eigen_operations`."""


def ones(chosen: list[sites.Site], correction: str) -> dict[str, Scale] | None:
    """Returns 1/√V = 1 for every site, in the correction's form."""
    name, rank = parse_correction(correction)
    if name == "none":
        return None
    scales = {}
    for s in chosen:
        if name == "adam":
            scales[s.path] = Scale(full=jnp.ones((*s.stack_shape, s.rows, s.columns)))
        else:
            left, right = ((*s.stack_shape, rank or 1, n) for n in (s.rows, s.columns))
            scales[s.path] = Scale(jnp.ones(left), jnp.ones(right))
    return scales


def measured_shapes(shapes: Mapping[tuple[int, int], float], most: int = _SHAPES) -> list[tuple]:
    """Returns the shapes (B, T) to measure: `most` of them, spread evenly over the lengths."""
    listed = sorted(shapes, key=lambda shape: shape[1])
    at = np.linspace(0, len(listed) - 1, min(most, len(listed))).round().astype(int)
    return [listed[i] for i in at]


def encoder_times(
    encoder: Encoder,
    shapes: Mapping[tuple[int, int], float],
    vocab_size: int,
    mesh: jax.sharding.Mesh | None = None,
    rounds: int = _ROUNDS,
) -> EncoderTimes:
    """Compiles an encoder for the shapes of a corpus's batches, and times it on random tokens.

    Each shape is timed in `rounds` turns; the median counts. Batches are split over the mesh.
    """
    chosen = measured_shapes(shapes)
    compiled, seconds, memory = {}, [], 0
    with progress.bar(len(chosen) * (1 + rounds), "calibrate the encoder", "step") as bar:
        for shape in chosen:
            started = time.perf_counter()
            batch = _batch(*shape, mesh)
            executable = encoder.compiled.lower(encoder.arrays, batch, None).compile()
            seconds.append(time.perf_counter() - started)
            compiled[shape] = executable
            memory = max(memory, memory_of(executable).total)
            bar.update()

        def call(arrays, batch, scored, forms):
            return compiled[batch["tokens"].shape](arrays, batch)

        # An encoder that runs the programs compiled above, so that its first call does not compile.
        ready = dataclasses.replace(encoder, compiled=call)
        turns = {s: _turn(ready, *s, vocab_size, mesh) for s in chosen}
        seconds_by_shape = {s: [] for s in chosen}
        # In turns, so that a busy spell of the machine slows all shapes alike.
        for _ in range(rounds):
            for shape, turn in turns.items():
                seconds_by_shape[shape].append(turn())
                bar.update()
    position = {T: statistics.median(seconds_by_shape[B, T]) / (B * T) for B, T in chosen}
    return EncoderTimes(statistics.mean(seconds), position, memory)


def _batch(examples: int, positions: int, mesh) -> dict:
    """Returns an empty batch, laid out as `tda.encoding.table` passes it to the encoder."""
    names = {"tokens": np.int32, "targets": np.int32, "weights": np.float32}
    arrays = {k: np.zeros((examples, positions), dtype) for k, dtype in names.items()}
    return arrays if mesh is None else sharding.put_batch(mesh, arrays)


def _turn(encoder: Encoder, examples, positions, vocab_size, mesh) -> Callable[[], float]:
    """Returns a function that encodes a few full batches and returns the seconds of one."""
    layout = BatchLayout((positions,), examples * positions, 0, mesh)

    def run(batches: int) -> float:
        table = random_table(batches * examples, positions, vocab_size)
        started = time.perf_counter()
        encoding.encode_kinds(encoder, table, np.arange(len(table)), layout)
        return (time.perf_counter() - started) / batches

    run(1)  # the first run touches its memory for the first time
    batches = min(64, max(2, math.ceil(_SECONDS_A_TURN / run(1))))
    return lambda: run(batches)


def random_table(rows: int, positions: int, vocab_size: int) -> TokenTable:
    """Returns sequences of random tokens, all scored but the first of each."""
    # T positions predict the T tokens after the first.
    length = positions + 1
    tokens = np.random.default_rng(0).integers(vocab_size, size=rows * length, dtype=np.int32)
    scored = np.arange(rows * length) % length > 0
    starts = length * np.arange(rows + 1, dtype=np.int64)
    return TokenTable(range(rows), range(rows), tokens, starts, scored)


def product_times(width: int, block: int, queries: int) -> ProductTimes:
    """Times the products of R and of exact search, and a small eigendecomposition.

    Args:
        width: E, the numbers in an encoding.
        block: the numbers in its largest block.
        queries: Q, the queries of a search.
    """
    # A chunk of rows of at most 64 MiB.
    rows = max(1, min(4096, 2**26 // (4 * width)))
    # A slice of a very wide encoding, or of very many queries, has the same rate.
    rng = np.random.default_rng(0)
    block, width, queries = min(block, 4096), min(width, 8192), min(queries, 4096)
    side = min(block, 1024)
    x_RxE, q_QxE = (rng.normal(size=(n, width)).astype(np.float32) for n in (rows, queries))
    b_RxB = jnp.asarray(rng.normal(size=(rows, block)).astype(np.float32))
    s_NxN = np.asarray(b_RxB[:side, :side])
    # R's blocks are decomposed one on each core at a time.
    alike = [s_NxN.T @ s_NxN] * host_blas.cores()
    work = {
        "gram": (lambda: _product(b_RxB.T, b_RxB), 2 * rows * block * block),
        "scores": (lambda: _product(q_QxE, x_RxE.T), 2 * queries * rows * width),
        "eigen": (lambda: host_blas.map_blocks(np.linalg.eigh, alike), 9 * side**3 * len(alike)),
    }
    rates = {}
    with progress.bar(len(work), "calibrate products", "step") as bar:
        for name, (run, operations) in work.items():
            jax.block_until_ready(run())
            rates[name] = operations / statistics.median(_timed(run) for _ in range(_ROUNDS))
            bar.update()
    return ProductTimes(**rates)


@jax.jit
def _product(a, b):
    # As in R's sums and the search: TPUs multiply several times faster at their default precision.
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def _timed(run) -> float:
    started = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - started
