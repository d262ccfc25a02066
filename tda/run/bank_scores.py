"""Scores of every query and unit by the methods of a bank, saved method by method."""

import dataclasses
import functools
import time
from collections.abc import Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from tda import methods as method_lib
from tda.counterfactual import adjoint, eigenbasis, source, unprojected
from tda.counterfactual.eigenbasis import Gradients
from tda.counterfactual.example_gradients import ExampleGradients
from tda.counterfactual.in_run import in_run
from tda.counterfactual.inverse import DampedInverse
from tda.counterfactual.metagradients import with_plain_attention
from tda.counterfactual.training import sum_by_unit
from tda.counterfactual.unprojected import GradientScore
from tda.data.batches import BatchLayout, draw
from tda.gradients import kronecker
from tda.gradients.kronecker import Curvature, sampled_loss
from tda.gradients.moments import optimizer_state
from tda.gradients.sites import Site, find_sites
from tda.model import functional
from tda.run import bank_rankings, counterfactual, train
from tda.run.counterfactual import Retrained
from tda.runtime.atomic_file import read_arrays, write_arrays
from tda.runtime.fingerprint import fingerprint, plain

# Numbers of the adjoint's mean Fisher matrix at most: 4 GiB of float32.
_FISHER_NUMBERS = 1 << 30
# Products of conjugate gradients; steps of ASTRA, and the passages of each.
_CG_STEPS, _ASTRA_STEPS, _ASTRA_PASSAGES = 20, 200, 16
# SOURCE's segments, as in its paper.
_SEGMENTS = 3

