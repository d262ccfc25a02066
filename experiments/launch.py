"""Starts a main: parses flags, joins the processes of a run, and prints errors as one line.

Every host of a run calls the same command, with `--distributed` where jax finds the others by
itself (Cloud TPU, SLURM, Open MPI), else with `--coordinator`, `--num_processes`, `--process_id`.
"""

import contextlib
import functools
import os
import sys
import traceback
from collections.abc import Callable

import jax
import tensorflow_datasets as tfds
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from tda.run import idle_keys
from tda.run.registry import load_plugins
from tda.runtime import (
    array_tasks,
    compilation_cache,
    directories,
    ending,
    huge_pages,
    interrupts,
    joining,
    preemption,
    processes,
)

from . import command_line

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "File of the run's config, or the name of a packaged one, such as world_facts."
)
WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run's files.")
DISTRIBUTED = flags.DEFINE_bool(
    "distributed", None, "Join the other processes that a TPU pod, SLURM or Open MPI started."
)
COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, free there.")
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Number of processes.")
COMPILATION_CACHE = flags.DEFINE_string(
    "compilation_cache", None, "Folder of compiled programs, or off; by default ~/.cache/tda."
)
PROCESS_ID = flags.DEFINE_integer("process_id", None, "Number of this process, from 0.")
PLUGIN = flags.DEFINE_list("plugin", [], "Modules that register methods and retrievers.")

# Seconds that a failed process waits for the others to end before it ends them all.
_PATIENCE = 60


def launch(
    main: Callable[[ConfigDict, str | None], None],
    needs_workdir: bool = True,
    tells_idle_keys: bool = False,
    read_engine: Callable | None = None,
) -> None:
    """Parses the command line and calls `main(config, workdir)`.

    Args:
        main: the program.
        needs_workdir: whether `--workdir` is required; without it `main` gets None.
        tells_idle_keys: whether to print the keys of the command line that a run never reads.
        read_engine: returns the flags of the engine (`engine_flags.read`); None if it has none.
    """
    flags.mark_flags_as_required(["config", "workdir"] if needs_workdir else ["config"])
    tfds.disable_progress_bar()

    def run(arguments):
        _refuse_arguments(arguments)
        _join(read_engine)
        preemption.watch()
        try:
            _check_workdir()
            compilation_cache.use(COMPILATION_CACHE.value)
            with contextlib.ExitStack() as quiet:
                if not processes.is_first():
                    nowhere = quiet.enter_context(open(os.devnull, "w"))
                    quiet.enter_context(contextlib.redirect_stdout(nowhere))
                load_plugins(PLUGIN.value)
                if tells_idle_keys:
                    keys = config_flags.get_override_values(flags.FLAGS["config"])
                    for line in idle_keys.describe(CONFIG.value, keys):
                        print(line, flush=True)
                main(CONFIG.value, WORKDIR.value)
            processes.wait_for_all("the end")
            if needs_workdir and processes.is_first():
                ending.forget_errors(WORKDIR.value)
        except preemption.Preempted as notice:
            ending.exit_preempted(notice, WORKDIR.value)
        except array_tasks.Unfinished as rest:
            ending.exit_together(str(rest), rest.status, WORKDIR.value, rest.advice, rest.command)
        except (ValueError, OSError, FloatingPointError, processes.ProcessError) as error:
            ending.exit_with(error, WORKDIR.value, read_engine().task if read_engine else "")
        except Exception:
            if jax.process_count() == 1:
                raise
            # The interpreter would print it too late: after the shutdown, which may end it.
            traceback.print_exc()
            sys.exit(1)
        finally:
            # If all processes failed alike, all come here; if one did, this ends the others.
            jax.distributed.shutdown()

    _start(run, takes_config=True)


def start(main: Callable[[list[str]], None], takes_arguments: bool = False) -> None:
    """Parses the command line of a main that has no config, loads plugins, and calls it.

    Args:
        main: the program; called with the arguments that are not flags.
        takes_arguments: whether there may be any.
    """

    def run(arguments):
        if not takes_arguments:
            _refuse_arguments(arguments)
        try:
            _check_workdir()
            compilation_cache.use(COMPILATION_CACHE.value)
            load_plugins(PLUGIN.value)
            main(arguments[1:])
        except (ValueError, OSError, ImportError) as error:
            sys.exit(f"error: {error}{ending.describe_remedy(error, WORKDIR.value)}")

    _start(run, takes_config=False)


def _start(run: Callable[[list[str]], None], takes_config: bool) -> None:
    huge_pages.use()
    logging.set_verbosity(logging.WARNING)  # libraries log much at INFO
    interrupts.watch()
    try:
        app.run(run, flags_parser=functools.partial(command_line.parse, takes_config=takes_config))
    except KeyboardInterrupt:
        ending.exit_interrupted(WORKDIR.value if flags.FLAGS.is_parsed() else None)


def _refuse_arguments(arguments: list[str]) -> None:
    if len(arguments) > 1:
        sys.exit(f"error: unexpected arguments: {' '.join(arguments[1:])}")


def _check_workdir() -> None:
    if directories.is_local(WORKDIR.value):
        directories.check_directory(WORKDIR.value, f"--workdir={WORKDIR.value}")


def _join(read_engine: Callable | None = None) -> None:
    """Joins the other processes of the run, if the flags say that there are any."""
    arguments = [f.value for f in (DISTRIBUTED, COORDINATOR, NUM_PROCESSES, PROCESS_ID)]
    try:
        if read_engine and read_engine().is_alone and arguments[0] is None:
            arguments[0] = False
        joining.join(*arguments, patience=_PATIENCE)
    except ValueError as error:
        sys.exit(f"error: {error}")
