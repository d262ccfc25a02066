"""Flags of mains whose stages other programs may compute: `--groups`, `--engine`."""

import functools

from absl import flags

from tda.run import engines
from tda.run.workdir import Workdir
from tda.runtime.engine import Engine

from .launch import PLUGIN

_GROUPS = flags.DEFINE_string(
    "groups", None, "I/N: task I of an array of N. none: train and prepare for other programs."
)
_PATIENCE = flags.DEFINE_float(
    "patience", 600.0, "Seconds that a task waits for the next result of the others; then it ends."
)
_ENGINE = flags.DEFINE_enum("engine", None, ["ray"], "Who computes, if not this program.")
_ADDRESS = flags.DEFINE_string("ray_address", None, "Of the Ray cluster; else RAY_ADDRESS, or new.")
_WORKERS = flags.DEFINE_integer("workers", 0, "Ray workers; 0: as many as the cluster holds.")
_RESOURCES = flags.DEFINE_list("worker_resources", ["CPU=1"], "Of each, such as CPU=4,GPU=1.")


@functools.cache
def read() -> engines.EngineFlags:
    """Returns the flags of the engine; called before jax starts."""
    cluster = _ADDRESS.value, _WORKERS.value, _RESOURCES.value
    return engines.read_flags(_GROUPS.value, _PATIENCE.value, _ENGINE.value, cluster, PLUGIN.value)


def choose(config, workdir: Workdir, has_board: bool = False) -> Engine:
    """Returns the engine that the flags ask for; see `tda.run.engines.choose_engine`."""
    return engines.choose_engine(config, workdir, read(), has_board)
