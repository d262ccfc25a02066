"""Scores of every query and unit by the methods of a bank, saved method by method."""

import functools
import time

import jax
import numpy as np

from tda import methods as method_lib
from tda.counterfactual.adjoint import AdamRecursion
from tda.counterfactual.training_scores import (
    THROUGH_TRAINING,
    TITLES,
    ScoreSettings,
    TrainingScores,
    scores_tokens,
)
from tda.run import bank_rankings, counterfactual, train
from tda.run.counterfactual import Retrained
from tda.runtime.atomic_file import read_arrays, write_arrays
from tda.runtime.fingerprint import fingerprint, plain


def own_methods(config) -> list[str]:
    """Returns the names of the bank's own methods that a config chooses."""
    return [n.strip() for n in config.counterfactual.methods.split(",") if n.strip()]


class BankScores:
    """Computes the scores of the methods of a bank.

    Args:
        retrained: the bank and its training.
    """

    def __init__(self, retrained: Retrained):
        self.retrained, self.config = retrained, retrained.run.config
        self.costs: dict[str, float] = {}
        """Of each method, in units of a training, compilation left out."""

    @functools.cached_property
    def training_seconds(self) -> float:
        """Seconds of a training, compilation left out."""
        training = self.retrained.trainings[0]
        training.run()  # compiled, wherever the retrainings came from
        started = time.perf_counter()
        jax.block_until_ready(training.run()["params"])
        return time.perf_counter() - started

    def compute(self) -> dict[str, np.ndarray]:
        """Returns the scores of every method, float64 [Q, U]."""
        names = [*own_methods(self.config), *method_lib.parse(self.config.methods)]
        return {name: self._load_or_compute(name) for name in names}

    def _load_or_compute(self, name: str) -> np.ndarray:
        retrained, settings = self.retrained, self.config.counterfactual
        parts = [name, retrained.run.trained.fingerprint, settings.fisher, settings.unit]
        parts += [self.config.curvature.to_dict()]
        is_own = name in TITLES
        if not is_own:
            parts.append(bank_rankings.name_of(retrained, name))
        folder = retrained.directory / "scores"
        folder.mkdir(exist_ok=True)
        path = folder / f"{name}-{fingerprint(plain(parts))}.npz"
        with retrained.run.engine.alone():
            if not path.exists():
                # Relative to a training timed now: a resumed board may run on a busier machine.
                training, stopwatch = self.training_seconds, _Stopwatch()
                if is_own:
                    scores = self._own_score(name)
                else:
                    scores = retrained.by_unit(bank_rankings.scores_by(retrained, name))
                seconds = stopwatch.seconds()
                if not is_own and bank_rankings.takes_captured(retrained, name):
                    seconds = max(0.0, seconds - training)
                write_arrays(path, {"scores": scores, "cost": seconds / training})
        arrays = read_arrays(path)
        self.costs[name] = float(arrays["cost"])
        return arrays["scores"]

    def _own_score(self, name: str) -> np.ndarray:
        """Returns the scores of a method of the bank's own, [Q, U]."""
        retrained = self.retrained
        is_token = self.config.counterfactual.unit == "token"
        by_token = name == "metagradient" or (is_token and scores_tokens(name))
        scores = self._training_scores.compute(name, by_token)
        if name == "metagradient":
            difference = counterfactual.check_modes_agree(retrained, scores)
            print(
                f"metagradients: reverse and forward mode agree to {difference:.1e} for every query"
            )
            path = retrained.directory / "metagradients_by_token.npz"
            write_arrays(path, {"scores": scores})
            retrained.reverse.forget_pass("queries")
        return retrained.by_unit(scores)

    @functools.cached_property
    def _training_scores(self) -> TrainingScores:
        c, steps = self.config.train, self.retrained.trainings[0].steps
        weight_decay = train.options(self.config)["weight_decay"]
        recursion = AdamRecursion(
            train.learning_rates(self.config, steps),
            clip=c.clip,
            weight_decay=weight_decay if c.optimizer == "adamw" else 0.0,
            **train.adam_constants(self.config),
        )
        curvature = self.config.curvature
        settings = ScoreSettings(
            counterfactual.layout_of(self.config, self.retrained.run.corpus),
            curvature.sample,
            self.config.counterfactual.fisher,
            curvature.damping,
            curvature.seed,
        )
        return TrainingScores(self.retrained.reverse, recursion, settings)


class _Stopwatch:
    """Seconds of work without those of compiling, which a cost leaves out."""

    compiling = 0.0
    """Of the process so far, by one listener for all stopwatches: jax cannot remove listeners."""

    def __init__(self):
        self._started, self._before = time.perf_counter(), self.compiling

    def seconds(self) -> float:
        """Returns the seconds so far."""
        compiling = self.compiling - self._before
        return max(0.0, time.perf_counter() - self._started - compiling)


def _count_compiling(event: str, seconds: float, **details) -> None:
    if event.startswith("/jax/core/compile/"):
        _Stopwatch.compiling += seconds


jax.monitoring.register_event_duration_secs_listener(_count_compiling)


def title(name: str, unit: str = "passage") -> str:
    """Returns a method's name in tables of scores of a unit."""
    text = TITLES[name] if name in TITLES else method_lib.METHODS[name].title
    is_shared = unit == "token" and not scores_tokens(name)
    return f"{text}, shared by a passage's tokens" if is_shared else text


_FAMILIES = {"captured": "captured while training", "rerank": "second stage"}


def family(name: str) -> str:
    """Returns the kind of work that a method's cost is for."""
    if name in TITLES:
        return "through the training" if name in THROUGH_TRAINING else "whole gradients"
    method = method_lib.METHODS[name]
    one_pass = "one pass" if method.takes_gradients else "no gradients"
    return _FAMILIES.get(method.retriever, one_pass)
