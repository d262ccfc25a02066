"""Progress of long work: done, rate and time left, on standard error."""

import sys
from collections.abc import Callable

from tqdm import tqdm

from tda.runtime import processes

# Called with the name of the work, the amount that is done and the total (0 if not known).
Progress = Callable[[str, int, int], None]


def silent(work: str, done: int, total: int) -> None:
    """Shows no progress."""


def counted(on_progress: Progress, work: str, total: int) -> Callable[[int], None]:
    """Returns a function that reports work by the amount added; reports the start at once."""
    done = 0

    def add(count: int) -> None:
        nonlocal done
        done += count
        on_progress(work, done, total)

    on_progress(work, 0, total)
    return add


def bar(total: int | None, description: str, unit: str, done: int = 0, quiet: bool = False) -> tqdm:
    """Returns a progress bar that also suits a log file: its line is rewritten every few seconds.

    Of several processes only process 0 shows it.

    Args:
        total: amount of work, in `unit`; None if not known.
        description: the name of the work.
        unit: the unit of work, such as "token".
        done: amount done before (a resumed run).
        quiet: whether nothing is shown.
    """
    # A log file keeps every line that a terminal would overwrite.
    is_log = not sys.stderr.isatty()
    return tqdm(
        total=total,
        desc=description,
        unit=unit,
        initial=done,
        unit_scale=True,
        mininterval=10 if is_log else 0.5,
        dynamic_ncols=True,
        smoothing=0.05,
        file=sys.stderr,
        disable=quiet or not processes.is_first(),
    )
