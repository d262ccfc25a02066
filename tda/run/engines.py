"""Which engine a run's command line asks for."""

import re

import jax
from ml_collections import ConfigDict

from tda.run.workdir import Workdir
from tda.runtime.array_tasks import ArrayTask
from tda.runtime.engine import PROCESSES, Engine
from tda.runtime.fingerprint import fingerprint


def choose_engine(
    config: ConfigDict, workdir: Workdir, groups: str | None, patience: float
) -> Engine:
    """Returns the engine that the flags ask for.

    Args:
        config: the run's config.
        workdir: the run's workdir.
        groups: the part of a task of an array, "I/N", or "none"; None for this process, or those
            that are joined.
        patience: seconds that a task waits for others.

    Raises:
        ValueError: a flag is malformed, or does not fit another.
    """
    if groups is None:
        return PROCESSES
    if jax.process_count() > 1:
        raise ValueError(
            f"--groups={groups} is for programs that are not joined; leave out --distributed and "
            "--coordinator, or --groups"
        )
    if groups == "none":
        return ArrayTask(0, 0, workdir.path, "", patience)
    match = re.fullmatch(r"(\d+)/(\d+)", groups)
    if not match or not int(match[1]) < int(match[2]):
        raise ValueError(
            f"--groups={groups} must be I/N, with the task's number I from 0 to N−1, or none"
        )
    index, count = map(int, match.groups())
    # The tasks of one array have the same config and the same count.
    party = f"{count} tasks, {fingerprint(config.to_json())}"
    return ArrayTask(index, count, workdir.path, party, patience)
