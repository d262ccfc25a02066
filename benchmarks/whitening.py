"""R^(−1/2): its eigendecompositions beside other work, and the program that applies it.

    python -m benchmarks.whitening --json=whitening.json

1. The eigendecompositions of blocks, as `tda.hessian` takes them (one BLAS thread a block, a block
   for each core) and one after another with as many BLAS threads as there are cores, in turns:
   alone, and beside a process that multiplies matrices on every core.
2. The program that whitens rows, made and run for the first time, and run again: from a list of
   blocks, one product after another, and from one array, over which it loops.
3. Rows a second of the program with R dense, and as a Kronecker product, by the blocks' side.
"""

import contextlib
import functools
import math
import multiprocessing
import statistics
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import threadpoolctl
from absl import app, flags

from benchmarks import record
from tda import hessian
from tda.hessian import block_slices, blocks
from tda.retrieval.exact import step_rows
from tda.runtime import host_blas

_ROUNDS = flags.DEFINE_integer("rounds", 5, "rounds of all sides")
_SHAPES = flags.DEFINE_list(
    "shapes", ["211x64", "57x1024"], "numbers of blocks, and how wide they are"
)
_MATRICES = flags.DEFINE_integer("matrices", 28, "matrices of a row, for rows/s by structure")
_DECOMPOSED = flags.DEFINE_integer("decomposed", 8, "blocks of a shape that are decomposed")

_ROWS = 128


def _multiply(started) -> None:
    """Keeps every core at work until it is ended."""
    x, product = jnp.ones((4096, 4096)), jax.jit(jnp.matmul)
    while True:
        product(x, x).block_until_ready()
        started.set()


@contextlib.contextmanager
def busy(whether: bool) -> Iterator[None]:
    """Keeps every core busy with other processes inside the block, if asked to."""
    if not whether:
        yield
        return
    context = multiprocessing.get_context("spawn")
    started = context.Event()
    other = context.Process(target=_multiply, args=(started,), daemon=True)
    other.start()
    try:
        started.wait()
        yield
    finally:
        other.terminate()
        other.join()


def decomposed(width: int, count: int) -> dict:
    """Times of `count` decompositions, by whether the machine is busy and how they are made."""
    rng = np.random.default_rng(0)
    of = [x @ x.T for x in rng.normal(size=(count, width, 2 * width)).astype(np.float32)]

    def together():
        with threadpoolctl.threadpool_limits(host_blas.cores(), user_api="blas"):
            return [np.linalg.eigh(x) for x in of]

    sides = {
        "ours": lambda: host_blas.map_blocks(np.linalg.eigh, of),
        "one after another": together,
    }
    out = {}
    for name, whether in (("alone", False), ("beside another process", True)):
        with busy(whether):
            times = record.in_turns(sides, _ROUNDS.value, warm_ups=1)
        took = {side: statistics.median(t) for side, t in times.items()}
        out[name] = took | {"ratio": took["one after another"] / took["ours"]}
    return out


def applied(count: int, width: int) -> dict:
    """Times of the program from a list and from one array: the first call, and others."""
    rng, slices = np.random.default_rng(0), block_slices((width,) * count)
    x_RxE = jnp.asarray(rng.normal(size=(_ROWS, count * width)).astype(np.float32))
    roots = [jnp.asarray(rng.normal(size=(width, width)).astype(np.float32)) for _ in slices]
    forms = {"list": roots, "one array": blocks.stack(roots)}
    made = {}

    def first(form):
        # A new function has no program yet.
        made[form] = jax.jit(lambda x, r: hessian.whiten(x, r, slices))
        return made[form](x_RxE, forms[form])

    firsts = {form: lambda form=form: first(form) for form in forms}
    again = {form: lambda form=form: made[form](x_RxE, forms[form]) for form in forms}
    out = {}
    for name, times in (
        ("first call", record.in_turns(firsts, _ROUNDS.value, warm_ups=0)),
        ("later calls", record.in_turns(again, 4 * _ROUNDS.value)),
    ):
        took = {form: statistics.median(t) for form, t in times.items()}
        out[name] = took | {"ratio": took["list"] / took["one array"]}
    same = np.array_equal(*(np.asarray(made[form](x_RxE, forms[form])) for form in forms))
    return out | {"equal": same}


def structures(count: int) -> dict:
    """Rows/s of the program that whitens rows of `count` square matrices, by structure and side."""
    rng, sides = np.random.default_rng(0), {}
    for shape in ((16 * 16,), *((k, k) for k in (16, 32, 64))):
        width = math.prod(shape)
        factors = [x @ x.T for n in shape for x in [rng.normal(size=(n, 2 * n))]] * count
        roots = blocks.stack(hessian.inverse_root(factors, shapes=[shape] * count))
        rows = step_rows(1 << 20, count * width)
        x_RxE = jnp.asarray(rng.normal(size=(rows, count * width)), jnp.float32)
        slices = block_slices([width] * count)
        whiten = jax.jit(lambda x, r, slices=slices: hessian.whiten(x, r, slices))
        name = f"{'dense' if len(shape) == 1 else 'Kronecker'}, side {math.isqrt(width)}"
        sides[name] = functools.partial(whiten, x_RxE, roots), len(x_RxE)
    times = record.in_turns({name: run for name, (run, _) in sides.items()}, _ROUNDS.value)
    return {name: sides[name][1] / statistics.median(t) for name, t in times.items()}


def main(argv):
    """Measures, prints."""
    del argv
    figures = {"rows/s": structures(_MATRICES.value)}
    print(f"rows/s of {_MATRICES.value} matrices: {figures['rows/s']}", flush=True)
    for shape in _SHAPES.value:
        count, width = map(int, shape.split("x"))
        figures[shape] = {
            "decompositions": decomposed(width, min(count, _DECOMPOSED.value)),
            "program": applied(count, width),
        }
        for what, told in figures[shape].items():
            ratios = {n: round(f["ratio"], 2) for n, f in told.items() if n != "equal"}
            print(f"{count} blocks of {width}, {what}: {ratios}", told, flush=True)
    record.write("whitening", figures)


if __name__ == "__main__":
    app.run(main)
