"""Linear algebra of many blocks on the host: one thread a block, a block for each core at a time.

Threads of one BLAS call wait for each other by spinning. Where another process, or JAX itself, is
at work on the same cores, that takes far longer than the call alone on one thread.
"""

import collections
import concurrent.futures
import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import threadpoolctl

T = TypeVar("T")
U = TypeVar("U")


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Within it a BLAS or LAPACK call, NumPy's or JAX's on a CPU, takes one thread."""
    with threadpoolctl.threadpool_limits(1, user_api="blas"):
        yield


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def each(function: Callable[[T], U], blocks: Iterable[T], workers: int | None = None) -> list[U]:
    """`function` of each block, in their order.

    Args:
        function: its time should be spent in NumPy, which lets other threads run meanwhile.
        blocks: taken as they are needed: at most `workers` are in hand.
        workers: how many at a time; `cores` by default.
    """
    workers = workers or cores()
    out: list[U] = []
    running: collections.deque[concurrent.futures.Future] = collections.deque()
    with one_thread(), concurrent.futures.ThreadPoolExecutor(workers) as pool:
        for block in blocks:
            if len(running) == workers:
                out.append(running.popleft().result())
            running.append(pool.submit(function, block))
        out.extend(found.result() for found in running)
    return out
