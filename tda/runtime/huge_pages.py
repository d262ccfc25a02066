"""Large arrays on huge pages, where Linux gives them to programs that ask.

XLA's CPU backend allocates its buffers anew in every step, and touching them page by page took a
third of a training step. glibc asks for huge pages if an environment variable says so when a
program starts; so the program is started once more with it.
"""

import os
import pathlib
import sys

_TUNABLE = "glibc.malloc.hugetlb=1"
_SETTING = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")


def use() -> None:
    """Restarts this program with huge pages for large arrays, if that changes anything.

    Nothing happens where the system has none to ask for, or where `GLIBC_TUNABLES` is set already
    (to an empty string, to go without). To be called before any work is done.
    """
    if "GLIBC_TUNABLES" in os.environ or not _asked_for():
        return
    environment = os.environ | {"GLIBC_TUNABLES": _TUNABLE}
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def _asked_for() -> bool:
    """Whether programs get huge pages if they ask, and only then."""
    try:
        return "[madvise]" in _SETTING.read_text()
    except OSError:
        return False
