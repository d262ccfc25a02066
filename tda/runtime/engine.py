"""Engines assign the groups of a stage's work to processes: one interface for all stages.

A stage cuts its work into groups (of rows, shards, queries), numbered from 0. A group's result is
on disk, whole or not at all, and does not depend on the process that computed it. A stage describes
this as a `Work`; an engine has the missing groups computed, on any machine, and returns once none
is missing. The stage then reduces the results in their order.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence

from tda.runtime import processes

# The most seconds between two checks for other processes' results.
_LONGEST_PAUSE = 10.0


@dataclasses.dataclass(frozen=True)
class Work:
    """A stage's work in numbered groups, each of which leaves a result on disk."""

    name: str
    """Identifies everything that the results depend on; the same in every process."""

    compute: Callable[[Sequence[int]], None]
    """Computes these groups, one after the other, and writes each one's result."""

    find_missing: Callable[[], list[int]]
    """Returns the numbers of the groups without a result; may remove results that are damaged."""

    list_missing: Callable[[], list[int]]
    """Returns them by the results' file names alone, since it is called repeatedly."""

    is_joint: bool = False
    """Whether all processes compute every group together, on devices that they share."""

    precedes_training: bool = False
    """Whether it comes before the training, so that programs that cannot train do it too."""


class Engine:
    """Decides which process computes which groups.

    Attributes:
        party: identity of the jobs that work on the run at the same time, each by itself (the tasks
            of an array, Ray's workers); empty if one job works alone.
        can_train: whether this program may train the model, which is not split into groups.
        programs: how many programs of a party share the work, or a guess that is the same in all;
            0 if one job works alone.
    """

    party: str = ""
    can_train: bool = True
    programs: int = 0

    @property
    def has_readers(self) -> bool:
        """Whether other programs may read what this one has finished with, until it ends."""
        return self.party != ""

    def compute(self, work: Work) -> None:
        """Returns once no group of the work is missing.

        Every process of a run calls it, with the same work.
        """
        raise NotImplementedError

    def asks_for(self, name: str) -> bool:
        """Returns whether this process was asked for groups of a work whose name contains `name`.

        A worker that joins late may find parts of such a work finished, and must describe the work
        as it was described at its beginning.
        """
        return False

    def alone(self) -> contextlib.AbstractContextManager:
        """Excludes the other jobs of the party, for work that is not split.

        Inside, a job first checks whether another has already done the work.
        """
        return contextlib.nullcontext()

    def close(self) -> None:
        """Ends the processes that the engine has started."""


class Processes(Engine):
    """This process, or the processes of a `jax.distributed` run.

    The groups that are missing when the work begins are split evenly.
    """

    def compute(self, work: Work) -> None:
        """See `Engine`."""
        # Process 0 looks for all, since the processes must agree on the split.
        missing = processes.on_first_process(f"look for groups of {work.name}", work.find_missing)
        work.compute(missing if work.is_joint else processes.share(missing))
        if not work.is_joint:
            processes.wait_until(lambda: not work.list_missing(), _LONGEST_PAUSE)


# The engine of runs that name no other.
PROCESSES = Processes()
