"""Progress of long work: done, rate and time left, on standard error."""

import sys
from collections.abc import Callable

from tqdm import tqdm

from tda.runtime import processes

# Told the name of the work, the amount that is done and the whole amount (0: not known).
Progress = Callable[[str, int, int], None]


def silent(what: str, done: int, total: int) -> None:
    """Shows no progress."""


def counted(on_progress: Progress, what: str, total: int) -> Callable[[int], None]:
    """Returns a function that reports work by the amount added; reports the start at once."""
    done = 0

    def add(count: int) -> None:
        nonlocal done
        done += count
        on_progress(what, done, total)

    on_progress(what, 0, total)
    return add


def bar(total: int, what: str, unit: str, done: int = 0, quiet: bool = False) -> tqdm:
    """A progress bar that also suits a log file: a line is rewritten at most every few seconds.

    Of several processes the first alone shows it.

    Args:
        total: amount of work, in `unit`.
        what: name of the work.
        unit: what is counted, such as "token".
        done: how much was done before (a resumed run).
        quiet: shows nothing: the work is too little to watch.
    """
    slow = not sys.stderr.isatty()
    return tqdm(
        total=total,
        desc=what,
        unit=unit,
        initial=done,
        unit_scale=True,
        mininterval=10 if slow else 0.5,
        dynamic_ncols=True,
        smoothing=0.05,
        file=sys.stderr,
        disable=quiet or not processes.is_first(),
    )
