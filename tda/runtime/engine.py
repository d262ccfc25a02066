"""Who computes which group of a stage's work: one seam for all stages and all engines.

A stage cuts its work into groups (of rows, shards, queries), numbered from 0. A group's result lies
on disk, whole or not at all, and does not depend on who computed it. A stage describes this as a
`Work`; an engine has the missing groups computed, wherever it likes, and returns once none is
missing. The stage then reduces the results in their order.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence

from tda.runtime import processes

# Seconds between looks for other processes' results, at most.
_LONGEST_PAUSE = 10.0


@dataclasses.dataclass(frozen=True)
class Work:
    """A stage's work in numbered groups, each of which leaves a result on disk."""

    name: str
    """Says all that the results depend on; the same in every process."""

    compute: Callable[[Sequence[int]], None]
    """Computes these groups, one after the other, and writes each one's result."""

    find_missing: Callable[[], list[int]]
    """Returns the numbers of the groups without a result; may remove results that are damaged."""

    list_missing: Callable[[], list[int]]
    """Returns them by the results' names alone, since it is called again and again."""

    is_joint: bool = False
    """Whether all processes compute every group together, on devices that they share."""

    precedes_training: bool = False
    """Whether it is done before the model is trained, also by programs that cannot train."""


class Engine:
    """Decides who computes which groups.

    Attributes:
        party: identity of the jobs that work on the run at the same time, each by itself (the tasks
            of an array, Ray's workers); empty where one job works alone. None of several may remove
            what the others may still read.
        can_train: whether this program may train the model, which is not split into groups.
        programs: how many programs of a party share the work, or a guess that is the same in all;
            0 where one job works alone.
    """

    party: str = ""
    can_train: bool = True
    programs: int = 0

    def compute(self, work: Work) -> None:
        """Returns once no group of the work is missing.

        Every process of a run calls it, with the same work.
        """
        raise NotImplementedError

    def asks_for(self, name: str) -> bool:
        """Returns whether this process is there for groups of a work that has this in its name.

        A worker that joins late may find parts of such a work finished, and must describe the work
        as it was described when it began.
        """
        return False

    def alone(self) -> contextlib.AbstractContextManager:
        """Keeps the other jobs of the party out of what is not split.

        Inside, a job looks first whether another has done it meanwhile.
        """
        return contextlib.nullcontext()

    def close(self) -> None:
        """Ends what the engine has started."""


class Processes(Engine):
    """This process, or the processes of a `jax.distributed` run.

    The groups that are missing when the work begins are split evenly.
    """

    def compute(self, work: Work) -> None:
        """See `Engine`."""
        # Process 0 looks for all: the processes must agree on who computes what.
        missing = processes.on_first_process(f"look for groups of {work.name}", work.find_missing)
        work.compute(missing if work.is_joint else processes.share(missing))
        if not work.is_joint:
            processes.wait_until(lambda: not work.list_missing(), _LONGEST_PAUSE)


# Of runs that name no other.
PROCESSES = Processes()
