"""What a training step and the encoder compute on a GPU or TPU, read from their programs.

    python -m benchmarks.programs --json=programs.json
    python -m benchmarks.programs --shapes=1b --sides=16 --corrections=adam --hardware=v5p

No device is needed, and nothing runs: models have shapes and no values, and both programs are
traced as an accelerator would get them, in bfloat16. Matrix products are counted with the trips of
the loops around them: how many there are (each is a launch or more), their operations, and the
bytes that they read and write if nothing else is fused with them. *Least time* takes the larger of
operations over the chip's peak and bytes over its bandwidth for each product, float32 ones at
their own peak, and adds them up: no program of these products is faster. *Fused* lets the
products within an example move no bytes, as a flash kernel does. Ratios are over the training step
(forward, backward and Adam's update). `tda.plan.cost` counts by formula what this counts from the
program; `benchmarks.accelerator` measures both.
"""

import collections
import dataclasses
import math
from collections.abc import Iterator
from unittest import mock

import jax
import jax.numpy as jnp
import optax
from absl import app, flags
from flax import nnx
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.interpreters import partial_eval  # not public, but in jax 0.10.1 to 0.12

from benchmarks import accelerator, record
from tda.data.batches import BatchLayout
from tda.gradients.encoder import build_encoder, make_taps
from tda.gradients.projection import Projection
from tda.gradients.sites import find_sites
from tda.model import functional
from tda.model.decoder import Decoder
from tda.model.settings import DecoderSettings
from tda.plan import calibration, chips
from tda.training import loop

_EXAMPLES = flags.DEFINE_integer("examples", 8, "sequences of a batch")
_HARDWARE = flags.DEFINE_string("hardware", "h100", "chip of the least time (`tda.plan.chips`)")


@dataclasses.dataclass
class Products:
    """The matrix products of a program."""

    count: float = 0
    operations: float = 0
    bytes: float = 0
    seconds: float = 0
    fused_seconds: float = 0
    """The same where products within an example (attention's) move no bytes."""

    def add(self, step, trips: float, chip: chips.Chip) -> None:
        """Adds one product that runs `trips` times."""
        (contracted, _), (batched, _) = step.params["dimension_numbers"]
        left, right = (x.aval for x in step.invars)
        out = step.outvars[0].aval
        inner = math.prod(left.shape[d] for d in contracted)
        operations = 2 * inner * math.prod(out.shape)
        moved = sum(x.size * x.dtype.itemsize for x in (left, right, out))
        peak = chip.peak("bfloat16" if left.dtype == right.dtype == jnp.bfloat16 else "float32")
        self.count += trips
        self.operations += trips * operations
        self.bytes += trips * moved
        of_operations, of_bytes = operations / peak, moved / chip.bandwidth
        self.seconds += trips * max(of_operations, of_bytes)
        self.fused_seconds += trips * (of_operations if batched else max(of_operations, of_bytes))


def products_of(jaxpr: Jaxpr, chip: chips.Chip) -> Products:
    """Counts the products of a program, with the trips of its loops.

    Raises:
        ValueError: there is a product in a loop whose trips are not known.
    """
    products = Products()
    # What nothing uses is not computed: the encoder's loss has the head's gradient in its loop.
    used, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    for step, trips in _steps(used, 1):
        if step.primitive.name == "dot_general":
            products.add(step, trips, chip)
    return products


def _steps(jaxpr: Jaxpr, trips: float) -> Iterator[tuple]:
    """Yields the innermost steps of a program, each with how often it runs."""
    for step in jaxpr.eqns:
        inner = [x for x in jax.tree.leaves(list(step.params.values()), is_leaf=_is_program)]
        programs = [
            x.jaxpr if isinstance(x, ClosedJaxpr) else x for x in filter(_is_program, inner)
        ]
        if not programs:
            yield step, trips
        name = step.primitive.name
        within = [list(_steps(p, trips * step.params.get("length", 1))) for p in programs]
        if name == "cond":  # the branch with the most steps
            within = [max(within, key=len)]
        has_product = any(s.primitive.name == "dot_general" for steps in within for s, _ in steps)
        if name == "while" and has_product:
            raise ValueError("a loop with a product has no known number of trips")
        for steps in within:
            yield from steps


def _is_program(x) -> bool:
    return isinstance(x, Jaxpr | ClosedJaxpr)


def count(shape: str, chip: chips.Chip) -> dict[str, Products]:
    """Returns the products of the training step and of the encoder's programs, by name."""
    settings = DecoderSettings(**accelerator.settings_of(shape) | {"dtype": "bfloat16"})
    model = nnx.eval_shape(lambda: Decoder(settings, rngs=nnx.Rngs(0)))
    model_fn, params = functional.split(model)
    tx = optax.adam(1e-3)
    state = {
        "params": params,
        "opt_state": jax.eval_shape(tx.init, params),
        "step": jax.ShapeDtypeStruct((), jnp.int32),
    }
    table = calibration.random_table(_EXAMPLES.value, flags.FLAGS.length, settings.vocab_size)
    layout = BatchLayout((flags.FLAGS.length,), _EXAMPLES.value * flags.FLAGS.length, 0, None)
    (batch,) = (b.arrays() for b in layout.batches(table))
    step = loop.make_step(model_fn.merge, tx, None)
    programs = {"training step": step.trace(state, batch)}
    for correction in flags.FLAGS.corrections:
        scales = calibration.ones(find_sites(model), correction)
        for side in map(int, flags.FLAGS.sides):
            projection = Projection(side=side, pooling="matrix")
            kind = projection, make_taps(find_sites(model), projection, scales)
            encoder = build_encoder(model, [kind], "loss", None)
            name = f"encode, {correction}, side {side}"
            programs[name] = encoder.compiled.trace(encoder.arrays, batch, None, None)
    return {name: products_of(program.jaxpr.jaxpr, chip) for name, program in programs.items()}


def main(_):
    """Prints and saves the figures."""
    chip = chips.parse(_HARDWARE.value).chip
    print("| shape | program | products | TFLOP | GiB | operations | bytes | least time | fused |")
    print("|---|---|---:|---:|---:|---:|---:|---:|---:|")
    figures = collections.defaultdict(dict)
    for shape in flags.FLAGS.shapes:
        # What depends on the backend, such as how many logits are held at a time.
        with mock.patch.object(jax, "default_backend", lambda: "gpu"):
            programs = count(shape, chip)
        training = programs["training step"]
        for name, p in programs.items():
            figures[shape][name] = dataclasses.asdict(p)
            ratios = (
                p.operations / training.operations,
                p.bytes / training.bytes,
                p.seconds / training.seconds,
                p.fused_seconds / training.fused_seconds,
            )
            shown = " | ".join(f"{x:.2f}" for x in ratios)
            print(
                f"| {shape} | {name} | {p.count:,.0f} | {p.operations / 1e12:.2f} | "
                f"{p.bytes / 2**30:.2f} | {shown} |",
                flush=True,
            )
    record.write("programs", {"hardware": chip.title, "shapes": figures})


if __name__ == "__main__":
    app.run(main)
