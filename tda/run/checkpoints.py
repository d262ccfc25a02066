"""Methods that sum over checkpoints, or change passages' gradients first: TracIn, TRAK, LESS."""

import dataclasses

import numpy as np

from tda import hessian
from tda.methods import Method
from tda.retrieval import sources
from tda.retrieval.scorer import Scorer
from tda.retrieval.sources import Source
from tda.run import train
from tda.run.run import Run
from tda.runtime import processes
from tda.training import checkpoint


def steps_of(run: Run, method: Method) -> list[int]:
    """Returns the checkpoints that a method sums over, rising; the traced one is the last.

    They are `several.checkpoints` of the training's, at even distances, or all if there are fewer.
    """
    traced = run.trained.step
    if not method.several:
        return [traced]
    count, root, saved = run.config.several.checkpoints, run.trained.root, run.trained.steps
    if saved is None:
        saved = processes.on_first_process("list checkpoints", lambda: checkpoint.steps(root))
    saved = [s for s in saved if s <= traced]
    if len(saved) <= count:
        return saved
    at = np.linspace(0, len(saved), count + 1)[1:].round().astype(int) - 1
    return [saved[i] for i in at]


def steps_before_last(saved: range, count: int) -> list[int]:
    """Returns up to `count` − 1 of the saved steps at even distances; the caller adds the last."""
    places = {min(round(i * len(saved) / count), len(saved) - 1) for i in range(1, count)}
    return [saved[i] for i in sorted(places) if saved]


def weights(run: Run, method: Method, steps: list[int]) -> np.ndarray:
    """Returns the weight of each checkpoint in the sum, float64, of sum 1.

    A method by learning rate weighs a checkpoint by the mean rate of the steps since the one
    before, as TracInCP (Pruthi et al. 2020) and LESS (Xia et al. 2024) do; others weigh all alike.
    """
    if not method.by_learning_rate or len(steps) == 1:
        return np.full(len(steps), 1 / len(steps))
    rate = train.learning_rates(run.config, run.total_steps)
    bounds = [0, *steps]
    pairs = zip(bounds[:-1], bounds[1:], strict=True)
    means = np.array([float(np.mean(rate(np.arange(a, b)))) for a, b in pairs])
    return means / means.sum()


@dataclasses.dataclass(frozen=True)
class Part:
    """One checkpoint's part in a sum."""

    source: Source  # gradients of the passages
    queries_QxE: np.ndarray
    roots: list[hessian.Root]  # R^(−1/2) by block; empty for the identity
    probabilities: np.ndarray | None = None  # of passages, float64 [C], for TRAK's 1 − p


@dataclasses.dataclass(frozen=True)
class Sum:
    """A method of several checkpoints as one search."""

    source: Source  # the passages' rows of all checkpoints side by side
    queries_QxE: np.ndarray  # each checkpoint's columns times its weight
    scorer: Scorer  # R^(−1/2) of each checkpoint's blocks
    note: dict  # what a table says about it


def combined(method: Method, parts: list[Part], steps: list[int], counts: np.ndarray) -> Sum:
    """Returns the checkpoints of a method, with their weights `counts`, as one search.

    TRAK (Park et al. 2023, section 3): the mean over checkpoints of φ(q)ᵀ R⁻¹ φ(p), times the mean
    of 1 − p; φ is the gradient of the margin, and a passage of many tokens has the geometric mean
    of their probabilities as p. TracIn: Σ η ⟨∇L(q), ∇L(p)⟩. LESS: Σ η cos(∇L(q), Adam's step on p).
    """
    rows, queries = [], []
    for part, count in zip(parts, counts, strict=True):
        source, q_QxE = part.source, part.queries_QxE
        # The cosine is that of each checkpoint, so the search does not scale the sum to norm one.
        if method.unit_norm:
            source = sources.Mapped(source, sources.normalise)
            q_QxE = sources.normalise(q_QxE)
        rows.append(source)
        queries.append(q_QxE * np.float32(count))
    source = rows[0] if len(rows) == 1 else sources.Joined(rows)
    sure = [p.probabilities for p in parts if p.probabilities is not None]
    if sure:
        source = sources.Mapped(source, sources.scale_by(1 - np.mean(sure, axis=0)))
    roots = [root for part in parts for root in part.roots]
    note = {"checkpoints": steps, "weights": [round(float(c), 6) for c in counts]}
    return Sum(source, np.concatenate(queries, axis=1), Scorer(roots or None, False), note)
