"""The bank: losses of queries under models that were trained without random sets of units.

A unit is a group of passages that is dropped together: a passage, a document, all passages of a
relation. Each set of units is drawn from a seed of its own, so that a bank grows without changing
its first sets, and each retraining is saved when it is finished. Only the queries' losses are
stored: a new method is compared with them without any training.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np

from tda.counterfactual.training import QueryLosses, Training
from tda.runtime import progress
from tda.runtime.fingerprint import fingerprint, fingerprint_parts
from tda.runtime.groups import ONE_GROUP, Groups, Result


def draw_subsets(units: int, fraction: float, count: int, seed: int) -> np.ndarray:
    """Draws sets of units to drop: bool [M, U], each with round(fraction · U) units, at least one.

    Raises:
        ValueError: a set would hold no unit, or all of them.
    """
    size = max(1, round(fraction * units))
    if not 0 < fraction < 1 or size >= units:
        raise ValueError(
            f"{fraction} of {units} units are {size}; give a share above 0 and below 1 that leaves "
            "some units to train on"
        )
    removed_MxU = np.zeros((count, units), bool)
    for i, removed_U in enumerate(removed_MxU):
        removed_U[np.random.default_rng([seed, i]).choice(units, size, replace=False)] = True
    return removed_MxU


def weights_without(removed_MxU: np.ndarray, unit_C: np.ndarray) -> np.ndarray:
    """Returns the weight of each token, float32 [M, C]: 0 where its unit is removed, else 1."""
    # A unit of −1 is never removed: it takes the last column, which is appended here.
    never = np.zeros((len(removed_MxU), 1), bool)
    return (~np.concatenate([removed_MxU, never], axis=1)[:, unit_C]).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Bank:
    """The retrainings of one fraction and one order of the data."""

    removed_MxU: np.ndarray
    """bool: the units that each retraining left out."""
    losses_MxQ: np.ndarray
    """float32: the queries' losses after it, in nats."""
    base_Q: np.ndarray
    """float32: their losses after the training on everything."""

    @property
    def changes_MxQ(self) -> np.ndarray:
        """How much the queries' losses rose, float64."""
        return self.losses_MxQ.astype(np.float64) - self.base_Q


@dataclasses.dataclass(frozen=True)
class Retraining:
    """Runs retrainings and keeps their results."""

    training: Training
    queries: QueryLosses
    unit_C: np.ndarray
    """The unit of each token of the table; −1 for none."""
    identity: dict
    """JSON values that identify the training and the queries: optimizer, order, data."""
    groups: Groups = ONE_GROUP
    """The files of results; processes share the retrainings."""
    together: int = 1
    """Retrainings that one program runs, over an axis of trainings."""

    def losses(
        self, removed_MxU: np.ndarray, description: str, draw: dict | None = None
    ) -> np.ndarray:
        """Returns the queries' losses after trainings without these units, float32 [M, Q].

        Each is saved when it is finished: a resumed run computes only those that are missing. All
        processes of a run call it, and all but process 0 get an empty array.

        Args:
            removed_MxU: the units that each training leaves out.
            description: the name of the work in the progress bar.
            draw: JSON values that describe how the sets were drawn, if set i depends on i alone: a
                longer list then computes only its further sets.

        Raises:
            ValueError: a file has other sets than are drawn now.
        """
        M, together = len(removed_MxU), self.together
        pieces = [removed_MxU[i : i + together] for i in range(0, M, together)]
        masks = fingerprint_parts([np.packbits(removed_MxU)]) if draw is None else draw
        # A longer list does not have a last piece that is not full.
        tail = M if M % together else 0
        parts = [self.identity, fingerprint_parts([self.unit_C]), masks, together, tail]
        with progress.bar(M, description, "training", saves_work=True) as bar:

            def work(numbers: range) -> Result:
                removed = pieces[numbers.start]
                weights = weights_without(removed, self.unit_C)
                params = self.training.run_together(weights)["params"]
                bar.update(len(removed))
                return {"losses": self.queries.together(params, len(removed)), "removed": removed}

            def join(results: Iterator[Result]) -> np.ndarray:
                losses = []
                for piece, result in zip(pieces, results, strict=True):
                    if not np.array_equal(piece, result["removed"]):
                        raise ValueError(
                            f"{self.groups.directory} has retrainings without other units than "
                            "are drawn now, by another version of numpy; use another directory"
                        )
                    losses.append(result["losses"])
                return np.concatenate(losses)

            joined = self.groups.reduce(
                f"retrained-{fingerprint(parts)}",
                [range(i, i + 1) for i in range(len(pieces))],
                work,
                join,
                lambda count: bar.update(min(M, count * together)),
            )
        return np.zeros((0, len(self.queries)), np.float32) if joined is None else joined

    def bank(self, removed_MxU: np.ndarray, description: str, draw: dict | None = None) -> Bank:
        """Retrains without each set of units, and once on everything; arguments as for `losses`."""
        # The training on everything is the list's first: it runs in the same program as the others,
        # so that both sides of a difference are rounded alike.
        nothing = np.zeros((1, removed_MxU.shape[1]), bool)
        losses = self.losses(np.concatenate([nothing, removed_MxU]), description, draw)
        return Bank(removed_MxU, losses[1:], losses[0] if len(losses) else losses.sum(axis=0))
