"""Encoding against a training step of the same model on the same batches, and against vmap(grad).

    python -m benchmarks.encoder --json=encoder.json
    python -m benchmarks.encoder --sizes=10m --lengths=128 --rounds=5

All sides run in one process, in turns: each round times every side once, and a side's figure is the
median over rounds of its time over the training step's in the same round. A training step is
forward, backward and Adam's update, jitted, with its state donated. Weights are random, since times
do not depend on them. Memory is as the compiler states it: arguments, outputs and temporaries.
Ratios are over the training step. `vmap(grad)` with projection gets as many of the batch's examples
as have 2 GiB of gradients, and so does the encoder for this comparison. The least ratio that the
count of matrix products allows is printed too: an encoder forms no weight gradients, except for
exact Adam, and never those of embedding and head. "none and factored" encodes both kinds in one
pass, in comparison with a pass for each. "training step, capturing" trains, and keeps its examples'
encodings (`tda.Capture`). With `--stored=int8,2bit,2bit:8` the encodings are quantised in the same
program, after the colon as so many pairs of vectors of a matrix (`--per_matrix`).
"""

import functools
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags
from flax import nnx

from benchmarks import record
from tda.gradients import reference
from tda.gradients.capture import Capture
from tda.gradients.encoder import build_encoder, make_encoder, make_taps
from tda.gradients.moments.scales import Scale, from_full
from tda.gradients.projection import Projection
from tda.gradients.sites import find_sites
from tda.model.decoder import Decoder
from tda.model.settings import DecoderSettings
from tda.plan.calibration import memory_of
from tda.runtime import huge_pages, sharding
from tda.store import Form
from tda.training import loop

_SIZES = flags.DEFINE_list("sizes", ["10m", "30m", "135m"], "models")
_LENGTHS = flags.DEFINE_list("lengths", ["128", "512"], "positions of a batch's sequences")
_ROUNDS = flags.DEFINE_integer("rounds", 10, "rounds after warm-up")
_TOKENS = flags.DEFINE_integer("tokens", 2048, "positions of a batch")
_SIDE = flags.DEFINE_integer("side", 16, "side of the projection")
_PER_MATRIX = flags.DEFINE_bool("per_matrix", False, "a block for each matrix, not for each layer")
_STORED = flags.DEFINE_list("stored", [], "dtypes of a store, with a rank or not")
_DTYPE = flags.DEFINE_string("dtype", "float32", "of computation")
_VMAP = flags.DEFINE_bool("vmap", True, "time vmap(grad) too")

SIZES = {
    "10m": dict(width=256, layers=8, heads=4, kv_heads=4, head_width=64, ff_width=1024),
    "30m": dict(width=512, layers=8, heads=8, kv_heads=8, head_width=64, ff_width=1376),
    "135m": dict(width=576, layers=30, heads=9, kv_heads=3, head_width=64, ff_width=1536),
}
VOCABULARY = {"10m": 8192, "30m": 8192, "135m": 49152}
CORRECTIONS = ("none", "factored", "low_rank(4)", "adam")
BOTH = ("none", "factored")


def scales_of(model, correction: str) -> dict[str, Scale] | None:
    """Scales of random second moments; their values cost nothing, their shapes do."""
    if correction == "none":
        return None
    scales = {}
    for i, site in enumerate(find_sites(model)):
        stack = () if site.stack is None else (site.stack,)
        shape = (*stack, site.rows, site.columns)
        full = jnp.exp(jax.random.normal(jax.random.key(i), shape))
        if correction.startswith("low_rank"):
            rank = int(correction[9:-1])
            left = jnp.ones((*stack, rank, site.rows))
            scales[site.path] = Scale(left, jnp.ones((*stack, rank, site.columns)))
        else:
            scales[site.path] = from_full(full, correction)
    return scales


def kind_of(model, projection: Projection, correction: str) -> tuple:
    """Returns one of the kinds of gradients of an encoder."""
    chosen = find_sites(model)
    taps = make_taps(chosen, projection, scales_of(model, correction))
    return projection, taps


