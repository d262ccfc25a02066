"""Timing in turns, and files of figures with the machine that they were measured on."""

import os
import platform
import time
from collections.abc import Callable, Iterable

import jax
from absl import flags

from tda.runtime import atomic_file

JSON = flags.DEFINE_string("json", None, "File that all figures are written to.")


def in_turns(
    sides: dict[str, Callable],
    rounds: int,
    warm_ups: int = 2,
    before: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Returns the seconds of every side in every round, after warm-up calls.

    A round calls each side once, so that a slow spell of the machine slows all sides. `before` is
    called before every timed call, and is not timed.
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
        batches: rising numbers; if the first does not fit, its halves are tried.
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
    """Drops files from the page cache, as far as the system allows."""
    for name in files:
        descriptor = os.open(name, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def machine() -> dict:
    """Describes the machine that the figures are measured on."""
    device = jax.devices()[0]
    return {
        "device": device.device_kind if device.platform != "cpu" else _processor(),
        "platform": device.platform,
        "devices": jax.device_count(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "jax": jax.__version__,
    }


def write(name: str, figures: dict) -> None:
    """Writes figures, with machine and versions, to the file of `--json` if it is given."""
    if JSON.value:
        record = {"benchmark": name, "machine": machine(), "figures": figures}
        atomic_file.write_json(JSON.value, record)


def _processor() -> str:
    """Returns the processor's name, if the system states it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(x.split(":")[1].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
