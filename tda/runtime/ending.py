"""What a program says when it ends by an error."""

import os
import traceback

import jax

from tda.runtime import processes


def describe_error(error: Exception, workdir: str | None) -> str:
    """Returns an error's line with what to do, and writes its traceback into the workdir.

    Args:
        error: the error that is being handled.
        workdir: the directory of the run's files, if there is one.
    """
    is_local = workdir is not None and "://" not in workdir
    traceback_note = _write_traceback(workdir) if is_local else ""
    advice = ""
    if "No space left" in str(error) and workdir is not None:
        advice = (
            f"\nthe disk of --workdir={workdir} is full: free some space and run the same "
            "command again; it continues where it stopped"
        )
    process = f" in process {jax.process_index()}" if jax.process_count() > 1 else ""
    return f"error{process}: {error}{advice}{traceback_note}"


def _write_traceback(workdir: str) -> str:
    """Writes the traceback to a file of the workdir; returns a note that names the file."""
    number = "" if processes.is_first() else f"-{jax.process_index()}"
    path = os.path.join(workdir, f"error{number}.txt")
    try:
        with open(path, "w", encoding="utf-8") as file:
            file.write(traceback.format_exc())
    except OSError:
        traceback.print_exc()
        return ""
    return f"\n(traceback in {path})"