def random_batch(vocabulary: int, batch: int, length: int) -> dict:
    """Returns a batch of random tokens, every position scored."""
    tokens = np.random.default_rng(0).integers(0, vocabulary, (batch, length + 1), dtype=np.int32)
    weights = np.ones((batch, length), np.float32)
    arrays = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights}
    return {k: jnp.asarray(v) for k, v in arrays.items()}


class TrainingStep:
    """The side that all others are measured by. Holds its state from call to call.

    Args:
        model, batch: what it trains, and on what.
        projection: of the encodings that it keeps of its examples; None keeps none.
    """

    def __init__(self, model, batch, projection: Projection | None = None):
        tx = optax.adam(1e-3)
        model_fn, self.state = loop.initial_state(model, tx, sharding.make_mesh())
        step = functools.partial(loop.train_step, model_fn.merge, tx)
        if projection is not None:
            capture = Capture(model, projection, tell=False)
            step = functools.partial(capturing_step, capture, model_fn.merge, tx)
        self.step = jax.jit(step, donate_argnums=0).lower(self.state, batch).compile()
        self.batch = batch
        self.memory = memory_of(self.step)

    def __call__(self):
        """Takes one step; returns its loss."""
        self.state, loss = self.step(self.state, self.batch)
        return loss


def capturing_step(capture: Capture, merge, tx, state: dict, batch: dict):
    """Takes `loop.train_step`, with the encodings of the batch's examples beside the loss."""

    def loss(model, batch):
        return loop.batch_loss(lambda m: m, model, batch)

    value, gradients, encodings_BxE = capture(loss, merge(state["params"]), batch)
    gradients = nnx.to_pure_dict(gradients)
    updates, opt_state = tx.update(gradients, state["opt_state"], state["params"])
    params = optax.apply_updates(state["params"], updates)
    state = {"params": params, "opt_state": opt_state, "step": state["step"] + 1}
    return state, (value, encodings_BxE)


