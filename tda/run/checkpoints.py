"""Methods that sum over checkpoints or change passages' gradients first: TracIn, TRAK, LESS."""

import dataclasses
from collections.abc import Iterable

import numpy as np

from tda.methods import Method
from tda.model import functional
from tda.retrieval import sources
from tda.retrieval.scorer import Scorer, Source
from tda.retrieval.whitening import Whitening, search_mesh
from tda.run import encode, vectors
from tda.run.run import Corpus, Trained
from tda.run.train import total_steps
from tda.run.workdir import Workdir
from tda.runtime import processes
from tda.training import checkpoint, optimizer


def steps_of(config, trained: Trained, method: Method) -> list[int]:
    """The checkpoints that a method sums over, rising; the traced one is the last.

    Of those kept up to it, `several.checkpoints` at even distances; all where they are fewer.
    """
    if not method.several:
        return [trained.step]
    wanted = config.several.checkpoints
    if wanted < 1:
        raise ValueError(f"several.checkpoints={wanted} must be 1 or more")
    kept = processes.on_first_process("list checkpoints", lambda: checkpoint.steps(trained.root))
    there = [s for s in kept if s <= trained.step]
    if len(there) <= wanted:
        return there
    at = np.linspace(0, len(there), wanted + 1)[1:].round().astype(int) - 1
    return [there[i] for i in at]


def at_step(trained: Trained, step: int) -> Trained:
    """The model as it was at another checkpoint of the same training.

    The first checkpoint's own parameters are restored; the optimizer's state is read where needed.
    """
    if step == trained.step:
        return trained
    model_fn, params = functional.split(trained.model)
    abstract = functional.abstract(params, model_fn.axes, trained.mesh)
    params = checkpoint.restore_parameters(trained.root, abstract, step)
    return dataclasses.replace(trained, model=model_fn.merge(params), step=step)


def weights(config, corpus: Corpus, method: Method, steps: list[int]) -> np.ndarray:
    """What each checkpoint counts in the sum, float64, of sum 1; see `weights_of`."""
    return weights_of(config, total_steps(config, corpus)[0], method, steps)


def weights_of(config, total: int, method: Method, steps: list[int]) -> np.ndarray:
    """What each checkpoint counts in the sum, float64, of sum 1.

    By learning rate: its mean over the steps since the checkpoint before, as TracInCP (Pruthi et
    al. 2020) and LESS (Xia et al. 2024) weigh them.

    Args:
        config: of the run.
        total: steps of the whole training.
        method: says whether by learning rate, or all alike.
        steps: the checkpoints, rising.
    """
    if not method.by_learning_rate or len(steps) == 1:
        return np.full(len(steps), 1 / len(steps))
    t = config.train
    rate = optimizer.schedule(t.schedule, t.learning_rate, total, t.warmup, t.final)
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


def summed(
    config,
    corpus: Corpus,
    trained: Trained,
    workdir: Workdir,
    method: Method,
    others: Iterable[Method] = (),
) -> Summed:
    """What to search for a method whose passages are not those of one store as they are.

    Args:
        config, corpus, trained, workdir: of the run.
        method: the method.
        others: methods that come after it, whose gradients are encoded in the same pass over the
            corpus where that can be.

    Raises:
        ValueError: R is neither none nor R_train.
    """
    if method.hessian not in ("none", "train"):
        raise ValueError(f"{method.title}: a sum over checkpoints takes R none or train")
    steps, parts = steps_of(config, trained, method), []
    for step in steps:
        then = at_step(trained, step)
        alike = [m for m in others if m.several and step in steps_of(config, trained, m)]
        encode.ahead(
            config, corpus, then, workdir, [method.gradients, *(m.gradients for m in alike)]
        )
        if method.query_gradients == method.gradients:
            source, q_QxE = encode.encode(config, corpus, then, workdir, method.gradients)
        else:
            source = encode.encode_passages(config, corpus, then, workdir, method.gradients)
            q_QxE = encode.encode_queries(config, corpus, then, workdir, method.query_gradients)
        roots, probabilities = [], None
        if method.hessian == "train":
            roots = Whitening(config, source, q_QxE, search_mesh(trained)).train_roots()
        if method.passages == "unsure":
            probabilities = vectors.probabilities(config, corpus, then, workdir)
        parts.append(Part(source, q_QxE, roots, probabilities))
    counts = weights(config, corpus, method, steps)
    return combined(method, parts, steps, counts)


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
            source = sources.Mapped(source, sources.normalised)
            q_QxE = sources.normalised(q_QxE)
        rows.append(source)
        queries.append(q_QxE * np.float32(count))
    source = rows[0] if len(rows) == 1 else sources.Joined(rows)
    sure = [p.probabilities for p in parts if p.probabilities is not None]
    if sure:
        source = sources.Mapped(source, sources.scaled(1 - np.mean(sure, axis=0)))
    roots = [root for part in parts for root in part.roots]
    note = {"checkpoints": steps, "weights": [round(float(c), 6) for c in counts]}
    return Summed(source, np.concatenate(queries, axis=1), Scorer(roots or None, False), note)
