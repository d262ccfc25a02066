"""The scores of a bank's methods: of every query and unit, each kept when it is computed."""

import time
from collections.abc import Callable, Iterable

import jax
import numpy as np
import optax

from tda import methods as method_lib
from tda.counterfactual import adjoint, unprojected
from tda.counterfactual.in_run import in_run
from tda.counterfactual.training import sum_by_unit
from tda.counterfactual.unprojected import GradientScore
from tda.data.batches import BatchLayout
from tda.gradients import kronecker
from tda.gradients.moments import optimizer_state
from tda.gradients.sites import find_sites
from tda.model import functional
from tda.retrieval.ranked import Ranked
from tda.run import counterfactual, retrieve, train
from tda.run.counterfactual import Retrained
from tda.run.run import draw
from tda.runtime.atomic_file import read_arrays, write_arrays
from tda.runtime.fingerprint import fingerprint, plain
from tda.training import optimizer

# Numbers of the adjoint's mean Fisher matrix at most: 4 GiB of float32.
_FISHER_NUMBERS = 1 << 30

TITLES = {
    "metagradient": "metagradient (exact)",
    "adjoint": "Adam's adjoint, mean Fisher",
    "adjoint_none": "Adam's adjoint, no Hessian",
    "in_run_adam": "in-run first order, Adam",
    "in_run": "in-run first order, plain",
    "ekfac_whole": "EK-FAC, whole gradients",
    "ekfac_cosine_whole": "EK-FAC, norm, whole gradients",
    "dot_whole": "gradient dot product, whole",
    "cosine_whole": "gradient cosine, whole",
    "layers_dot_whole": "gradient dot product, whole, layers' matrices",
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
        self.seconds: dict[str, float] = {}
        """Of each of the bank's own methods, without those of compiling."""

    def compute(self) -> dict[str, np.ndarray]:
        """Returns the scores of every method, float64 [Q, U]."""
        scores = {
            name: self._load_or_compute(name, self._own_score) for name in own_methods(self.config)
        }
        run = self.retrained.run
        run.config.eval.top_k = run.corpus.rows
        for name, ranked in retrieve.retrieve(run)[0].items():
            scores[name] = self.retrained.by_unit(all_scores(ranked, run.corpus.rows))
        return scores

    def _load_or_compute(self, name: str, compute: Callable[[str], np.ndarray]) -> np.ndarray:
        settings = self.config.counterfactual
        parts = [name, self.retrained.run.trained.fingerprint, settings.fisher, settings.unit]
        parts += [self.config.curvature.to_dict()]
        folder = self.retrained.directory / "scores"
        folder.mkdir(exist_ok=True)
        path = folder / f"{name}-{fingerprint(plain(parts))}.npz"
        if not path.exists():
            stopwatch = _Stopwatch()
            scores = compute(name)
            write_arrays(path, {"scores": scores, "seconds": stopwatch.seconds()})
        arrays = read_arrays(path)
        self.seconds[name] = float(arrays["seconds"])
        return arrays["scores"]

    def _own_score(self, name: str) -> np.ndarray:
        """Returns the scores of a method of the bank's own, [Q, U]."""
        retrained = self.retrained
        if name == "metagradient":
            return self._metagradients()
        if name.startswith("adjoint"):
            return retrained.by_unit(self._adjoint(has_fisher=name == "adjoint"))
        if name.startswith("in_run"):
            is_preconditioned = name == "in_run_adam"
            return retrained.by_unit(
                in_run(retrained.reverse, self._recursion(), is_preconditioned)
            )
        final = retrained.reverse.final_state()
        layout = self._layout()
        scores = unprojected.score(
            retrained.trainings[0],
            retrained.queries,
            final["params"],
            layout.batches(retrained.trainings[0].table),
            {name: self._gradient_score(name, final)},
        )
        return retrained.by_unit(scores[name])

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
            optimizer.schedule(c.schedule, c.learning_rate, steps, c.warmup, c.final),
            clip=c.clip,
            weight_decay=weight_decay if c.optimizer == "adamw" else 0.0,
            **train.adam_constants(self.config),
        )

    def _adjoint(self, has_fisher: bool) -> np.ndarray:
        retrained, fisher = self.retrained, None
        if has_fisher:
            params = retrained.reverse.final_state()["params"]
            sample = self._sampled(self.config.counterfactual.fisher)
            model_fn = retrained.trainings[0].model_fn
            fisher = adjoint.fisher_rows(model_fn, params, sample, _FISHER_NUMBERS)
        return adjoint.surrogate(retrained.reverse, self._recursion(), fisher)

    def _gradient_score(self, name: str, final: dict) -> GradientScore:
        model = self.retrained.trainings[0].model_fn.merge(final["params"])
        unit_norm = "cosine" in name
        if name.startswith("ekfac"):
            chosen = kronecker.factored(find_sites(model))
            sample = self.config.curvature.sample
            factors = unprojected.fit_ekfac(model, chosen, lambda: self._sampled(sample))
            damping = self.config.curvature.damping
            return GradientScore(unprojected.ekfac(chosen, factors, damping), unit_norm)
        if name.startswith("adam"):
            scales = self._inverse_root_moments()
            # A dot product has 1/√V once in all; a cosine, on both sides (Exp 3).
            power = 1.0 if unit_norm else 0.5
            return GradientScore(unprojected.times(scales, power), unit_norm)
        if name.startswith("layers"):
            return GradientScore(unprojected.only(s.path for s in find_sites(model)))
        return GradientScore(unprojected.identity, unit_norm)

    def _inverse_root_moments(self) -> dict[str, jax.Array]:
        """Returns 1/√V of every weight by path, from the optimizer's state."""
        final = self.retrained.reverse.final_state()
        options = train.adam_constants(self.config)
        nu = functional.flat_parameters(optax.tree.get(final["opt_state"], "nu"))
        constants = options["b2"], options["eps"], options["eps_root"]
        return {p: optimizer_state.adam(x, final["step"], *constants) for p, x in nu.items()}


def all_scores(ranked: Ranked, passages: int) -> np.ndarray:
    """Returns the score of every passage of a full ranking, float32 [Q, N].

    Raises:
        ValueError: the ranking leaves passages out.
    """
    rows_QxN = ranked.proponents
    if rows_QxN.shape[1] != passages or (rows_QxN < 0).any():
        raise ValueError(
            f"the ranking has {rows_QxN.shape[1]} of {passages} passages; a board needs the score "
            "of each of them"
        )
    scores_QxN = np.empty(rows_QxN.shape, np.float32)
    np.put_along_axis(scores_QxN, rows_QxN, ranked.proponent_scores, axis=1)
    return scores_QxN


class _Stopwatch:
    """Seconds of work without those of compiling, which a cost in trainings leaves out."""

    def __init__(self):
        self._started, self._compiling = time.perf_counter(), 0.0
        jax.monitoring.register_event_duration_secs_listener(self._add)

    def _add(self, event: str, seconds: float, **details) -> None:
        if event.startswith("/jax/core/compile/"):
            self._compiling += seconds

    def seconds(self) -> float:
        """Returns the seconds so far."""
        return max(0.0, time.perf_counter() - self._started - self._compiling)


def title(name: str) -> str:
    """Returns a method's name in tables."""
    return TITLES[name] if name in TITLES else method_lib.METHODS[name].title
