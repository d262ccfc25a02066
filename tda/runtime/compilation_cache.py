"""Keeps compiled programs on disk, so that the next process does not compile them again.

A small `tda.trace` spends three quarters of its time in XLA's compiler. JAX can keep what it
compiles (`jax_compilation_cache_dir`), by a key of the program, its options and the version of
jaxlib. This module gives it a folder, unless one is configured already.
"""

import contextlib
import functools
import os
import pathlib
import platform
import tempfile
import threading
from collections.abc import Iterator

import jax
from jax.experimental.compilation_cache import compilation_cache as jax_cache

from tda.runtime.fingerprint import fingerprint

VARIABLE = "TDA_COMPILATION_CACHE"
OFF = "off"
# Seconds. JAX's default, 1, leaves out the many small programs of a trace, half of its compiling.
_LEAST_SECONDS = 0.1
# Bytes of all programs together; a small trace makes 2 MB, a model of 135M parameters 10 MB.
_MOST_BYTES = 1 << 30

_lock = threading.Lock()
_stderr_lock = threading.Lock()
_is_decided = False


def use(folder: str | None = None) -> None:
    """Makes JAX keep compiled programs on disk; only the first call in a process decides.

    Nothing changes if JAX has a folder already, if its cache is disabled, or if several processes
    run together (a program that only some of them load makes the others wait).

    Args:
        folder: the folder of programs; "off" for none. By default the environment variable
            `TDA_COMPILATION_CACHE`, or else `tda` in the user's cache folder (`XDG_CACHE_HOME`,
            ~/.cache), if that can be written.

    Raises:
        OSError: a folder that is named here or by the variable cannot be written.
    """
    global _is_decided
    with _lock:
        if _is_decided:
            return
        _is_decided = True
    named = folder or os.environ.get(VARIABLE)
    is_configured = jax.config.jax_compilation_cache_dir is not None
    if named == OFF or is_configured or not jax.config.jax_enable_compilation_cache:
        return
    if jax.distributed.is_initialized():
        return
    try:
        root = pathlib.Path(named or _user_folder())
        # Programs from this folder are run, so nobody else may write to it.
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        programs = root / f"jaxlib-{jax.lib.__version__}-{_processor()}"
        programs.mkdir(mode=0o700, exist_ok=True)
        _check_owner(programs)
        _remove_oldest(root)
    except (OSError, RuntimeError) as error:
        if named:
            raise OSError(
                f"{named} cannot hold compiled programs ({error}); give a folder that you can "
                f"write, or {OFF!r}, to --compilation_cache or {VARIABLE}"
            ) from error
        return
    jax.config.update("jax_compilation_cache_dir", str(programs))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _LEAST_SECONDS)
    # JAX looks for a folder once, when it compiles for the first time, which may have been before.
    jax_cache.reset_cache()
    _mend_loading(programs)


def _user_folder() -> pathlib.Path:
    """Returns this package's cache folder.

    Raises:
        RuntimeError: the user has no home directory.
    """
    base = os.environ.get("XDG_CACHE_HOME")
    return (pathlib.Path(base) if base else pathlib.Path.home() / ".cache") / "tda"


def _processor() -> str:
    """Returns a hash of the processor's instructions, which JAX's key does not contain.

    Otherwise a home directory shared by several machines would give one of them programs with
    another's instructions.
    """
    features = [platform.machine(), platform.processor()]
    with contextlib.suppress(OSError):
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        names = ("flags", "Features", "model name")
        features += sorted({line for line in lines if line.startswith(names)})
    return fingerprint(features)


def _check_owner(folder: pathlib.Path) -> None:
    status = folder.stat()
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"{folder} cannot be written")
    if hasattr(os, "getuid") and (status.st_uid != os.getuid() or status.st_mode & 0o022):
        raise PermissionError(f"others can write {folder}")


def _remove_oldest(root: pathlib.Path) -> None:
    """Removes the oldest programs, of other versions too, once all take more than a gigabyte.

    JAX's own limit (`jax_compilation_cache_max_size`) needs another package, and a process that is
    killed between its two files of a program leaves a folder that nothing can be added to.
    """
    files = []
    for path in root.glob("jaxlib-*/*"):
        with contextlib.suppress(OSError):  # another process removed it
            files.append((path.stat().st_mtime, path.stat().st_size, path))
    total = sum(size for _, size, _ in files)
    if total <= _MOST_BYTES:
        return
    for _, size, path in sorted(files):
        with contextlib.suppress(OSError):
            path.unlink()
        total -= size
        if total <= _MOST_BYTES // 2:
            return


def _mend_loading(programs: pathlib.Path) -> None:
    """Works around two faults of loading in jax 0.10: a false alarm, and broken files that stay.

    XLA:CPU counts LLVM's preferences `prefer-no-gather` and `prefer-no-scatter` among the features
    of a processor, and so warns of every program that this very machine has compiled, in two long
    lines (openxla/xla#44565). They are written by C++, so they are dropped from the file
    descriptor while a program is loaded. And JAX compiles what it cannot load, but never replaces
    a file that is there: one that a kill cut short is removed.
    """
    with contextlib.suppress(ImportError, AttributeError):
        from jax._src import compilation_cache

        load = compilation_cache.get_executable_and_time

        @functools.wraps(load)
        def load_quietly(key, *arguments, **options):
            with _dropping_false_alarms():
                try:
                    return load(key, *arguments, **options)
                except Exception:
                    (programs / f"{key}-cache").unlink(missing_ok=True)
                    raise

        compilation_cache.get_executable_and_time = load_quietly


def _is_false_alarm(line: bytes) -> bool:
    return b"cpu_aot_loader" in line and b"feature +prefer-no-" in line


@contextlib.contextmanager
def _dropping_false_alarms() -> Iterator[None]:
    # One at a time: two threads would restore each other's descriptor.
    with _stderr_lock, contextlib.ExitStack() as stack:
        try:
            captured = stack.enter_context(tempfile.TemporaryFile())
            original = os.dup(2)
        except OSError:  # no standard error, or no room for a file
            yield
            return
        os.dup2(captured.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(original, 2)
            os.close(original)
            captured.seek(0)
            for line in captured:
                if not _is_false_alarm(line):
                    os.write(2, line)
