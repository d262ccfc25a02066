"""Methods that sum over checkpoints or change passages' gradients first: TracIn, TRAK, LESS."""

import dataclasses

import numpy as np

from tda.methods import Method
from tda.retrieval import sources
from tda.retrieval.scorer import Scorer
from tda.retrieval.sources import Source
from tda.run.run import Run
from tda.runtime import processes
from tda.training import checkpoint, optimizer


def steps_of(run: Run, method: Method) -> list[int]:
    """The checkpoints that a method sums over, rising; the traced one is the last.

    Of those kept up to it, `several.checkpoints` at even distances; all where they are fewer.
    """
    traced = run.trained.step
    if not method.several:
        return [traced]
    count = run.config.several.checkpoints
    if count < 1:
        raise ValueError(f"several.checkpoints={count} must be 1 or more")
    root = run.trained.root
    saved = processes.on_first_process("list checkpoints", lambda: checkpoint.steps(root))
    saved = [s for s in saved if s <= traced]
    if len(saved) <= count:
        return saved
    at = np.linspace(0, len(saved), count + 1)[1:].round().astype(int) - 1
    return [saved[i] for i in at]


def weights(run: Run, method: Method, steps: list[int]) -> np.ndarray:
    """The weight of each checkpoint in the sum, float64, of sum 1.

    By learning rate: its mean over the steps since the checkpoint before, as TracInCP (Pruthi et
    al. 2020) and LESS (Xia et al. 2024) weigh them.

    Args:
        run: the run.
        method: says whether by learning rate, or all alike.
        steps: the checkpoints, rising.
    """
    if not method.by_learning_rate or len(steps) == 1:
        return np.full(len(steps), 1 / len(steps))
    t = run.config.train
    rate = optimizer.schedule(t.schedule, t.learning_rate, run.total_steps, t.warmup, t.final)
    bounds = [0, *steps]
    pairs = zip(bounds[:-1], bounds[1:], strict=True)
    means = np.array([float(np.mean(rate(np.arange(a, b)))) for a, b in pairs])
    return means / means.sum()


@dataclasses.dataclass(frozen=True)
class Summed:
    """A method of several checkpoints as one search.

    Attributes:
        source: the passages' rows of all checkpoints side by side.
        queries_QxE: the queries', with each checkpoint's weight.
        scorer: R^(−1/2) of each checkpoint's blocks; never a norm, which is of each part alone.
        note: what a table says of it.
    """

    source: Source
    queries_QxE: np.ndarray
    scorer: Scorer
    note: dict


@dataclasses.dataclass(frozen=True)
class Part:
    """What one checkpoint has in a sum.

    Attributes:
        source: its gradients of the passages.
        queries_QxE: those of the queries.
        roots: R^(−1/2) by block; empty for the identity.
        probabilities: of passages, float64 [C]; None unless they count by them.
    """

    source: Source
    queries_QxE: np.ndarray
    roots: list[np.ndarray]
    probabilities: np.ndarray | None = None


def combined(method: Method, parts: list[Part], steps: list[int], counts: np.ndarray) -> Summed:
    """The checkpoints of a method as one search.

    TRAK (Park et al. 2023, section 3): the mean over checkpoints of φ(q)ᵀ R⁻¹ φ(p), times the mean
    of 1 − p; φ is the gradient of the margin, and of a passage of many tokens p is the geometric
    mean of their probabilities. TracIn: Σ η ⟨∇L(q), ∇L(p)⟩. LESS: Σ η cos(∇L(q), Adam's step on p).

    Args:
        method: the method.
        parts: of each checkpoint.
        steps, counts: which they are, and what each counts.
    """
    rows, queries = [], []
    for part, count in zip(parts, counts, strict=True):
        source, q_QxE = part.source, part.queries_QxE
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
    return Summed(source, np.concatenate(queries, axis=1), Scorer(roots or None, False), note)
