"""Linear algebra of many blocks on the host: one thread for each block, one block for each core.

The threads of a BLAS call wait for each other by spinning. If another process, or JAX itself, uses
the same cores, such a call takes far longer than the same call on one thread.
"""

import collections
import concurrent.futures
import contextlib
import importlib
import os
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import numpy as np
import threadpoolctl

U = TypeVar("U")

_MEMORY = 8 << 30
# In units of a float32 block: the block in float64 (2), LAPACK's working memory and the result.
_COPIES = 4


def one_thread() -> contextlib.AbstractContextManager:
    """Limits BLAS and LAPACK calls, NumPy's or JAX's on a CPU, to one thread inside the context."""
    # JAX takes LAPACK from SciPy's library, and only libraries that are loaded can be limited.
    importlib.import_module("scipy.linalg")
    return threadpoolctl.threadpool_limits(1, user_api="blas")


def cores() -> int:
    """Returns the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def map_blocks(
    function: Callable[[Any], U],
    blocks: Iterable[np.ndarray | tuple[np.ndarray, ...]],
    workers: int | None = None,
    memory: int = _MEMORY,
) -> list[U]:
    """Calls `function` on each block, several at a time; returns the results in order.

    Args:
        function: a function that spends its time in NumPy, which releases the interpreter's lock.
        blocks: the blocks, or the matrices of each; the iterable is advanced only as needed.
        workers: the number of blocks at a time; `cores()` by default.
        memory: the most bytes of all blocks in progress, with their copies; one block always fits.
    """
    workers = workers or cores()
    results: list[U] = []
    running: collections.deque[tuple[int, concurrent.futures.Future]] = collections.deque()
    with one_thread(), concurrent.futures.ThreadPoolExecutor(workers) as pool:
        for block in blocks:
            matrices = block if isinstance(block, tuple) else (block,)
            size = _COPIES * sum(x.nbytes for x in matrices)
            while running and (
                len(running) == workers or sum(s for s, _ in running) + size > memory
            ):
                results.append(running.popleft()[1].result())
            running.append((size, pool.submit(function, block)))
        results.extend(future.result() for _, future in running)
    return results
