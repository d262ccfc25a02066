"""Linear algebra of many blocks on the host: order, threads, what is in hand, errors."""

import threading

import numpy as np
import pytest
import threadpoolctl

from tda import host_blas


def threads() -> list[int]:
    """How many threads each BLAS library would take."""
    return [x["num_threads"] for x in threadpoolctl.threadpool_info() if x["user_api"] == "blas"]


def test_results_are_in_the_order_of_the_blocks():
    first = threading.Event()

    def late(i):
        if i == 0:
            assert first.wait(10)
        elif i == 1:
            first.set()
        return 10 * i

    assert host_blas.each(late, range(5), workers=2) == [0, 10, 20, 30, 40]
    assert host_blas.each(late, [], workers=2) == []


def test_a_call_takes_one_thread_and_the_rest_is_put_back():
    with threadpoolctl.threadpool_limits(2, user_api="blas"):
        before = threads()
        assert set(before) == {2}
        found = host_blas.each(lambda _: threads(), range(3), workers=2)
        assert all(set(x) == {1} for x in found)
        assert threads() == before
        with pytest.raises(np.linalg.LinAlgError):
            host_blas.each(np.linalg.inv, [np.eye(2), np.zeros((2, 2))], workers=2)
        assert threads() == before


def test_no_more_blocks_are_taken_than_there_are_workers():
    """Blocks may be made as they are asked for, each as large as a device's memory allows."""
    in_hand, most, lock = 0, 0, threading.Lock()

    def blocks():
        nonlocal in_hand, most
        for i in range(20):
            with lock:
                in_hand += 1
                most = max(most, in_hand)
            yield i

    def done(i):
        nonlocal in_hand
        with lock:
            in_hand -= 1
        return i

    assert host_blas.each(done, blocks(), workers=3) == list(range(20))
    assert most <= 4
