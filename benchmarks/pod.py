"""What the large models need on each device of a pod, by compiling for a simulated mesh.

    python -m benchmarks.pod --json=pod.json
    python -m benchmarks.pod --size=1b --fsdp=8 --tensor=2 --batch=32

No array is ever allocated: the computations are lowered from shapes and compiled for simulated
devices, and the compiler says what memory they take. The CPU compiler's account is a guide to, not
the same as, that of an accelerator's, whose attention kernels need less.
"""

import functools
import time

import jax
import jax.numpy as jnp
import optax
from absl import app, flags
from flax import nnx

from benchmarks import record
from tda.gradients import encoder as encoders
from tda.gradients import sites, taps, together
from tda.gradients.moments.second_moments import parse_correction
from tda.gradients.projection import Projection
from tda.gradients.sites import find_sites
from tda.model import functional, sizes
from tda.model.decoder import Decoder
from tda.plan.calibration import memory_of
from tda.runtime import sharding
from tda.training import loop

_JSON = flags.DEFINE_string("json", None, "file that every figure is written to")
_SIZE = flags.DEFINE_string("size", "8b", "model size of tda/model/sizes.py")
_VOCABULARY = flags.DEFINE_integer("vocabulary", 32_000, "tokens")
_DATA = flags.DEFINE_integer("data", 1, "devices along the data axis")
_FSDP = flags.DEFINE_integer("fsdp", 16, "devices along the fsdp axis")
_TENSOR = flags.DEFINE_integer("tensor", 4, "devices along the tensor axis")
_BATCH = flags.DEFINE_integer("batch", 64, "sequences of a batch, over all devices")
_LENGTH = flags.DEFINE_integer("length", 2048, "positions of a sequence")
_SIDE = flags.DEFINE_integer("side", 64, "side of the projection")
_BLOCKS = flags.DEFINE_integer("blocks", 8, "blocks of layers")


def abstract_ends(
    chosen: list[sites.Site], projection: Projection, correction: str
) -> dict[sites.Site, taps.End]:
    """Returns the shapes of what `tda.gradients.encoder.ends_of` makes for a correction."""
    name, rank = parse_correction(correction)
    width = projection.side * (rank or 1)

    def shape(site, *axes):
        stack = () if site.stack is None else (site.stack,)
        return jax.ShapeDtypeStruct((*stack, *axes), jnp.float32)

    return {
        s: taps.End(
            shape(s, s.rows, width),
            shape(s, s.columns, width),
            projection.side,
            shape(s, s.rows, s.columns) if name == "adam" else None,
        )
        for s in chosen
    }


def compile_encoder(
    model: nnx.Module,
    projection: Projection,
    mesh: jax.sharding.Mesh,
    batch: int,
    length: int,
    correction: str = "factored",
    include: str | None = None,
):
    """Compiles the encoder of an abstract model for a mesh.

    Args:
        model: made under `nnx.eval_shape`.
        projection: the projection.
        mesh: of real or simulated devices.
        batch, length: B and T of a batch over all devices.
        correction: as `tda.gradients.moments.second_moments.parse_correction` takes it.
        include: a regular expression on parameters' path names.

    Returns:
        The compiled computation.
    """
    chosen = find_sites(model, include)
    encoder = encoders.build(
        model, chosen, projection, abstract_ends(chosen, projection, correction)
    )
    arrays = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        encoder.arrays,
        together.shardings(encoder, mesh),
    )
    with jax.set_mesh(mesh):
        return encoder.compiled.lower(arrays, abstract_batch(mesh, batch, length)).compile()


def compile_training_step(
    model: nnx.Module,
    tx: optax.GradientTransformation,
    mesh: jax.sharding.Mesh,
    batch: int,
    length: int,
):
    """Compiles a training step of an abstract model, the yardstick of encoding.

    Its state is donated. The arguments are those of `compile_encoder`, and the optimizer.
    """
    model_fn, params = functional.split(model)

    def start(params):
        return {"params": params, "opt_state": tx.init(params), "step": jnp.int32(0)}

    state = loop.abstract_state(jax.eval_shape(start, params), model_fn, mesh)
    step = functools.partial(loop.train_step, model_fn.merge, tx)
    with jax.set_mesh(mesh):
        lowered = jax.jit(step, donate_argnums=0).lower(state, abstract_batch(mesh, batch, length))
        return lowered.compile()


def abstract_batch(mesh: jax.sharding.Mesh, batch: int, length: int) -> dict:
    """Returns the shapes of a batch, split over the mesh's batch devices."""
    layout = sharding.named(mesh, ("batch", None), (batch, length))

    def shape(dtype):
        return jax.ShapeDtypeStruct((batch, length), dtype, sharding=layout)

    return {"tokens": shape(jnp.int32), "targets": shape(jnp.int32), "weights": shape(jnp.float32)}


def main(argv):
    """Compiles a training step and the encoder of every correction; prints bytes a device."""
    del argv
    count = _DATA.value * _FSDP.value * _TENSOR.value
    # Both take effect as long as no device has been used yet.
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", count)
    mesh = sharding.make_mesh(_DATA.value, _FSDP.value, _TENSOR.value)
    shape = sizes.size(_SIZE.value) | dict(vocab_size=_VOCABULARY.value, dtype="bfloat16")
    model = nnx.eval_shape(lambda: Decoder(**shape, remat=True, rngs=nnx.Rngs(0)))

    def training_step():
        return compile_training_step(model, optax.adam(1e-3), mesh, _BATCH.value, _LENGTH.value)

    def encoder(correction):
        projection = Projection(side=_SIDE.value, blocks=_BLOCKS.value)
        return compile_encoder(model, projection, mesh, _BATCH.value, _LENGTH.value, correction)

    sides = {"training step": training_step}
    for correction in ("none", "factored", "low_rank(4)", "adam"):
        sides[f"encoder, {correction}"] = functools.partial(encoder, correction)
    figures = {
        "model": _SIZE.value,
        "mesh": dict(mesh.shape),
        "batch": [_BATCH.value, _LENGTH.value],
        "side": _SIDE.value,
        "blocks": _BLOCKS.value,
        "GiB a device": {},
    }
    for name, compile_ in sides.items():
        started = time.perf_counter()
        memory = memory_of(compile_())
        gib = {k: round(getattr(memory, k) / 2**30, 3) for k in ("arguments", "temporary", "total")}
        figures["GiB a device"][name] = gib
        print(
            f"{name:22} {gib['total']:7.2f} GiB a device, {gib['arguments']:.2f} of it parameters, "
            f"state and projections (compiled in {time.perf_counter() - started:.0f} s)",
            flush=True,
        )
        if _JSON.value:
            record.write(_JSON.value, "pod", figures)


if __name__ == "__main__":
    app.run(main)
