"""Linear algebra of many blocks on the host: order, threads, what is in hand, errors."""

import json
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import threadpoolctl

from tda.runtime import host_blas


def numbers(count: int):
    """Blocks of 8 bytes, made as they are asked for."""
    return (np.array([float(i)]) for i in range(count))


def threads() -> list[int]:
    """How many threads each BLAS library would take."""
    return [x["num_threads"] for x in threadpoolctl.threadpool_info() if x["user_api"] == "blas"]


def test_results_are_in_the_order_of_the_blocks():
    first = threading.Event()

    def late(block):
        i = int(block[0])
        if i == 0:
            assert first.wait(10)
        elif i == 1:
            first.set()
        return 10 * i

    assert host_blas.map_blocks(late, numbers(5), workers=2) == [0, 10, 20, 30, 40]
    assert host_blas.map_blocks(late, [], workers=2) == []


def test_a_call_takes_one_thread_and_the_rest_is_put_back():
    with threadpoolctl.threadpool_limits(2, user_api="blas"):
        before = threads()
        assert set(before) == {2}
        found = host_blas.map_blocks(lambda _: threads(), numbers(3), workers=2)
        assert all(set(x) == {1} for x in found)
        assert threads() == before
        with pytest.raises(np.linalg.LinAlgError):
            host_blas.map_blocks(np.linalg.inv, [np.eye(2), np.zeros((2, 2))], workers=2)
        assert threads() == before


def test_jaxs_decompositions_take_one_thread_the_first_time_too():
    """Guards: eigenvectors that depend on what a process computed before."""
    program = (
        "import jax.numpy as jnp, threadpoolctl\n"
        "from tda.runtime import host_blas\n"
        "with host_blas.one_thread():\n"
        "    jnp.linalg.eigh(jnp.eye(4))[0].block_until_ready()\n"
        "    info = threadpoolctl.threadpool_info()\n"
        "print([x['num_threads'] for x in info if x['user_api'] == 'blas'])"
    )
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, check=True
    )
    assert set(json.loads(done.stdout)) == {1}


@pytest.mark.parametrize(
    ("memory", "expected"),
    [(1 << 30, 3), (host_blas._COPIES * 16, 2), (1, 1)],
    ids=["workers", "memory", "one at least"],
)
def test_no_more_blocks_are_at_work_than_fit(memory, expected):
    """Blocks may be made as they are asked for, each as large as memory allows."""
    at_work, most, lock = 0, 0, threading.Lock()
    full = threading.Event()

    def work(block):
        nonlocal at_work, most
        with lock:
            at_work += 1
            most = max(most, at_work)
            if at_work >= expected:
                full.set()
        # Long enough for another to come, if it may.
        assert full.wait(10)
        time.sleep(0.02)
        with lock:
            at_work -= 1
        return int(block[0])

    found = host_blas.map_blocks(work, numbers(9), workers=3, memory=memory)
    assert found == list(range(9)) and most == expected
