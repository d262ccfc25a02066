"""Timing in turns, and the record of what was measured on what."""

import json
import os
import platform
import time
from collections.abc import Callable, Iterable

import jax

from tda.runtime import atomic_file


def in_turns(
    sides: dict[str, Callable],
    rounds: int,
    warm_ups: int = 2,
    before: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of every side in every round; each side is called before, to warm up.

    A round calls each side once, so that what slows the machine down slows all sides. `before` is
    called ahead of every call that is timed, off the `clock`.
    """
    for call in sides.values():
        for _ in range(warm_ups):
            jax.block_until_ready(call())
    times = {name: [] for name in sides}
    for _ in range(rounds):
        for name, call in sides.items():
            before()
            started = clock()
            jax.block_until_ready(call())
            times[name].append(clock() - started)
    return times


def is_out_of_memory(error: Exception) -> bool:
    """Returns whether an error, also of another process, says that memory is too small."""
    text = str(error).lower()
    return "resource_exhausted" in text or "out of memory" in text


def best_batch(rate_of: Callable[[int], float], batches: list[int]) -> dict[int, float]:
    """Returns tokens/s by sequences in a batch, of all that were tried; empty if none fits.

    Args:
        rate_of: returns the rate of a number of sequences.
        batches: rising numbers; halves of the first are tried where not even that one fits.
    """
    rates: dict[int, float] = {}

    def fits(batch: int) -> bool:
        try:
            rates[batch] = rate_of(batch)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        return batch in rates

    for batch in batches:
        if not fits(batch) or rates[batch] < 0.9 * max(rates.values()):
            break
    smaller = batches[0] // 2
    while not rates and smaller:
        fits(smaller)
        smaller //= 2
    return rates


def forget(files: Iterable) -> None:
    """Takes files out of the page cache, as far as the system lets."""
    for name in files:
        descriptor = os.open(name, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def machine() -> dict:
    """What the figures were measured on."""
    device = jax.devices()[0]
    return {
        "device": device.device_kind if device.platform != "cpu" else _processor(),
        "platform": device.platform,
        "devices": jax.device_count(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "jax": jax.__version__,
    }


def write(path: str, name: str, figures: dict) -> None:
    """Writes figures as JSON, with the machine and the versions."""
    with atomic_file.open_atomic(path) as out:
        json.dump({"benchmark": name, "machine": machine(), "figures": figures}, out, indent=1)
        out.write("\n")


def _processor() -> str:
    """The processor's name, where the system tells it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(x.split(":")[1].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
