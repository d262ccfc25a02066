"""Ends a program before its work is done, with a message that says how to continue."""

import contextlib
import os
import pathlib
import re
import signal
import sys
import traceback

import jax

from tda.runtime import command, directories, preemption, processes

# What a shell reports for a program that Ctrl-C ended: 128 + SIGINT.
_INTERRUPTED = 130
# The traceback of a process or of a task; the first process of a run has no number.
_TRACEBACK = re.compile(r"error(-\d+)?\.txt")


def exit_interrupted(workdir: str | None) -> None:
    """Ends the program after Ctrl-C, and says how to continue."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an impatient second Ctrl-C
    _exit_saying("interrupted", _INTERRUPTED, workdir)


def exit_preempted(notice: preemption.Preempted, workdir: str | None) -> None:
    """Ends the program after SIGTERM, with the other processes, and says how to continue."""
    done = f" {notice} is saved." if str(notice) else ""
    exit_together(f"ended by SIGTERM.{done}".rstrip("."), preemption.EXIT_STATUS, workdir)


def exit_together(event: str, status: int, workdir: str | None, *advice: str) -> None:
    """Ends the program together with the other processes; the first prints the message.

    Args:
        event: the reason.
        status: the exit status.
        workdir: the directory of the run's files, if there is one.
        *advice: a sentence on what to run next, and the command; by default the same command.
    """
    is_first = processes.is_first()
    jax.distributed.shutdown()
    if not is_first:
        os._exit(status)
    _exit_saying(event, status, workdir, *advice)


def exit_with(error: Exception, workdir: str | None, task: str = "") -> None:
    """Ends the program with the error in a line; the traceback goes to a file in the workdir.

    Args:
        error: the error that is being handled.
        workdir: the directory of the run's files, if there is one.
        task: the number of this task of an array, whose traceback has a file of its own.
    """
    # Printed here and not at the interpreter's end, which may not come if another process is gone.
    print(_describe_error(error, workdir, task), file=sys.stderr, flush=True)
    sys.exit(1)


def forget_errors(workdir: str | None) -> None:
    """Removes the tracebacks of earlier tries from the workdir, once its work is finished.

    A task of an array that has done only its part leaves them: another task's may be among them.
    """
    if directories.is_local(workdir):
        for path in pathlib.Path(workdir).glob("error*.txt"):
            if _TRACEBACK.fullmatch(path.name):
                path.unlink(missing_ok=True)


def _exit_saying(
    event: str, status: int, workdir: str | None, advice: str = "", typed: str = ""
) -> None:
    if not advice and workdir:
        advice = f"Finished work is kept in {workdir}; to continue:"
    text = f"\n{event}. {advice or 'To run it again:'}\n  {typed or command.typed()}"
    print(text, file=sys.stderr, flush=True)
    # Not sys.stdout, which abandoned work in another thread may have redirected.
    if sys.__stdout__ is not None:
        with contextlib.suppress(OSError):  # a closed pipe
            sys.__stdout__.flush()
    # Not sys.exit: the interpreter would wait for running threads, or crash in one whose libraries
    # are already gone.
    os._exit(status)


def _describe_error(error: Exception, workdir: str | None, task: str) -> str:
    """Returns an error's line with what to do, and writes its traceback into the workdir."""
    number = task or ("" if processes.is_first() else str(jax.process_index()))
    traceback_note = _write_traceback(workdir, number) if directories.is_local(workdir) else ""
    place = f" in task {task}" if task else ""
    if jax.process_count() > 1:
        place = f" in process {jax.process_index()}"
    return f"error{place}: {error}{describe_remedy(error, workdir)}{traceback_note}"


def describe_remedy(error: Exception, workdir: str | None) -> str:
    """Returns a line that says what to do about an error, where its own does not; else ""."""
    if "No space left" not in str(error) or workdir is None:
        return ""
    return (
        f"\nthe disk of --workdir={workdir} is full: free some space and run the same command "
        "again; it continues where it stopped"
    )


def _write_traceback(workdir: str, number: str) -> str:
    """Writes the traceback to a file of the workdir; returns a note that names the file."""
    # A workdir that cannot be written is the error itself, or one beside which a traceback says
    # nothing: the line is enough.
    if not (os.path.isdir(workdir) and os.access(workdir, os.W_OK)):
        return ""
    path = os.path.join(workdir, f"error-{number}.txt" if number else "error.txt")
    try:
        with open(path, "w", encoding="utf-8") as file:
            file.write(traceback.format_exc())
    except OSError:
        traceback.print_exc()
        return ""
    return f"\n(traceback in {path})"
