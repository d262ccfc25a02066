"""Scores of every query and passage by the methods that need the training, or whole gradients."""

import dataclasses
from collections.abc import Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from tda.counterfactual import adjoint, eigenbasis, source, unprojected
from tda.counterfactual.adjoint import AdamRecursion
from tda.counterfactual.eigenbasis import Gradients
from tda.counterfactual.example_gradients import ExampleGradients
from tda.counterfactual.in_run import in_run
from tda.counterfactual.inverse import DampedInverse
from tda.counterfactual.metagradients import Reverse
from tda.counterfactual.training import sum_by_unit, units_of_tokens, with_plain_attention
from tda.counterfactual.unprojected import GradientScore
from tda.data.batches import BatchLayout, draw
from tda.gradients import fitted_curvature, kronecker, sampled_labels
from tda.gradients.kronecker import Curvature
from tda.gradients.moments import optimizer_state
from tda.gradients.sampled_labels import sampled_loss
from tda.gradients.sites import Site, find_sites
from tda.model import functional

# Numbers of the adjoint's mean Fisher matrix at most: 4 GiB of float32.
FISHER_NUMBERS = 1 << 30
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
THROUGH_TRAINING = tuple(
    n for n in TITLES if n.startswith(("metag", "adjoint", "in_run", "source"))
)
"""The methods that follow the training back; the others take gradients at its end."""


def scores_tokens(name: str) -> bool:
    """Returns whether a method has a score for every token, whose sums are the passages'."""
    return name in TITLES and "cosine" not in name


@dataclasses.dataclass(frozen=True)
class ScoreSettings:
    """What the methods approximate with."""

    layout: BatchLayout
    """How passages are batched where their gradients are taken at one model."""
    sample: int
    """Passages that EK-FAC and Shampoo are fitted to."""
    fisher: int
    """Passages of the adjoint's mean Fisher matrix, and of conjugate gradients."""
    damping: float = kronecker.DAMPING
    """λ of EK-FAC, in mean eigenvalues of a matrix."""
    seed: int = 0
    """Of the draws of passages and labels."""


