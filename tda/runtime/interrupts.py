"""Makes Ctrl-C reach the program even where its exception is dropped on the way."""

import signal
import sys
import threading

# Seconds in which the program may end by itself before the signal is repeated.
_GRACE = 5.0


def watch() -> None:
    """Repeats each Ctrl-C until the program ends; must be called in the main thread."""
    # Python drops exceptions in a finaliser or a callback of the garbage collector, and jax has
    # such a callback; asyncio drops a Ctrl-C that comes as its last task ends.
    sys.unraisablehook = _repeat_if_dropped
    # A program that a shell started in the background ignores Ctrl-C.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _take)


def _take(number, frame) -> None:
    _repeat_after(_GRACE)
    raise KeyboardInterrupt


def _repeat_if_dropped(unraisable) -> None:
    if issubclass(unraisable.exc_type, KeyboardInterrupt):
        # A moment later, since an exception in this hook would be dropped too.
        _repeat_after(0.05)
    else:
        sys.__unraisablehook__(unraisable)


def _repeat_after(seconds: float) -> None:
    # A signal to the main thread, which wakes it if it waits.
    main = threading.main_thread().ident
    timer = threading.Timer(seconds, signal.pthread_kill, (main, signal.SIGINT))
    timer.daemon = True
    timer.start()