def case(size: str, length: int) -> dict:
    """Returns all figures of one model at one length."""
    vocabulary = VOCABULARY[size]
    model = Decoder(
        DecoderSettings(vocab_size=vocabulary, dtype=_DTYPE.value, **SIZES[size]), rngs=nnx.Rngs(0)
    )
    parameters = sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
    head = vocabulary * SIZES[size]["width"]
    batch = random_batch(vocabulary, max(1, _TOKENS.value // length), length)
    pooling = {"pooling": "matrix"} if _PER_MATRIX.value else {"blocks": SIZES[size]["layers"]}
    projection = Projection(side=_SIDE.value, **pooling)
    step = TrainingStep(model, batch)
    capturing = TrainingStep(model, batch, projection)
    sides = {"training step": step, "training step, capturing": capturing}
    memory = {name: side.memory for name, side in sides.items()}
    for correction in CORRECTIONS:
        encoder = make_encoder(model, projection, scales_of(model, correction))
        compiled = encoder.compiled.lower(encoder.arrays, batch).compile()
        sides[correction] = functools.partial(compiled, encoder.arrays, batch)
        memory[correction] = memory_of(compiled)
    plain = make_encoder(model, projection)
    for stored in _STORED.value:
        dtype, _, rank = stored.partition(":")
        widths = tuple(w.stop - w.start for w in plain.layout.slices)
        forms = (Form(dtype, widths, int(rank or 0)),)
        compiled = plain.compiled.lower(plain.arrays, batch, None, forms).compile()
        sides[f"none, as {stored}"] = functools.partial(compiled, plain.arrays, batch)
        memory[f"none, as {stored}"] = memory_of(compiled)
    # Two kinds of gradients in one pass, as a table of many rows has them encoded.
    both = build_encoder(model, [kind_of(model, projection, c) for c in BOTH])
    compiled = both.compiled.lower(both.arrays, batch).compile()
    sides[" and ".join(BOTH)] = functools.partial(compiled, both.arrays, batch)
    memory[" and ".join(BOTH)] = memory_of(compiled)
    # The reference keeps every example's whole gradient.
    few = jax.tree.map(lambda x: x[: max(1, 2**31 // (4 * parameters))], batch)
    pair = {}
    if _VMAP.value:
        slow = jax.jit(lambda b: reference.encode(model, b, projection))
        quick = make_encoder(model, projection)
        for name, f, *args in (
            ("vmap(grad), few", slow, few),
            ("none, few", quick.compiled, quick.arrays, few),
        ):
            compiled = f.lower(*args).compile()
            pair[name] = functools.partial(compiled, *args)
            memory[name] = memory_of(compiled)
    times = record.in_turns(sides, _ROUNDS.value)
    # In rounds of their own: gigabytes of gradients leave little of the caches to others.
    times |= record.in_turns(pair, _ROUNDS.value)
    figures = {
        "parameters": parameters,
        "batch": list(batch["tokens"].shape),
        "head's share of the matrix products": head / parameters,
        "least by count": least(size, length, head),
        "sides": {},
    }
    for name, seconds in times.items():
        tokens = (few if name.endswith("few") else batch)["tokens"].size
        ratios = [a / b for a, b in zip(seconds, times["training step"], strict=True)]
        figures["sides"][name] = {
            "seconds, median": statistics.median(seconds),
            "tokens a second": tokens / statistics.median(seconds),
            "time ratio": statistics.median(ratios),
            "memory, MiB": memory[name].total / 2**20,
            "memory ratio": memory[name].total / memory["training step"].total,
        }
    one_by_one = [sum(t) for t in zip(*(times[c] for c in BOTH), strict=True)]
    at_once = zip(times[" and ".join(BOTH)], one_by_one, strict=True)
    figures["two kinds at once over one by one"] = statistics.median(a / b for a, b in at_once)
    if "vmap(grad), few" in times:
        pairs = zip(times["vmap(grad), few"], times["none, few"], strict=True)
        figures["vmap(grad) over encoder, time"] = statistics.median(a / b for a, b in pairs)
        figures["vmap(grad) over encoder, memory"] = (
            memory["vmap(grad), few"].total / memory["none, few"].total
        )
    return figures


def least(size: str, length: int, head: int) -> dict:
    """Multiplications of an encoder over a training step's, with and without weight gradients."""
    shape = SIZES[size]
    queries, keys = (shape[k] * shape["head_width"] for k in ("heads", "kv_heads"))
    layer = shape["width"] * (2 * queries + 2 * keys + 3 * shape["ff_width"])
    # Forward, and twice that backward; half of the positions are masked.
    attention = 3 * 2 * queries * length / 2 * shape["layers"]
    tapped = layer * shape["layers"]
    step = 3 * (tapped + head) + attention
    without = (2 * (tapped + head) + attention) / step
    return {"no weight gradient": without, "exact Adam": without + tapped / step}


def main(argv):
    """Runs every case and prints a line for each side."""
    del argv
    found = {}
    for size in _SIZES.value:
        for length in map(int, _LENGTHS.value):
            started = time.perf_counter()
            name = f"{size}, {length} positions, {_DTYPE.value}"
            found[name] = case(size, length)
            print(f"{name}: {found[name]['parameters'] / 1e6:.1f}M parameters", flush=True)
            for what, share in found[name]["least by count"].items():
                print(f"  least by the count of products, {what}: {share:.2f}")
            for side, f in found[name]["sides"].items():
                print(
                    f"  {side:16} {f['time ratio']:6.2f} of its time"
                    f" {f['tokens a second']:10,.0f} tokens/s {f['memory, MiB']:8,.0f} MiB"
                )
            for key in (
                "two kinds at once over one by one",
                "vmap(grad) over encoder, time",
                "vmap(grad) over encoder, memory",
            ):
                if key in found[name]:
                    print(f"  {key}: {found[name][key]:.2f}")
            print(f"  ({time.perf_counter() - started:.0f} s)", flush=True)
            record.write("encoder", found)


if __name__ == "__main__":
    huge_pages.use()
    app.run(main)