class TrainingScores:
    """Computes the scores of the methods of `TITLES`.

    Args:
        reverse: the training with its kept states, and the queries.
        recursion: the training's optimizer.
        settings: what the methods approximate with.
    """

    def __init__(
        self,
        reverse: Reverse,
        recursion: AdamRecursion,
        settings: ScoreSettings,
    ):
        self._reverse, self._recursion, self._settings = reverse, recursion, settings
        self._training, self._queries = reverse.training, reverse.queries

    def compute(
        self, name: str, by_token: bool = False, queries_name: str = "queries"
    ) -> np.ndarray:
        """Returns a method's scores of all queries and passages, [Q, N], or tokens, [Q, C].

        Args:
            name: a name in `TITLES`.
            by_token: whether the scores are of tokens.
            queries_name: names the file of an unfinished pass of metagradients.

        Raises:
            ValueError: the method has no scores of tokens (`scores_tokens`).
        """
        if name == "metagradient":
            scores_QxC = self._reverse.by_token(np.arange(len(self._queries)), queries_name)
            return scores_QxC if by_token else self._by_passage(scores_QxC)
        if by_token and not scores_tokens(name):
            raise ValueError(f"{name} scores whole passages; take another method, or units")
        if name.startswith("adjoint"):
            hessian = self._hessian(name)
            return adjoint.surrogate(self._reverse, self._recursion, hessian, by_token)
        if name.startswith("in_run"):
            return in_run(self._reverse, self._recursion, name == "in_run_adam", by_token)
        if name == "source":
            return self._source(by_token)
        final = self._reverse.final_state()
        queries = self._queries.all_gradients(final["params"])
        if name in ("ekfac_cg", "ekfac_astra"):
            inverse = self._damped_inverse(final["params"])
            refine = self._conjugate_gradients if name == "ekfac_cg" else self._astra
            queries = refine(inverse, queries)
            method = GradientScore(unprojected.only(queries))
        else:
            method = self._gradient_score(name, final)
        return self._whole(queries, final["params"], method, by_token)

    def _by_passage(self, scores_QxC: np.ndarray) -> np.ndarray:
        table = self._training.table
        row_C, _ = units_of_tokens(table, range(len(table)))
        return sum_by_unit(scores_QxC, row_C, len(table))

    def _whole(
        self, queries: Gradients, params: dict, method: GradientScore, by_token: bool
    ) -> np.ndarray:
        """Returns scores by whole gradients of passages at some parameters."""
        passages = self._settings.layout.batches(self._training.table)
        return unprojected.score(self._training, queries, params, passages, method, by_token)

    def _sampled(self, count: int) -> Iterable[dict]:
        """Returns batches of a sample of the passages, with labels drawn from the model."""
        table, seed = self._training.table, self._settings.seed
        rows = draw(len(table), count, seed)
        layout = self._settings.layout
        return sampled_labels.batches(table, rows, labels="sampled", layout=layout, seed=seed)

    def _hessian(self, name: str) -> adjoint.Hessian | None:
        """Returns the approximation of the Hessian in an adjoint of this name."""
        training = self._training
        if name == "adjoint_batch":
            return adjoint.batch_gauss_newton(
                with_plain_attention(training.model_fn, training.params)
            )
        if name == "adjoint_none":
            return None
        params = self._reverse.final_state()["params"]
        if name == "adjoint_ekfac":
            tokens = training.table.count_scored() / len(training.table)
            return adjoint.ekfac(*self._ekfac(params), tokens)
        sample = self._sampled(self._settings.fisher)
        return adjoint.mean_fisher(
            adjoint.fisher_rows(training.model_fn, params, sample, FISHER_NUMBERS)
        )

    def _gradient_score(self, name: str, final: dict) -> GradientScore:
        unit_norm = "cosine" in name
        if name.startswith(("ekfac", "shampoo")):
            params, damping = final["params"], self._settings.damping
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
        model = self._training.model_fn.merge(params)
        return model, kronecker.factored(find_sites(model))

    def _ekfac(self, params: dict) -> tuple[list[Site], dict[str, Curvature]]:
        """Returns the matrices and EK-FAC's curvature; fitted anew, as each method's cost is."""
        (model, chosen), sample = self._factored(params), self._settings.sample
        return chosen, fitted_curvature.fit(
            model, chosen, lambda stage: self._sampled(sample), "sampled"
        )

    def _sampled_gradients(
        self, at: list[dict], scales: Gradients | None = None
    ) -> Iterator[Gradients]:
        """Yields whole gradients of a sample with drawn labels, at each of some parameters."""
        gradients_of = ExampleGradients(self._training.model_fn, sampled_loss)
        for params in at:
            for batch in self._sampled(self._settings.sample):
                scored = (batch["weights"] > 0).any(axis=1)
                gradients = gradients_of(params, batch)
                if scales is not None:
                    gradients = {p: g * jnp.sqrt(scales[p]) for p, g in gradients.items()}
                yield {p: g[scored] for p, g in gradients.items()}

    def _damped_inverse(self, params: dict) -> DampedInverse:
        """Returns (H + D)⁻¹ at the end of the training, by EK-FAC and products with H."""
        plain_fn = with_plain_attention(self._training.model_fn, params)
        return DampedInverse(plain_fn, params, *self._ekfac(params), self._settings.damping)

    def _conjugate_gradients(self, inverse: DampedInverse, queries: Gradients) -> Gradients:
        rows = draw(len(self._training.table), self._settings.fisher, self._settings.seed)
        return inverse.by_conjugate_gradients(queries, self._one_batch(rows), _CG_STEPS)

    def _astra(self, inverse: DampedInverse, queries: Gradients) -> Gradients:
        N, seed = len(self._training.table), self._settings.seed
        draws = (draw(N, _ASTRA_PASSAGES, seed + i) for i in range(_ASTRA_STEPS))
        return inverse.by_astra(queries, map(self._one_batch, draws))

    def _one_batch(self, rows: np.ndarray) -> dict:
        """Returns rows of the passages as one batch, of a length that fits all passages."""
        table = self._training.table
        length = int(table.lengths.max())
        (batch,) = BatchLayout((length,), len(rows) * length, self._settings.layout.pad).batches(
            table, rows
        )
        return batch.arrays()

    def _source(self, by_token: bool) -> np.ndarray:
        """Returns SOURCE's scores from the states that reverse mode keeps."""
        training, reverse = self._training, self._reverse
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
            rates = sum(float(self._recursion.learning_rate(t)) for t in range(first, stop))
            segments.append(source.Segment(rates, scales, curvature))
        queries = self._queries.all_gradients(reverse.final_state()["params"])
        sides = source.pull_back(chosen, segments, queries)
        return sum(
            self._whole(side, state["params"], GradientScore(unprojected.only(side)), by_token)
            / len(of_segment)
            for side, of_segment in zip(sides, reversed(states), strict=True)
            for state in of_segment
        )

    def _inverse_root_moments(self, state: dict) -> Gradients:
        """Returns 1/√V of every weight by path, from the optimizer's state."""
        r, nu = self._recursion, optax.tree.get(state["opt_state"], "nu")
        constants = r.b2, r.eps, r.eps_root
        return {
            p: optimizer_state.adam(x, state["step"], *constants)
            for p, x in functional.flat_parameters(nu).items()
        }
