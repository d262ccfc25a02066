"""Ray as the engine: workers on the machines of a Ray cluster compute groups on demand.

Ray places the workers, restarts those that died, and repeats their calls. This program gives each
free worker the next group, and checks for the results on disk. A group that takes longer than any
other also goes to a second worker, since a worker whose machine is gone waits for another machine,
and its group with it. Ray is optional: pip install 'tda-jax[ray]'.
"""

import collections
import contextlib
import dataclasses
import time
from collections.abc import Callable
from typing import Any

from tda.runtime import on_demand, preemption, progress
from tda.runtime.engine import Engine, Work

# How often one group's worker may die: a single death may be a machine that was taken away, many in
# a row are a program that crashes.
_RETRIES = 8
# Seconds: groups that take no longer are not given to a second worker.
_SHORTEST_STRAGGLER = 10.0
# Seconds until results that workers have written must be seen here.
_PATIENCE = 120.0


class RayError(ValueError):
    """Ray is not installed, its cluster cannot be used, or workers failed."""


@dataclasses.dataclass(frozen=True)
class Cluster:
    """The Ray cluster, and the resources used of it."""

    address: str = ""
    """The cluster's address; empty for that of RAY_ADDRESS, or else a new one on this machine."""

    workers: int = 0
    """The number of workers; 0 for as many as the cluster has room for."""

    resources: tuple[tuple[str, float], ...] = (("CPU", 1.0),)
    """The resources reserved for each worker, such as CPU, GPU and TPU."""

    @property
    def has_accelerators(self) -> bool:
        """Whether workers have GPUs, TPUs or the like."""
        return any(name not in ("CPU", "memory") for name, _ in self.resources)


def import_ray():
    """Imports Ray when it is first needed, since it is optional.

    Raises:
        RayError: it cannot be imported.
    """
    try:
        import ray
    except ImportError as error:
        raise RayError(
            f"--engine=ray needs Ray, which cannot be imported ({error}); install it by "
            "pip install 'tda-jax[ray]', on every machine of the cluster"
        ) from error
    return ray


@dataclasses.dataclass
class _Call:
    """A call of a worker: a work and the number of a group."""

    worker: Any
    work: str
    number: int
    since: float


class RayEngine(Engine):
    """The engine of the program that drives the run.

    Args:
        cluster: the cluster.
        worker: a class with the methods `open()` and `compute(work, number)`.
        arguments: the arguments of that class, the same on every machine.
    """

    # A worker that starts its stages again passes through all finished work.
    has_readers = True

    def __init__(self, cluster: Cluster, worker: type, *arguments: Any):
        # This program leaves accelerators to the workers.
        self.can_train = not cluster.has_accelerators
        self.programs = on_demand.PROGRAMS
        self._cluster, self._worker, self._arguments = cluster, worker, arguments
        self._opening: dict[Any, Any] = {}
        self._idle: list = []
        self._calls: dict[Any, _Call] = {}

    def compute(self, work: Work) -> None:
        """See `tda.runtime.engine.Engine`.

        Raises:
            RayError: no worker can be started, or results do not appear.
            Exception: a group's own error.
        """
        missing = work.find_missing()
        if missing:
            if not (self._idle or self._opening or self._calls):
                self._start()
            name = f"{work.name.partition('-')[0]} (groups)"
            with progress.bar(len(missing), name, "group", saves_work=True) as bar:
                self._distribute(work.name, missing, bar.update)
            end = time.monotonic() + _PATIENCE
            while left := work.list_missing():
                if time.monotonic() > end:
                    raise RayError(
                        f"the workers have computed {work.name}, and {len(left)} of its results "
                        "are not here; do all machines share the workdir?"
                    )
                preemption.check()
                time.sleep(0.2)
        work.compute([])  # for its progress

    def _start(self) -> None:
        """Starts the workers, which open the run."""
        ray, cluster = import_ray(), self._cluster
        if not ray.is_initialized():
            try:
                ray.init(
                    address=cluster.address or None,
                    log_to_driver=False,
                    logging_level="WARNING",
                    **({} if cluster.address else {"include_dashboard": False}),
                )
            except (ConnectionError, RuntimeError, ValueError) as error:
                raise RayError(f"--ray_address={cluster.address}: {error}") from error
        available = ray.cluster_resources()
        room = min(int(available.get(name, 0) / share) for name, share in cluster.resources)
        needs = ", ".join(f"{name}={share:g}" for name, share in cluster.resources)
        if not room:
            raise RayError(
                f"a worker of --worker_resources={needs} does not fit the Ray cluster, which has "
                + ", ".join(f"{name}={n:g}" for name, n in sorted(available.items()))
            )
        by_name = dict(cluster.resources)
        options = {
            "num_cpus": by_name.pop("CPU", 0),
            "num_gpus": by_name.pop("GPU", 0),
            "resources": by_name,
            "max_restarts": -1,
            "max_task_retries": _RETRIES,
        }
        actor = ray.remote(self._worker).options(**options)
        for _ in range(cluster.workers or room):
            worker = actor.remote(*self._arguments)
            # A worker gets groups once it has opened the run: some may wait for a machine.
            self._opening[worker.open.remote()] = worker

    def _distribute(self, name: str, missing: list[int], on_done: Callable[[int], None]) -> None:
        ray = import_ray()
        waiting, done = collections.deque(missing), set[int]()
        longest = _SHORTEST_STRAGGLER
        while len(done) < len(missing):
            while self._idle and (number := self._next(name, waiting, done, longest)) is not None:
                worker = self._idle.pop()
                call = _Call(worker, name, number, time.monotonic())
                self._calls[worker.compute.remote(name, number)] = call
            references = [*self._opening, *self._calls]
            ready, _ = ray.wait(references, num_returns=1, timeout=1.0)
            preemption.check()
            for reference in ready:
                call = self._calls.pop(reference, None)
                is_current = call is not None and call.work == name and call.number not in done
                self._idle.append(call.worker if call else self._opening.pop(reference))
                try:
                    ray.get(reference)
                except ray.exceptions.RayTaskError as error:
                    # An earlier call failed, but another worker has finished its group.
                    if call is None or is_current:
                        raise error.cause from error
                except ray.exceptions.RayError as error:
                    raise RayError(f"a worker of Ray is gone: {error}") from error
                if is_current:
                    done.add(call.number)
                    longest = max(longest, time.monotonic() - call.since)
                    on_done(1)

    def _next(
        self, name: str, waiting: collections.deque, done: set[int], longest: float
    ) -> int | None:
        """Returns the group that a free worker computes next; None if there is none."""
        if waiting:
            return waiting.popleft()
        calls = [c for c in self._calls.values() if c.work == name and c.number not in done]
        counts = collections.Counter(c.number for c in calls)
        now = time.monotonic()
        late = [c.number for c in calls if counts[c.number] == 1 and now - c.since > longest]
        return late[0] if late else None

    def close(self) -> None:
        """Ends the workers, and the cluster if it was started here."""
        with contextlib.suppress(RayError):
            ray = import_ray()
            if ray.is_initialized():
                workers = [*self._idle, *self._opening.values()]
                for worker in workers + [c.worker for c in self._calls.values()]:
                    ray.kill(worker)
                ray.shutdown()
