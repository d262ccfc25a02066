"""Settings of every test run: eight CPU devices in one process, and tiny models to test with."""

import ctypes
import functools
import os
import pathlib
import tempfile
from importlib import metadata

# Before jax is imported anywhere; a subprocess of a test inherits both. Compiling is most of the
# tests' time, so the compiler is told not to try hard.
os.environ["JAX_PLATFORMS"] = "cpu"
# No program that a test starts is to start twice for huge pages.
os.environ.setdefault("GLIBC_TUNABLES", "")
# Nor is a test to depend on what earlier runs compiled, or to write into the user's home: the
# workers of a run, and what they start, share a folder of programs, which goes when the run ends.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _PROGRAMS = tempfile.TemporaryDirectory(prefix="tda-programs-")
    os.environ["TDA_COMPILATION_CACHE"] = _PROGRAMS.name
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
        # jax 0.10 can still generate code as it used to, in half of the time. Later versions end
        # at a flag that they no longer know.
        "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
        if metadata.version("jaxlib").startswith("0.10.")
        else "",
        # bfloat16 is rounded where the program says, not wherever the compiler did not fuse: else
        # the same example is rounded otherwise in another shape of batch or on more devices.
        "--xla_allow_excess_precision=false",
    ]
).strip()

import jax
import numpy as np
import pytest
from flax import nnx

from tda.model.decoder import Decoder
from tda.model.settings import DecoderSettings
from tda.runtime import compilation_cache, sharding

compilation_cache.use()

TINY = dict(vocab_size=50, width=16, layers=2, heads=2, kv_heads=1, head_width=8, ff_width=24)


def pytest_report_header():
    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    return ", ".join(f"{name} {metadata.version(name)}" for name in names)


# A worker that kept all of its memory would grow beyond 5 GB. Most of it the compiler has freed and
# glibc keeps, by hundreds of MB a test. Dropping the programs too would load or compile again what
# tests share, so they go after a file, or where a worker comes near 2 GB without what glibc kept.
_MOST_BYTES, _MOST_IN_A_FILE = 1_000_000_000, 1_500_000_000
_trim = getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)


def _resident_bytes() -> int:
    """Returns the memory of this process; 0 where the system does not tell."""
    statm = pathlib.Path("/proc/self/statm")
    pages = int(statm.read_text().split()[1]) if statm.exists() else 0
    return pages * os.sysconf("SC_PAGE_SIZE") if pages else 0


def _drop_programs() -> None:
    jax.clear_caches()
    _trim(0)


@pytest.fixture(autouse=True)
def _freed_memory():
    yield
    if _resident_bytes() > _MOST_BYTES:
        _trim(0)
    if _resident_bytes() > _MOST_IN_A_FILE:
        _drop_programs()


@pytest.fixture(autouse=True, scope="module")
def _compiled_programs():
    yield
    if _resident_bytes() > _MOST_BYTES:
        _drop_programs()


@functools.cache
def make_decoder(**changes):
    """A tiny decoder, all of whose weights are random, norms' scales too."""
    shape = TINY | changes
    model = Decoder(DecoderSettings(**shape), rngs=nnx.Rngs(0))
    # Norms start as ones, which would hide a scale that is left out.
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        if path[-1] == "scale":
            scale = _norm_scale(path, shape["layers"], shape["width"], variable.ndim)
            variable[...] = scale.astype(variable[...].dtype)
    return model


def _norm_scale(path, layers, width, ndim):
    """Random numbers that are the same for stacked layers and a list of them."""
    name = "/".join(k for k in path if isinstance(k, str))
    rng = np.random.default_rng(list(name.encode()))
    stacked = rng.uniform(0.5, 1.5, (layers, width)).astype(np.float32)
    number = next((k for k in path if isinstance(k, int)), 0)
    return stacked if ndim == 2 else stacked[number]


@pytest.fixture(scope="session")
def decoder():
    """Makes a tiny decoder, the same one for the same arguments: `decoder(tied=False)`."""
    return make_decoder


@pytest.fixture(scope="session")
def random_batch():
    """Makes a batch of random tokens: `random_batch([5, 3], length=8)`, padded to the right."""

    def make(lengths, length: int, vocab_size: int = TINY["vocab_size"], seed: int = 0):
        rng = np.random.default_rng(seed)
        tokens = np.zeros((len(lengths), length + 1), np.int32)
        weights = np.zeros((len(lengths), length), np.float32)
        for i, n in enumerate(lengths):
            tokens[i, : n + 1] = rng.integers(1, vocab_size, n + 1)
            weights[i, :n] = 1.0
        return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights}

    return make


@pytest.fixture(scope="session")
def one_device():
    """A mesh of one device."""
    return sharding.make_mesh(devices=jax.devices()[:1])


@pytest.fixture(scope="session")
def browser():
    """One browser for all tests of a process: Playwright does not start twice at a time."""
    from tests.viewer.browser import launched

    with launched() as opened:
        yield opened


@pytest.fixture(scope="module")
def runs_on_one_device():
    """Runs of this process take one device, while a module's tests last: it compiles faster."""
    one, make_mesh = jax.devices()[:1], sharding.make_mesh
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            sharding, "make_mesh", lambda *sides, devices=one: make_mesh(*sides, devices=one)
        )
        yield
