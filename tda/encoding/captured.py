"""A store of what each example adds to the steps of a training, in the order of the training.

A row is P of an example's part of a step's gradient (`tda.gradients.capture`): of the mean loss of
the batch, without the optimizer's correction. A sequence has a row for every epoch.
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
from tda.training import loop


@dataclasses.dataclass(frozen=True)
class TrainingRows:
    """Which sequence each row of the store is of, and at which step it was trained on."""

    sequences: np.ndarray
    """Rows of the training text's table, int64 [R]."""
    starts: np.ndarray
    """The first row of each step, and behind the last one's: int64 [steps + 1], from 0."""

    @classmethod
    def of(cls, table: TokenTable, layout: BatchLayout, steps: int, seed: int) -> "TrainingRows":
        """Plans the rows of a training (`tda.training.loop.fit`); nothing is read."""
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
        """Returns a name for each row: its sequence's id, and from the second time on, which."""
        times = np.zeros(len(ids), np.int64)
        names = []
        for row in self.sequences:
            times[row] += 1
            names.append(ids[row] if times[row] == 1 else f"{ids[row]} (time {times[row]})")
        return names


class Recorder:
    """Writes the parts of a training's examples to a store, and goes on where a kill left it.

    What does not fill a shard yet is kept beside the store with each of the training's checkpoints.

    Args:
        capture: what takes the parts.
        store: a row for each of `rows`.
        rows: the plan of the training.
        folder: where unfinished shards are kept.
    """

    def __init__(
        self, capture: Capture, store: GradientStore, rows: TrainingRows, folder: pathlib.Path
    ):
        self._capture, self._store, self._rows, self._folder = capture, store, rows, folder
        self._shards = store.shards()
        # The rows since the beginning of the shard that is being filled.
        self._filled = np.zeros((0, store.width), np.float32)
        self._shard = 0
        self._under_way: tuple[int, jax.Array] | None = None

    def differentiate(self, loss: Callable, model: nnx.Module, batch: dict) -> tuple:
        """Returns loss, gradient (a pure dict) and the parts of a batch; a part of a program."""
        value, gradients, parts_BxE = self._capture(loss, model, batch)
        return value, nnx.to_pure_dict(gradients), parts_BxE

    def resume(self, step: int) -> None:
        """Continues before a step.

        Raises:
            StoreError: the training's checkpoint was written without its examples' parts.
        """
        first = int(self._rows.starts[step])
        self._shard = next(
            (i for i, s in enumerate(self._shards) if s.stop > first), len(self._shards)
        )
        if self._shard == len(self._shards) or first == self._shards[self._shard].start:
            return
        path = self._file(step)
        if not path.exists():
            raise StoreError(
                f"{path} is missing: the checkpoint of step {step} was written without the parts "
                "of its examples; begin the training anew in another directory"
            )
        self._filled = read_arrays(path)["rows"]

    def record(self, step: int, parts_BxE: jax.Array) -> None:
        """Takes the parts of a step's examples; they are read when the next step is under way."""
        before, self._under_way = self._under_way, (step, parts_BxE)
        if before is not None:
            self._add(*before)

    def keep(self, step: int) -> None:
        """Writes all rows of the steps before `step`, of which a checkpoint follows."""
        if self._under_way is not None:
            self._add(*self._under_way)
            self._under_way = None
        if processes.is_first():
            self._folder.mkdir(parents=True, exist_ok=True)
            write_arrays(self._file(step), {"rows": self._filled})

    def forget(self, steps: Sequence[int]) -> None:
        """Removes what was kept with checkpoints other than those of `steps`."""
        if processes.is_first():
            for path in self._folder.glob("rows-before-*.npz"):
                if path not in map(self._file, steps):
                    path.unlink()

    def _file(self, step: int) -> pathlib.Path:
        return self._folder / f"rows-before-{step}.npz"

    def _add(self, step: int, parts_BxE: jax.Array) -> None:
        count = int(self._rows.starts[step + 1] - self._rows.starts[step])
        # Sequences of padding, which fill a batch up, come last.
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
