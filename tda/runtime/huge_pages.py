"""Requests huge pages for large arrays, on systems where Linux gives them on request.

XLA's CPU backend allocates its buffers anew in every step, and touching them page by page took a
third of a training step. glibc requests huge pages only if an environment variable says so when a
program starts, so the program is restarted with that variable.
"""

import os
import pathlib
import sys

_TUNABLE = "glibc.malloc.hugetlb=1"
_KERNEL_SETTING = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")


def use() -> None:
    """Restarts this program with huge pages for large arrays, if that changes anything.

    Does nothing if the system has no huge pages on request, or if `GLIBC_TUNABLES` is set already
    (set it to an empty string to go without). Call it before any work is done.
    """
    if "GLIBC_TUNABLES" in os.environ or not _on_request():
        return
    environment = os.environ | {"GLIBC_TUNABLES": _TUNABLE}
    sys.stdout.flush()
    os.execve(sys.executable, sys.orig_argv, environment)


def _on_request() -> bool:
    """Returns whether programs get huge pages only on request."""
    try:
        return "[madvise]" in _KERNEL_SETTING.read_text()
    except OSError:
        return False
