"""A worker of Ray: it opens a run once, and computes groups of its stages on demand."""

import contextlib
import dataclasses
import os

from ml_collections import ConfigDict

from tda.run import board, evaluate, registry, retrieve, stages
from tda.run.run import Run
from tda.run.workdir import Workdir
from tda.runtime import code_version, compilation_cache
from tda.runtime.on_demand import OnDemand, WorkerError


@dataclasses.dataclass(frozen=True)
class Opening:
    """The arguments that a worker opens the run with."""

    config: dict
    """The config, as plain values."""
    workdir: str
    """The workdir's absolute path, which all machines share."""
    directory: str
    """The directory that relative paths of the config start from, where it exists."""
    plugins: tuple[str, ...]
    """Modules that register methods and retrievers."""
    code: dict
    """The versions of code and libraries (`tda.runtime.code_version`)."""
    has_board: bool = False
    """Whether the run is a bank with its board, not a trace."""


class Worker:
    """The class of Ray's actors."""

    def __init__(self, opening: Opening):
        self._opening = opening
        self._run: Run | None = None
        self._engine = OnDemand(self._stages)

    def open(self) -> None:
        """Opens the run: reads the corpus, and loads the model.

        Raises:
            WorkerError: this machine has other code.
            Exception: what opening the run raises.
        """
        self._engine.open()

    def compute(self, work: str, number: int) -> None:
        """Computes a group; see `OnDemand.request`."""
        self._engine.request(work, number)

    def _stages(self, engine: OnDemand) -> None:
        nowhere = open(os.devnull, "w")
        with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            run = self._open(engine)
            if engine.is_opening:
                return
            if self._opening.has_board:
                board.score(run)
                return
            rankings, _ = retrieve.retrieve(run)
            evaluate.evaluate(run, rankings)

    def _open(self, engine: OnDemand) -> Run:
        if self._run is None:
            opening = self._opening
            if code_version.describe() != opening.code:
                raise WorkerError(
                    f"a machine of the Ray cluster ({os.uname().nodename}) has another version of "
                    "the code, or of jax, than the program that drives the run; update it"
                )
            if os.path.isdir(opening.directory):
                os.chdir(opening.directory)
            compilation_cache.use()
            registry.load_plugins(opening.plugins)
            self._run = stages.prepare(ConfigDict(opening.config), Workdir(opening.workdir), engine)
        return self._run
