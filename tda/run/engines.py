"""Makes the engine that a run's command line asks for."""

import dataclasses
import os
import re

import jax
from ml_collections import ConfigDict

from tda.run import ray_worker
from tda.run.workdir import Workdir
from tda.runtime import code_version, ray_engine
from tda.runtime.array_tasks import ArrayTask, Preparation
from tda.runtime.engine import PROCESSES, Engine
from tda.runtime.fingerprint import fingerprint
from tda.runtime.ray_engine import Cluster, RayEngine


@dataclasses.dataclass(frozen=True)
class EngineFlags:
    """The flags of the engine; the defaults stand for this process and those joined to it."""

    groups: str | None = None
    """The part of a task of an array, "I/N"; "none" prepares a run for other programs."""

    patience: float = 600.0
    """Seconds that a task of an array waits for the next result of the others."""

    engine: str = ""
    """ "ray", or empty."""

    cluster: Cluster = Cluster()
    """The Ray cluster."""

    plugins: tuple[str, ...] = ()
    """Modules that workers import, as this program has."""

    @property
    def is_alone(self) -> bool:
        """Whether this program is not to be joined with others."""
        return self.groups is not None or self.engine != ""

    @property
    def task(self) -> str:
        """The number of this task of an array; empty if it is none."""
        return "".join(re.findall(r"^(\d+)/\d+$", self.groups or ""))


def read_flags(groups, patience, engine, cluster: tuple, plugins) -> EngineFlags:
    """Returns the flags of the command line; called before jax starts.

    Args:
        groups, patience, engine, plugins: as in `EngineFlags`.
        cluster: address, number of workers, and resources of each, such as ["CPU=4", "GPU=1"].

    Raises:
        ValueError: a flag is malformed.
    """
    address, workers, resources = cluster
    pairs = []
    for text in resources:
        name, _, number = text.partition("=")
        try:
            pairs.append((name, float(number)))
        except ValueError:
            raise ValueError(
                f"--worker_resources={','.join(resources)} must be NAME=NUMBER with commas, such "
                "as CPU=4,GPU=1"
            ) from None
    chosen = Cluster(address or "", workers, tuple(pairs))
    if engine and chosen.has_accelerators:
        # Else this program would hold memory of a GPU that a worker needs.
        jax.config.update("jax_platforms", "cpu")
    return EngineFlags(groups, patience, engine or "", chosen, tuple(plugins))


def choose_engine(
    config: ConfigDict, workdir: Workdir, chosen: EngineFlags, has_board: bool = False
) -> Engine:
    """Returns the engine that the flags ask for.

    Args:
        config: the run's config.
        workdir: its directory.
        chosen: the flags.
        has_board: whether the run is a bank with its board, not a trace.

    Raises:
        ValueError: a flag is malformed, or conflicts with another.
        tda.runtime.ray_engine.RayError: Ray is not installed.
    """
    groups = chosen.groups
    if not chosen.is_alone:
        return PROCESSES
    flag = f"--engine={chosen.engine}" if groups is None else f"--groups={groups}"
    if groups == "none" and not chosen.engine:
        return Preparation()
    if jax.process_count() > 1:
        raise ValueError(
            f"{flag} is for programs that are not joined; leave out --distributed and "
            f"--coordinator, or {flag}"
        )
    if groups is None:
        return _make_ray_engine(config, workdir, chosen, has_board)
    if chosen.engine:
        raise ValueError(f"--engine={chosen.engine} and {flag} exclude each other; leave out one")
    match = re.fullmatch(r"(\d+)/(\d+)", groups)
    if not match or not int(match[1]) < int(match[2]):
        raise ValueError(f"{flag} must be I/N, with the task's number I from 0 to N−1, or none")
    index, count = map(int, match.groups())
    # The tasks of one array have the same count, config and code.
    identity = fingerprint([config.to_json(), code_version.describe()])
    party = f"{count} tasks, {identity}"
    return ArrayTask(index, count, workdir.path, party, chosen.patience)


def _make_ray_engine(
    config: ConfigDict, workdir: Workdir, chosen: EngineFlags, has_board: bool
) -> RayEngine:
    if chosen.engine != "ray":
        raise ValueError(f"unknown --engine={chosen.engine}; use ray, or leave it out")
    ray_engine.import_ray()
    opening = ray_worker.Opening(
        config.to_dict(),
        str(workdir.path.absolute()),
        os.getcwd(),
        chosen.plugins,
        code_version.describe(),
        has_board,
    )
    return RayEngine(chosen.cluster, ray_worker.Worker, opening)
