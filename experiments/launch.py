"""Starting a main: config keys are checked, and errors that a user can mend are told in a line.

On many hosts every host runs the same command, with `--distributed` where jax finds the others by
itself (Cloud TPU, SLURM, Open MPI), else with `--coordinator`, `--num_processes`, `--process_id`.
"""

import contextlib
import difflib
import os
import runpy
import sys
import traceback
from collections.abc import Callable

import jax
import tensorflow_datasets as tfds
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from tda.runtime import huge_pages, processes

CONFIG = config_flags.DEFINE_config_file("config", None, "File of the run's config.")
WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run's files.")
DISTRIBUTED = flags.DEFINE_bool(
    "distributed", None, "Join the other processes that a TPU pod, SLURM or Open MPI started."
)
COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, free there.")
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes there are.")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")

# Seconds that a process which failed waits for the others to end too, before all are ended.
_PATIENCE = 60


def launch(main: Callable[[ConfigDict, str | None], None], needs_workdir: bool = True) -> None:
    """Parses the command line and calls `main(config, workdir)`.

    Args:
        main: the program.
        needs_workdir: whether `--workdir` must be given; `main` gets None where it is not.
    """
    huge_pages.use()
    flags.mark_flags_as_required(["config", "workdir"] if needs_workdir else ["config"])
    logging.set_verbosity(logging.WARNING)  # what the libraries tell of themselves is not news
    tfds.disable_progress_bar()

    def run(argv):
        if len(argv) > 1:
            sys.exit(f"error: unexpected arguments: {' '.join(argv[1:])}")
        _join()
        try:
            with contextlib.ExitStack() as quiet:
                if not processes.is_first():
                    nowhere = quiet.enter_context(open(os.devnull, "w"))
                    quiet.enter_context(contextlib.redirect_stdout(nowhere))
                main(CONFIG.value, WORKDIR.value)
            processes.wait_for_all("the end")
        except (ValueError, OSError, FloatingPointError, processes.ProcessError) as error:
            _tell(error)
        except Exception:
            if jax.process_count() == 1:
                raise
            # The interpreter would print it too late: after the shutdown, which may end it.
            traceback.print_exc()
            sys.exit(1)
        finally:
            # Where all failed alike, all come here; where one did, this ends the others.
            jax.distributed.shutdown()

    app.run(run, flags_parser=_parse)


def _join() -> None:
    """Joins the other processes of the run, if the flags say that there are any."""
    given = {f.name: f.value for f in (COORDINATOR, NUM_PROCESSES, PROCESS_ID)}
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == len(given):
        if not DISTRIBUTED.value:
            _refuse_strays()
            return
        how = {}
    elif missing:
        sys.exit(f"error: --{' and --'.join(missing)} must be given too")
    elif not 0 <= PROCESS_ID.value < NUM_PROCESSES.value:
        sys.exit(
            f"error: --process_id={PROCESS_ID.value} must be from 0 to one below "
            f"--num_processes={NUM_PROCESSES.value}"
        )
    elif not COORDINATOR.value.rpartition(":")[2].isdigit():
        sys.exit(f"error: --coordinator={COORDINATOR.value} must be HOST:PORT")
    else:
        how = dict(
            coordinator_address=COORDINATOR.value,
            num_processes=NUM_PROCESSES.value,
            process_id=PROCESS_ID.value,
            cluster_detection_method="deactivate",
        )
    # On CPUs processes exchange arrays by gloo, jax's default; said here since all hangs on it.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(**how, shutdown_timeout_seconds=_PATIENCE)
    except (ValueError, RuntimeError) as error:
        advice = (
            "is every process started, and does each reach --coordinator?"
            if how
            else "where no cluster is found, give --coordinator, --num_processes and --process_id"
        )
        sys.exit(f"error: the processes were not joined ({error}); {advice}")


def _refuse_strays() -> None:
    """Several processes that do not know of one another would write into one workdir."""
    ranks = {r: os.environ.get(r, "0") for r in ("SLURM_PROCID", "OMPI_COMM_WORLD_RANK")}
    told = [f"{r}={number}" for r, number in ranks.items() if number != "0"]
    if DISTRIBUTED.value is None and told:
        sys.exit(
            f"error: this is one of several processes ({told[0]}); add --distributed to make them "
            "one run, or --nodistributed if each has its own --workdir"
        )
    # The hosts of a TPU pod know of one another in any case.
    if jax.process_count() > 1:
        sys.exit(f"error: this is one of {jax.process_count()} hosts; add --distributed")


def _parse(argv):
    try:
        return app.parse_flags_with_usage(argv)
    except (AttributeError, KeyError) as error:
        keys = sorted(_keys(_config_of(argv)))
        for argument in argv[1:]:
            name = argument.lstrip("-").split("=")[0]
            if name.startswith("config.") and name[len("config.") :] not in keys:
                sys.exit(f"error: {_unknown(name[len('config.') :], keys)}")
        raise error


def _config_of(argv) -> ConfigDict:
    """The config that `--config` names, before any key is overridden."""
    for argument, following in zip(argv, [*argv[1:], ""], strict=True):
        name, _, value = argument.lstrip("-").partition("=")
        if name == "config":
            return runpy.run_path(value or following)["get_config"]()
    return ConfigDict()


def _keys(config: ConfigDict, prefix: str = "") -> list[str]:
    """Every key of a config, such as `train.epochs`."""
    out = []
    for key, value in config.items():
        out += _keys(value, f"{prefix}{key}.") if isinstance(value, ConfigDict) else [prefix + key]
    return out


def _unknown(name: str, keys: list[str]) -> str:
    """What to say of a key that the config does not have."""
    last = {k.split(".")[-1]: k for k in keys}
    close = difflib.get_close_matches(name, keys, n=3, cutoff=0.6) or [
        last[k] for k in difflib.get_close_matches(name.split(".")[-1], last, n=3, cutoff=0.6)
    ]
    if close:
        return f"the config has no key {name!r}; did you mean {' or '.join(close)}?"
    return f"the config has no key {name!r}; there are\n  " + "\n  ".join(keys)


def _tell(error: Exception) -> None:
    """Ends the program with the error in a line; the traceback goes to a file in the workdir."""
    where = "" if WORKDIR.value is None else _keep_traceback(WORKDIR.value)
    advice = ""
    if "No space left" in str(error) and WORKDIR.value is not None:
        advice = (
            f"\nthe disk of --workdir={WORKDIR.value} is full: free some space and run the same "
            "command again; it goes on where it stopped"
        )
    who = f" in process {jax.process_index()}" if jax.process_count() > 1 else ""
    # Told here and not by the interpreter's end, which may not come if another process is gone.
    print(f"error{who}: {error}{advice}{where}", file=sys.stderr, flush=True)
    sys.exit(1)


def _keep_traceback(workdir: str) -> str:
    """Writes the traceback to a file of the workdir; returns what to say of it."""
    number = "" if processes.is_first() else f"-{jax.process_index()}"
    path = os.path.join(workdir, f"error{number}.txt")
    try:
        with open(path, "w", encoding="utf-8") as out:
            out.write(traceback.format_exc())
    except OSError:
        traceback.print_exc()
        return ""
    return f"\n(traceback in {path})"
