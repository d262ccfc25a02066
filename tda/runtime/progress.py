"""Progress of long work: done, rate and time left, on standard error."""

import contextlib
import contextvars
import re
import sys
import time
import weakref
from collections.abc import Callable, Iterator

import jax
from tqdm import tqdm

from tda.runtime import metrics, processes

# Called with the name of the work, the finished amount and the total (0 if not known).
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


# Seconds between two points of a bar's series in `tda.runtime.metrics`.
_LOG_SECONDS = 10.0


class _Bar(tqdm):
    """A progress bar that says "compiling" until its first step is done, if that compiles anything.

    Compiling a large model's first batch takes minutes, in which a bar at 0 looks like a hang.
    """

    saves_work = False
    logged = 0.0

    def update(self, n=1):
        self.postfix = None
        if not self.saves_work:
            processes.check_preemption_alone()
        shown = super().update(n)
        # Rarely, since a bar may be updated a thousand times a second.
        if time.monotonic() > self.logged + _LOG_SECONDS:
            self._log()
        return shown

    def close(self):
        self._log()
        super().close()

    def _log(self):
        # A disabled bar (of another process, or closed) has no other attributes.
        if self.disable or self.n == self.initial:
            return
        self.logged = time.monotonic()
        per_second = (self.n - self.initial) / max(time.time() - self.start_t, 1e-9)
        values = {f"{self.unit}s_per_second": per_second}
        if self.total:
            values["share"] = self.n / self.total
        name = re.sub(r"\W+", "_", self.desc.removesuffix(": ")).strip("_")
        metrics.log(f"progress/{name}", int(self.n), values)


_open_bars: weakref.WeakSet[_Bar] = weakref.WeakSet()


def _show_compiling(event: str, seconds: float, **details) -> None:
    # JAX reports the end of each step: after lowering, XLA's compiler runs.
    if event != "/jax/core/compile/jaxpr_to_mlir_module_duration":
        return
    for bar in list(_open_bars):
        # A closed bar is disabled, and a disabled one has no other attributes.
        if not bar.disable and bar.n == bar.initial and not bar.postfix:
            bar.set_postfix_str("compiling")


jax.monitoring.register_event_duration_secs_listener(_show_compiling)


_is_hidden = contextvars.ContextVar("is_hidden", default=False)


@contextlib.contextmanager
def hidden(quiet: bool = True) -> Iterator[None]:
    """Shows no progress bar inside and prints no note (`tell`), if `quiet`.

    Threads that are started inside show theirs.
    """
    token = _is_hidden.set(quiet or _is_hidden.get())
    try:
        yield
    finally:
        _is_hidden.reset(token)


def tell(text: str) -> None:
    """Prints a note, unless progress is hidden."""
    if not _is_hidden.get():
        print(text)


def bar(
    total: int | None, description: str, unit: str, done: int = 0, saves_work: bool = False
) -> tqdm:
    """Returns a progress bar that also suits a log file: its line is rewritten every few seconds.

    Only process 0 shows it.

    Args:
        total: amount of work, in `unit`; None if not known.
        description: the name of the work.
        unit: the unit of work, such as "token".
        done: amount done before (a resumed run).
        saves_work: whether the work itself stops at a notice of preemption, once it has saved its
            results; otherwise `update` stops it, where no other process takes part.
    """
    # A log file keeps every line that a terminal would overwrite.
    is_log = not sys.stderr.isatty()
    progress_bar = _Bar(
        total=total,
        desc=description,
        unit=unit,
        initial=done,
        unit_scale=True,
        mininterval=10 if is_log else 0.5,
        dynamic_ncols=True,
        smoothing=0.05,
        file=sys.stderr,
        disable=_is_hidden.get() or not processes.is_first(),
    )
    progress_bar.saves_work = saves_work
    _open_bars.add(progress_bar)
    return progress_bar
