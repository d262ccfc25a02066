"""A store of each example's part of the gradient of each training step, in the training's order.

A row is the projected part (`tda.gradients.capture`) of the gradient of a batch's mean loss,
without optimizer correction. A sequence has a row for every epoch.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Sequence

import jax
import numpy as np
from flax import nnx

from tda.data.batches import BatchLayout
from tda.data.tokens import TokenTable
from tda.gradients.capture import Capture
from tda.runtime import processes, sharding
from tda.runtime.atomic_file import read_arrays, write_arrays
from tda.store import GradientStore, StoreError
from tda.store.location import Location
from tda.training import loop

# Beside the store's manifest.
_STEPS = "training.json"


@dataclasses.dataclass(frozen=True)
class TrainingRows:
    """The sequence of each row of the store, and the step that trained on it."""

    sequences: np.ndarray
    """Rows of the training text's table, int64 [R]."""
    starts: np.ndarray
    """The first row of each step, then the number of rows: int64 [steps + 1]."""

    @classmethod
    def of(cls, table: TokenTable, layout: BatchLayout, steps: int, seed: int) -> "TrainingRows":
        """Plans the rows of a training (`tda.training.loop.fit`) without reading any text."""
        members: list[np.ndarray] = []
        epoch = 0
        while len(members) < steps:
            plan = loop.epoch_batches(table, epoch, layout, seed).plan
            members += [plan.members(i) for i in range(min(len(plan), steps - len(members)))]
            epoch += 1
        starts = np.cumsum([0, *map(len, members)], dtype=np.int64)
        return cls(np.concatenate(members).astype(np.int64), starts)

    @functools.cached_property
    def steps(self) -> np.ndarray:
        """The step of each row, int64 [R], from 0."""
        return np.repeat(np.arange(len(self.starts) - 1), np.diff(self.starts))

    def names(self, ids: Sequence[str]) -> list[str]:
        """Returns a name for each row: its sequence's id, with "(time N)" from the second on."""
        times = np.zeros(len(ids), np.int64)
        names = []
        for row in self.sequences:
            times[row] += 1
            names.append(ids[row] if times[row] == 1 else f"{ids[row]} (time {times[row]})")
        return names


def keep_steps(path: str, rows: TrainingRows, rates: np.ndarray) -> None:
    """Writes each step's first row and learning rate into the store's directory.

    Args:
        path: the store.
        rows: the plan of the training.
        rates: the learning rate of each step, [steps].
    """
    steps = {"first_rows": rows.starts.tolist(), "learning_rates": np.asarray(rates).tolist()}
    if processes.is_first():
        Location(path).write_json(_STEPS, steps)


def read_rates(path: str) -> np.ndarray:
    """Returns the learning rate of each step, float32 [steps]; see `keep_steps`.

    Raises:
        StoreError: the store has none.
    """
    steps = Location(path).read_json(_STEPS)
    if steps is None:
        raise StoreError(f"{path} has no {_STEPS} of its training; train in a new workdir")
    return np.array(steps["learning_rates"], np.float32)


class Recorder:
    """Writes the parts of a training's examples to a store, and resumes after a kill.

    Each checkpoint of the training comes with a file of the rows that do not fill a shard yet.

    Args:
        capture: computes the parts.
        store: a store with a row for each of `rows`.
        rows: the plan of the training.
        folder: the directory of the files of unfinished shards.
    """

    def __init__(
        self, capture: Capture, store: GradientStore, rows: TrainingRows, folder: pathlib.Path
    ):
        self._capture, self._store, self._rows, self._folder = capture, store, rows, folder
        self._shards = store.shards()
        # The rows of the shard that is being filled.
        self._filled = np.zeros((0, store.width), np.float32)
        self._shard = 0
        self._under_way: tuple[int, jax.Array] | None = None

    def differentiate(self, loss: Callable, model: nnx.Module, batch: dict) -> tuple:
        """Returns loss, gradient (a pure dict) and the parts of a batch; called inside jit."""
        value, gradients, parts_BxE = self._capture(loss, model, batch)
        return value, nnx.to_pure_dict(gradients), parts_BxE

    def resume(self, step: int) -> None:
        """Continues before a step.

        Raises:
            StoreError: the training's checkpoint was written without its examples' parts, or with
                those of the steps before in another store.
        """
        first = int(self._rows.starts[step])
        self._shard = next(
            (i for i, s in enumerate(self._shards) if s.stop > first), len(self._shards)
        )
        if not set(range(self._shard)).isdisjoint(self._store.missing()):
            raise StoreError(
                f"{self._store.path} lacks rows of the steps before {step}, from which the "
                "training resumes; bring back the store that they were written to, or start the "
                "training anew in another directory"
            )
        if self._shard == len(self._shards) or first == self._shards[self._shard].start:
            return
        path = self._file(step)
        if not path.exists():
            raise StoreError(
                f"{path} is missing: the checkpoint of step {step} was written without its "
                "examples' parts; start the training anew in another directory"
            )
        self._filled = read_arrays(path)["rows"]

    def record(self, step: int, parts_BxE: jax.Array) -> None:
        """Takes the parts of a step's examples, and adds those of the step before.

        The device computes the new ones meanwhile.
        """
        before, self._under_way = self._under_way, (step, parts_BxE)
        if before is not None:
            self._add(*before)

    def keep(self, step: int) -> None:
        """Writes all rows of the steps before `step`; called before its checkpoint is written."""
        if self._under_way is not None:
            self._add(*self._under_way)
            self._under_way = None
        if processes.is_first():
            self._folder.mkdir(parents=True, exist_ok=True)
            write_arrays(self._file(step), {"rows": self._filled})

    def forget(self, steps: Sequence[int]) -> None:
        """Removes the files of checkpoints other than those of `steps`."""
        if processes.is_first():
            for path in self._folder.glob("rows-before-*.npz"):
                if path not in map(self._file, steps):
                    path.unlink()

    def _file(self, step: int) -> pathlib.Path:
        return self._folder / f"rows-before-{step}.npz"

    def _add(self, step: int, parts_BxE: jax.Array) -> None:
        count = int(self._rows.starts[step + 1] - self._rows.starts[step])
        # Rows of padding come last in a batch.
        added = sharding.to_host(parts_BxE)[:count]
        self._filled = np.concatenate([self._filled, added])
        while self._shard < len(self._shards):
            shard = self._shards[self._shard]
            size = shard.stop - shard.start
            if len(self._filled) < size:
                return
            if processes.is_first():
                self._store.write(self._shard, self._filled[:size])
            self._filled, self._shard = self._filled[size:], self._shard + 1
