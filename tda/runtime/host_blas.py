"""Linear algebra of many blocks on the host: one thread a block, a block for each core at a time.

Threads of one BLAS call wait for each other by spinning. Where another process, or JAX itself, is
at work on the same cores, that takes far longer than the call alone on one thread.
"""

import collections
import concurrent.futures
import contextlib
import os
from collections.abc import Callable, Iterable
from typing import TypeVar

import numpy as np
import threadpoolctl

U = TypeVar("U")

_MEMORY = 8 << 30
# A block in float64, and in float32 what LAPACK works in and what comes out.
_COPIES = 4


def one_thread() -> contextlib.AbstractContextManager:
    """Within it a BLAS or LAPACK call, NumPy's or JAX's on a CPU, takes one thread."""
    return threadpoolctl.threadpool_limits(1, user_api="blas")


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def map_blocks(
    function: Callable[[np.ndarray], U],
    blocks: Iterable[np.ndarray],
    workers: int | None = None,
    memory: int = _MEMORY,
) -> list[U]:
    """`function` of each block, in their order.

    Args:
        function: its time should be spent in NumPy, which lets other threads run meanwhile.
        blocks: taken as they are needed, so that they may be made on the way.
        workers: how many at a time; `cores` by default.
        memory: bytes that blocks at work may take, each with copies of it; one is always taken.
    """
    workers = workers or cores()
    out: list[U] = []
    running: collections.deque[tuple[int, concurrent.futures.Future]] = collections.deque()
    with one_thread(), concurrent.futures.ThreadPoolExecutor(workers) as pool:
        for block in blocks:
            size = _COPIES * block.nbytes
            while running and (
                len(running) == workers or sum(s for s, _ in running) + size > memory
            ):
                out.append(running.popleft()[1].result())
            running.append((size, pool.submit(function, block)))
        out.extend(found.result() for _, found in running)
    return out
