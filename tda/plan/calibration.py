"""How fast this machine encodes and multiplies: a few measurements with random weights and tokens.

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
from tda.gradients.moments.second_moments import Scale, parse_correction
from tda.runtime import host_blas, progress, sharding

# Of a corpus with more shapes of batches than this only some are measured.
_SHAPES = 6
_ROUNDS = 5
_SECONDS_A_TURN = 0.4


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes that a compiled computation needs on each device.

    Attributes:
        arguments: parameters, projections, scales and the batch.
        outputs: results.
        temporary: everything in between.
    """

    arguments: int
    outputs: int
    temporary: int

    @property
    def total(self) -> int:
        """Bytes on each device in all."""
        return self.arguments + self.outputs + self.temporary


def memory_of(compiled) -> Memory:
    """Returns the compiler's account of a computation; donated arguments are counted once."""
    m = compiled.memory_analysis()
    outputs = m.output_size_in_bytes - m.alias_size_in_bytes
    return Memory(m.argument_size_in_bytes, outputs, m.temp_size_in_bytes)


@dataclasses.dataclass(frozen=True)
class EncoderTimes:
    """What encoding takes on this machine.

    Attributes:
        compile: seconds to compile for a shape of batch, on average.
        position: seconds a position, padding included, by T of a batch; T rises.
        memory: bytes a device for the largest batch, by the compiler's account.
    """

    compile: float
    position: dict[int, float]
    memory: int

    def seconds(self, shapes: Mapping[tuple[int, int], float]) -> float:
        """Seconds for so many batches of each shape (B, T); each shape is compiled once."""
        lengths, times = list(self.position), list(self.position.values())
        running = sum(
            count * examples * positions * float(np.interp(positions, lengths, times))
            for (examples, positions), count in shapes.items()
        )
        return running + self.compile * len(shapes)


@dataclasses.dataclass(frozen=True)
class ProductTimes:
    """FLOP/s of one device in the work on a store.

    Attributes:
        gram: ΦᵀΦ of a block, and whitening.
        scores: products of rows with queries.
        eigen: eigenvalues and vectors, by the count of `tda.plan.cost.eigen_operations`.
    """

    gram: float
    scores: float
    eigen: float


def ones(chosen: list[sites.Site], correction: str) -> dict[str, Scale] | None:
    """1/√V = 1 of every site, in the form that a correction has."""
    name, rank = parse_correction(correction)
    if name == "none":
        return None
    scales = {}
    for s in chosen:
        stack = () if s.stack is None else (s.stack,)
        if name == "adam":
            scales[s.path] = Scale(full=jnp.ones((*stack, s.rows, s.columns)))
        else:
            left, right = ((*stack, rank or 1, n) for n in (s.rows, s.columns))
            scales[s.path] = Scale(jnp.ones(left), jnp.ones(right))
    return scales


def measured_shapes(shapes: Mapping[tuple[int, int], float], most: int = _SHAPES) -> list[tuple]:
    """Which shapes (B, T) to measure: all, or so many spread evenly over the lengths."""
    listed = sorted(shapes, key=lambda shape: shape[1])
    if len(listed) <= most:
        return listed
    at = np.linspace(0, len(listed) - 1, most).round().astype(int)
    return [listed[i] for i in at]


def encoder_times(
    encoder: Encoder,
    shapes: Mapping[tuple[int, int], float],
    vocab_size: int,
    mesh: jax.sharding.Mesh | None = None,
    rounds: int = _ROUNDS,
) -> EncoderTimes:
    """Compiles an encoder for the shapes of a corpus's batches and times a few of each in turns.

    Args:
        encoder: the encoder.
        shapes: (B, T) of the corpus's batches; with many of them, some are measured.
        vocab_size: V of the model.
        mesh: the devices that a batch is split over; one device where None.
        rounds: turns of every shape; the median counts.
    """
    chosen = measured_shapes(shapes)
    compiled, seconds, memory = {}, [], 0
    with progress.bar(len(chosen) * (1 + rounds), "calibrate the encoder", "step") as bar:
        for examples, positions in chosen:
            started = time.perf_counter()
            arrays = _batch(examples, positions, mesh)
            executable = encoder.compiled.lower(encoder.arrays, arrays, None).compile()
            seconds.append(time.perf_counter() - started)
            compiled[examples, positions] = executable
            memory = max(memory, memory_of(executable).total)
            bar.update()

        def call(arrays, batch, scored):
            return compiled[batch["tokens"].shape](arrays, batch)

        ready = dataclasses.replace(encoder, compiled=call)
        turns = {s: _turn(ready, *s, vocab_size, mesh) for s in chosen}
        seconds_by_shape = {s: [] for s in chosen}
        for _ in range(rounds):
            for shape, turn in turns.items():
                seconds_by_shape[shape].append(turn())
                bar.update()
    position = {T: statistics.median(seconds_by_shape[B, T]) / (B * T) for B, T in chosen}
    return EncoderTimes(statistics.mean(seconds), position, memory)


def _batch(examples: int, positions: int, mesh) -> dict:
    """Shapes of a batch, laid out as `tda.encoding.table` gives it to the encoder."""
    names = {"tokens": np.int32, "targets": np.int32, "weights": np.float32}
    arrays = {k: np.zeros((examples, positions), dtype) for k, dtype in names.items()}
    return arrays if mesh is None else sharding.put_batch(mesh, arrays)


def _turn(encoder: Encoder, examples, positions, vocab_size, mesh) -> Callable[[], float]:
    """A function that encodes a few full batches of a shape and returns seconds a batch."""

    def run(batches: int) -> float:
        table = _random_table(batches * examples, positions, vocab_size)
        started = time.perf_counter()
        layout = BatchLayout((positions,), examples * positions, 0, mesh)
        encoding.encode_kinds(encoder, table, np.arange(len(table)), layout)
        return (time.perf_counter() - started) / batches

    run(1)  # the first run touches its memory for the first time
    batches = min(64, max(2, math.ceil(_SECONDS_A_TURN / run(1))))
    return lambda: run(batches)


def _random_table(rows: int, positions: int, vocab_size: int) -> TokenTable:
    """Rows of random tokens with so many positions each, all scored."""
    length = positions + 1
    tokens = np.random.default_rng(0).integers(vocab_size, size=rows * length, dtype=np.int32)
    scored = np.arange(rows * length) % length > 0
    starts = length * np.arange(rows + 1, dtype=np.int64)
    ids = range(rows)
    return TokenTable(ids, ids, tokens, starts, scored)


def product_times(width: int, block: int, queries: int) -> ProductTimes:
    """Times the products that R and the exact search take, and a small eigendecomposition.

    Args:
        width: E of an encoding.
        block: numbers in its largest block.
        queries: Q of a search.
    """
    rows = max(1, min(4096, 2**26 // (4 * width)))
    # A slice of a very wide encoding, and of very many queries, has the same rate.
    rng = np.random.default_rng(0)
    block, width, queries = min(block, 4096), min(width, 8192), min(queries, 4096)
    side = min(block, 1024)
    x_RxE, q_QxE = (rng.normal(size=(n, width)).astype(np.float32) for n in (rows, queries))
    b_RxB = jnp.asarray(rng.normal(size=(rows, block)).astype(np.float32))
    s_NxN = np.asarray(b_RxB[:side, :side])
    # As many at a time as R's blocks are taken.
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
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def _timed(run) -> float:
    started = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - started
