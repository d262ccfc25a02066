"""Joins the processes of one run (`jax.distributed`)."""

import os

import jax


class JoinError(ValueError):
    """The processes were not joined."""


def join(
    distributed: bool | None,
    coordinator: str | None,
    num_processes: int | None,
    process_id: int | None,
    patience: int,
) -> None:
    """Joins the other processes of the run, if there are any.

    Args:
        distributed: whether jax is to find the others by itself (Cloud TPU, SLURM, Open MPI); None
            refuses to be one of several processes, False allows it.
        coordinator, num_processes, process_id: HOST:PORT of process 0, the number of processes, and
            this process's own, from 0; all of them or none.
        patience: seconds that a process which failed waits for the others to end too.

    Raises:
        JoinError: the arguments do not fit, the others are not found, or this is one of several
            processes that are not to be joined.
    """
    values = dict(coordinator=coordinator, num_processes=num_processes, process_id=process_id)
    missing = [name for name, value in values.items() if value is None]
    if len(missing) == len(values):
        if not distributed:
            _refuse_strays(refuse_ranks=distributed is None)
            return
        arguments = {}
    elif missing:
        raise JoinError(f"--{' and --'.join(missing)} must be given too")
    elif not 0 <= process_id < num_processes:
        raise JoinError(
            f"--process_id={process_id} must be from 0 to one below --num_processes={num_processes}"
        )
    elif not coordinator.rpartition(":")[2].isdigit():
        raise JoinError(f"--coordinator={coordinator} must be HOST:PORT")
    else:
        arguments = dict(
            coordinator_address=coordinator,
            num_processes=num_processes,
            process_id=process_id,
            cluster_detection_method="deactivate",
        )
    # On CPUs processes exchange arrays by gloo. It is jax's default, stated here since all of this
    # depends on it.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(**arguments, shutdown_timeout_seconds=patience)
    except (ValueError, RuntimeError) as error:
        advice = (
            "is every process started, and does each reach --coordinator?"
            if arguments
            else "where no cluster is found, give --coordinator, --num_processes and --process_id"
        )
        raise JoinError(f"the processes were not joined ({error}); {advice}") from error


def _refuse_strays(refuse_ranks: bool) -> None:
    """Refuses to be one of several processes that are not joined: all would write one workdir."""
    ranks = {r: os.environ.get(r, "0") for r in ("SLURM_PROCID", "OMPI_COMM_WORLD_RANK")}
    nonzero = [f"{r}={number}" for r, number in ranks.items() if number != "0"]
    if refuse_ranks and nonzero:
        raise JoinError(
            f"this is one of several processes ({nonzero[0]}); add --distributed to make "
            "them one run, or --nodistributed if each has its own --workdir"
        )
    # The hosts of a TPU pod know of one another without being joined.
    if jax.process_count() > 1:
        raise JoinError(f"this is one of {jax.process_count()} hosts; add --distributed")