TITLES = {
    "metagradient": "metagradient (exact)",
    "adjoint_batch": "Adam's adjoint, Gauss–Newton of the batch",
    "adjoint": "Adam's adjoint, mean Fisher",
    "adjoint_ekfac": "Adam's adjoint, EK-FAC",
    "adjoint_none": "Adam's adjoint, no Hessian",
    "in_run_adam": "in-run first order, Adam",
    "in_run": "in-run first order, plain",
    "ekfac_cg": "EK-FAC + conjugate gradients",
    "ekfac_astra": "EK-FAC + ASTRA",
    "source": "SOURCE, Adam",
    "shampoo_whole": "Shampoo, eigenvalue-corrected, whole gradients",
    "ekfac_whole": "EK-FAC, whole gradients",
    "dot_whole": "gradient dot product, whole",
    "cosine_whole": "gradient cosine, whole",
    "adam_dot_whole": "dot product over √V, whole",
    "adam_cosine_whole": "cosine over √V (Exp 3), whole",
}


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
        if name == "metagradient":
            return self._metagradients()
        if name.startswith("adjoint"):
            return retrained.by_unit(
                adjoint.surrogate(retrained.reverse, self._recursion(), self._hessian(name))
            )
        if name.startswith("in_run"):
            is_preconditioned = name == "in_run_adam"
            return retrained.by_unit(
                in_run(retrained.reverse, self._recursion(), is_preconditioned)
            )
        if name == "source":
            return retrained.by_unit(self._source())
        final = retrained.reverse.final_state()
        queries = retrained.queries.all_gradients(final["params"])
        if name in ("ekfac_cg", "ekfac_astra"):
            inverse = self._damped_inverse(final["params"])
            refine = self._conjugate_gradients if name == "ekfac_cg" else self._astra
            queries = refine(inverse, queries)
            method = GradientScore(unprojected.only(queries))
        else:
            method = self._gradient_score(name, final)
        return retrained.by_unit(self._whole(queries, final["params"], method))

    def _whole(self, queries: Gradients, params: dict, method: GradientScore) -> np.ndarray:
        """Returns scores by whole gradients of passages at some parameters, [Q, N]."""
        training = self.retrained.trainings[0]
        passages = self._layout().batches(training.table)
        return unprojected.score(training, queries, params, passages, method)

    def _layout(self) -> BatchLayout:
        return counterfactual.layout_of(self.config, self.retrained.run.corpus)

    def _metagradients(self) -> np.ndarray:
        retrained = self.retrained
        by_token = retrained.reverse.by_token(np.arange(len(retrained.queries)))
        difference = counterfactual.check_modes_agree(retrained, by_token)
        print(f"metagradients: reverse and forward mode agree to {difference:.1e} for every query")
        scores = sum_by_unit(by_token, retrained.unit_C, len(retrained.units))
        write_arrays(retrained.directory / "metagradients_by_token.npz", {"scores": by_token})
        retrained.reverse.forget_pass("queries")
        return scores

    def _sampled(self, count: int) -> Iterable[dict]:
        """Returns batches of a sample of the passages, with labels drawn from the model."""
        table, seed = self.retrained.trainings[0].table, self.config.curvature.seed
        rows = draw(len(table), count, seed)
        layout = self._layout()
        return kronecker.batches(table, rows, labels="sampled", layout=layout, seed=seed)

    def _recursion(self) -> adjoint.AdamRecursion:
        c, steps = self.config.train, self.retrained.trainings[0].steps
        weight_decay = train.options(self.config)["weight_decay"]
        return adjoint.AdamRecursion(
            train.learning_rates(self.config, steps),
            clip=c.clip,
            weight_decay=weight_decay if c.optimizer == "adamw" else 0.0,
            **train.adam_constants(self.config),
        )

    def _hessian(self, name: str) -> adjoint.Hessian | None:
        """Returns the approximation of the Hessian in an adjoint of this name."""
        training = self.retrained.trainings[0]
        if name == "adjoint_batch":
            return adjoint.batch_gauss_newton(
                with_plain_attention(training.model_fn, training.params)
            )
        if name == "adjoint_none":
            return None
        params = self.retrained.reverse.final_state()["params"]
        if name == "adjoint_ekfac":
            tokens = training.table.count_scored() / len(training.table)
            return adjoint.ekfac(*self._ekfac(params), tokens)
        sample = self._sampled(self.config.counterfactual.fisher)
        return adjoint.mean_fisher(
            adjoint.fisher_rows(training.model_fn, params, sample, _FISHER_NUMBERS)
        )

    def _gradient_score(self, name: str, final: dict) -> GradientScore:
        unit_norm = "cosine" in name
        if name.startswith(("ekfac", "shampoo")):
            params, damping = final["params"], self.config.curvature.damping
            if name.startswith("ekfac"):
                chosen, curvature = self._ekfac(params)
            else:
                _, chosen = self._factored(params)
                curvature = eigenbasis.fit_shampoo(
                    chosen, lambda: self._sampled_gradients([params])
                )
            return GradientScore(unprojected.ekfac(chosen, curvature, damping))
        if name.startswith("adam"):
            scales = self._inverse_root_moments(final)
            # A dot product takes 1/√V once in all; a cosine, on both sides (Exp 3).
            power = 1.0 if unit_norm else 0.5
            return GradientScore(unprojected.times(scales, power), unit_norm)
        return GradientScore(unprojected.identity, unit_norm)

    def _factored(self, params: dict) -> tuple[nnx.Module, list[Site]]:
        """Returns the model with these parameters, and its matrices with Kronecker factors."""
        model = self.retrained.trainings[0].model_fn.merge(params)
        return model, kronecker.factored(find_sites(model))

    def _ekfac(self, params: dict) -> tuple[list[Site], dict[str, Curvature]]:
        """Returns the matrices and EK-FAC's curvature; fitted anew, as each method's cost is."""
        (model, chosen), sample = self._factored(params), self.config.curvature.sample
        return chosen, eigenbasis.fit_ekfac(model, chosen, lambda: self._sampled(sample))

    def _sampled_gradients(
        self, at: list[dict], scales: Gradients | None = None
    ) -> Iterator[Gradients]:
        """Yields whole gradients of a sample with drawn labels, at each of some parameters."""
        gradients_of = ExampleGradients(self.retrained.trainings[0].model_fn, sampled_loss)
        for params in at:
            for batch in self._sampled(self.config.curvature.sample):
                scored = (batch["weights"] > 0).any(axis=1)
                gradients = gradients_of(params, batch)
                if scales is not None:
                    gradients = {p: g * jnp.sqrt(scales[p]) for p, g in gradients.items()}
                yield {p: g[scored] for p, g in gradients.items()}

    def _damped_inverse(self, params: dict) -> DampedInverse:
        """Returns (H + D)⁻¹ at the end of the training, by EK-FAC and products with H."""
        plain_fn = with_plain_attention(self.retrained.trainings[0].model_fn, params)
        return DampedInverse(plain_fn, params, *self._ekfac(params), self.config.curvature.damping)

    def _conjugate_gradients(self, inverse: DampedInverse, queries: Gradients) -> Gradients:
        table, settings = self.retrained.trainings[0].table, self.config.counterfactual
        rows = draw(len(table), settings.fisher, self.config.curvature.seed)
        batch = self._one_batch(rows)
        return inverse.by_conjugate_gradients(queries, batch, _CG_STEPS)

    def _astra(self, inverse: DampedInverse, queries: Gradients) -> Gradients:
        N, seed = len(self.retrained.trainings[0].table), self.config.curvature.seed
        draws = (draw(N, _ASTRA_PASSAGES, seed + i) for i in range(_ASTRA_STEPS))
        return inverse.by_astra(queries, map(self._one_batch, draws))

    def _one_batch(self, rows: np.ndarray) -> dict:
        """Returns rows of the passages as one batch, of a length that fits all passages."""
        table = self.retrained.trainings[0].table
        length = int(table.lengths.max())
        (batch,) = BatchLayout((length,), len(rows) * length, self._layout().pad).batches(
            table, rows
        )
        return batch.arrays()

    def _source(self) -> np.ndarray:
        """Returns SOURCE's scores, [Q, N], from the states that reverse mode keeps."""
        retrained, recursion = self.retrained, self._recursion()
        training, reverse = retrained.trainings[0], retrained.reverse
        _, chosen = self._factored(reverse.final_state()["params"])
        saved = [*range(reverse.stride, training.steps, reverse.stride), training.steps]
        segments, states = [], []
        for first, stop in source.divide(saved, _SEGMENTS):
            states.append([reverse.state_at(s) for s in saved if first < s <= stop])
            roots = [self._inverse_root_moments(x) for x in states[-1]]
            scales = jax.tree.map(lambda *x: sum(x) / len(x), *roots)
            at = [x["params"] for x in states[-1]]
            curvature = eigenbasis.fit_shampoo(
                chosen, lambda at=at, scales=scales: self._sampled_gradients(at, scales)
            )
            # The training's loss is a mean over tokens, and Λ a mean over passages.
            per_token = len(training.table) / training.table.scored.sum()
            curvature = {
                p: dataclasses.replace(c, values=c.values * per_token) for p, c in curvature.items()
            }
            rates = sum(float(recursion.learning_rate(t)) for t in range(first, stop))
            segments.append(source.Segment(rates, scales, curvature))
        queries = retrained.queries.all_gradients(reverse.final_state()["params"])
        scores_QxN = np.zeros((len(retrained.queries), len(training.table)))
        sides = source.pull_back(chosen, segments, queries)
        for side, of_segment in zip(sides, reversed(states), strict=True):
            method = GradientScore(unprojected.only(side))
            for state in of_segment:
                scores_QxN += self._whole(side, state["params"], method) / len(of_segment)
        return scores_QxN

    def _inverse_root_moments(self, state: dict) -> Gradients:
        """Returns 1/√V of every weight by path, from the optimizer's state."""
        options = train.adam_constants(self.config)
        nu = functional.flat_parameters(optax.tree.get(state["opt_state"], "nu"))
        constants = options["b2"], options["eps"], options["eps_root"]
        return {p: optimizer_state.adam(x, state["step"], *constants) for p, x in nu.items()}


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


def title(name: str) -> str:
    """Returns a method's name in tables."""
    return TITLES[name] if name in TITLES else method_lib.METHODS[name].title


_FAMILIES = {"captured": "captured while training", "rerank": "second stage"}


def family(name: str) -> str:
    """Returns the kind of work that a method's cost is for."""
    if name in TITLES:
        follows_training = name.startswith(("metagradient", "adjoint", "in_run", "source"))
        return "through the training" if follows_training else "whole gradients"
    method = method_lib.METHODS[name]
    one_pass = "one pass" if method.takes_gradients else "no gradients"
    return _FAMILIES.get(method.retriever, one_pass)
