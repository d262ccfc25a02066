"""The memory of large models on each device of a pod, by compiling for a simulated mesh.

    python -m benchmarks.pod --json=pod.json
    python -m benchmarks.pod --size=1b --fsdp=8 --tensor=2 --batch=32

No array is allocated: the computations are lowered from shapes and compiled for simulated devices,
and the compiler states their memory. The CPU compiler's figures are a guide to those of an
accelerator, whose attention kernels need less.
"""

import functools
import time

import jax
import optax
from absl import app, flags
from flax import nnx

from benchmarks import record
from benchmarks.ahead_of_time import compile_encoder, compile_training_step
from tda.gradients.projection import Projection
from tda.model import sizes
from tda.model.decoder import Decoder
from tda.model.settings import DecoderSettings
from tda.plan.calibration import memory_of
from tda.runtime import sharding

_SIZE = flags.DEFINE_string("size", "8b", "model size of tda/model/sizes.py")
_VOCABULARY = flags.DEFINE_integer("vocabulary", 32_000, "tokens")
_DATA = flags.DEFINE_integer("data", 1, "devices along the data axis")
_FSDP = flags.DEFINE_integer("fsdp", 16, "devices along the fsdp axis")
_TENSOR = flags.DEFINE_integer("tensor", 4, "devices along the tensor axis")
_BATCH = flags.DEFINE_integer("batch", 64, "sequences of a batch, over all devices")
_LENGTH = flags.DEFINE_integer("length", 2048, "positions of a sequence")
_SIDE = flags.DEFINE_integer("side", 64, "side of the projection")
_BLOCKS = flags.DEFINE_integer("blocks", 8, "blocks of layers")


def main(argv):
    """Compiles a training step and the encoder of every correction; prints bytes a device."""
    del argv
    count = _DATA.value * _FSDP.value * _TENSOR.value
    # Both take effect as long as no device has been used yet.
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", count)
    mesh = sharding.make_mesh(_DATA.value, _FSDP.value, _TENSOR.value)
    shape = sizes.size(_SIZE.value) | dict(vocab_size=_VOCABULARY.value, dtype="bfloat16")
    model = nnx.eval_shape(lambda: Decoder(DecoderSettings(**shape, remat=True), rngs=nnx.Rngs(0)))

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
        record.write("pod", figures)


if __name__ == "__main__":
    app.run(main)
