"""R^(−1/2) of stores, for questions: made as a run makes it, and kept for the next start."""

import contextlib
import dataclasses
import hashlib
import json
import pathlib

import numpy as np

from tda import hessian
from tda.live.encoded import Encoded
from tda.methods import GradientKind, Method
from tda.retrieval.scorer import InMemory, Scorer
from tda.runtime import atomic_file
from tda.runtime.progress import Progress, counted
from tda.store import GradientStore

# Eigenvalues below this are the rounding of float32 products, in mean eigenvalues.
_FLOOR = 1e-6
_HALVES = ("first half", "second half")


@dataclasses.dataclass(frozen=True)
class Hessian:
    """How R is made; see `tda.hessian`.

    Attributes:
        sample, seed: passages that R_train is taken of (0: all), and the seed of their draw.
        component: k of the mixing rule; 0: in proportion to the width.
        weight: λ; below 0: by the rule.
        damping: in mean eigenvalues of a block; below 0: shrunk as a sample of its size needs.
        cutoff: directions of smaller eigenvalues are left out, in the same unit.
        evaluation: what R_eval is made of: "all" queries, "leave_one_out" or "disjoint".
    """

    sample: int = 0
    seed: int = 0
    component: int = 0
    weight: float = -1.0
    damping: float = 1e-3
    cutoff: float = 0.0
    evaluation: str = "all"


@dataclasses.dataclass(frozen=True)
class _Root:
    """R^(−1/2) by block, float32 [E_b, E_b] each, None for the identity; and β of `Scorer.own`."""

    blocks: list[np.ndarray] | None
    own: tuple[float, ...] = ()


class Roots:
    """R^(−1/2) of each store and kind.

    Args:
        encoded: the corpus's gradients.
        how: how R is made.
        folder: where roots are kept for the next start; None keeps them in memory alone.
    """

    def __init__(self, encoded: dict[GradientKind, Encoded], how: Hessian, folder=None):
        self._encoded, self._how = encoded, how
        self._folder = None if folder is None else pathlib.Path(folder)
        self._roots: dict[tuple[GradientKind, str], _Root] = {}
        self._train: tuple[GradientKind, hessian.Autocorrelation] | None = None

    def scorer(
        self, method: Method, number: int | None, gradients: GradientKind, on_progress: Progress
    ) -> Scorer:
        """How a method scores passages for a question.

        R_eval of all queries has no part of a question that is none of the run's, and serves it
        whatever `evaluation` says; a query of the run has the run's own rule: its part taken out
        (leave_one_out), or the half that it is not in (disjoint).

        Args:
            method: a gradient method.
            number: of the run's query that is asked; None where it is none of them.
            gradients: the key of the method's store.
            on_progress: told what is done.

        Raises:
            ValueError: the rule needs more queries than there are.
        """
        kind = self._kind(method, number, gradients)
        key = gradients, kind
        if key not in self._roots:
            self._roots[key] = _Root(None) if kind == "none" else self._kept(*key, on_progress)
        return Scorer(self._roots[key].blocks, method.unit_norm, self._roots[key].own)

    def _kind(self, method: Method, number: int | None, gradients: GradientKind) -> str:
        """Which R: "none", "train", "mixed" (R_eval of all), "leave_one_out", or a half's name."""
        rule = method.evaluation or self._how.evaluation
        if method.hessian != "mixed" or number is None or rule == "all":
            return method.hessian
        if rule == "disjoint":
            halves = hessian.halves(self._encoded[gradients].queries.rows, self._how.seed)
            # The half that R_eval is taken of: not the question's own.
            return _HALVES[int(number in halves[0])]
        return rule

    def _kept(self, gradients: GradientKind, kind: str, on_progress: Progress) -> _Root:
        e = self._encoded[gradients]
        path = None
        if self._folder is not None:
            name = f"root-{kind.replace(' ', '-')}-{_fingerprint(e, self._how, kind)}.npz"
            path = self._folder / name
            if path.exists():
                on_progress("reading R", 0, 0)
                with np.load(path, allow_pickle=False) as kept:
                    blocks = [kept[str(i)] for i in range(len(e.store.slices))]
                    return _Root(blocks, tuple(kept["own"].tolist()))
        made = self._made(gradients, kind, on_progress)
        if path is not None:
            # A run that may only be read is asked all the same; R is made again at each start.
            with contextlib.suppress(PermissionError):
                _write(path, made)
        return made

    def _made(self, gradients: GradientKind, kind: str, on_progress: Progress) -> _Root:
        how, e = self._how, self._encoded[gradients]
        train = self._train_of(gradients, on_progress)
        on_progress("decomposing R", 0, 0)
        if kind == "train":
            return _Root(_inverse_root(train.blocks, train.noise, how)[0])
        queries_QxE = e.queries.read(slice(0, e.queries.rows))
        if kind in _HALVES:
            halves = hessian.halves(len(queries_QxE), how.seed)
            queries_QxE = queries_QxE[halves[_HALVES.index(kind)]]
        evaluation = hessian.of_source(InMemory(queries_QxE, e.store.slices))
        weight = how.weight
        if weight < 0:
            k = how.component or hessian.component(e.store.width)
            by_block = hessian.spectra(evaluation.blocks)
            hessian.check_component(by_block, k, evaluation.count)
            spectrum = np.sort(np.concatenate(by_block))[::-1]
            weight = hessian.mixing_weight(hessian.spectrum(train.blocks), spectrum, k)
        blocks, n = evaluation.blocks, len(queries_QxE)
        if kind == "leave_one_out":
            if n < 2:
                raise ValueError("hessian.evaluation=leave_one_out needs two queries or more")
            # The mean over the other n − 1: the whole sum goes in, one part of it comes out again.
            blocks = [b * (n / (n - 1)) for b in blocks]
        noise = weight**2 * evaluation.noise + (1 - weight) ** 2 * train.noise
        mixed = hessian.mix(train.blocks, blocks, weight)
        roots, kept = _inverse_root(mixed, noise, how)
        own = (kept * (weight / (n - 1))).tolist() if kind == "leave_one_out" else ()
        return _Root(roots, tuple(own))

    def _train_of(self, gradients: GradientKind, on_progress: Progress) -> hessian.Autocorrelation:
        """R_train; that of the last store is held, for its other kinds."""
        if self._train is None or self._train[0] != gradients:
            self._train = None
            how, store = self._how, self._encoded[gradients].store
            total = min(how.sample or store.rows, store.rows)
            on_rows = counted(on_progress, "R of the passages", total)
            found = hessian.of_source(store, how.sample, how.seed, on_rows=on_rows)
            self._train = gradients, found
        return self._train[1]


def _inverse_root(R, noise: np.ndarray, how: Hessian) -> tuple[list[np.ndarray], np.ndarray]:
    """R^(−1/2), and how much of R is in it, by block: 1, or less where R was shrunk."""
    if how.damping >= 0:
        return hessian.inverse_root(R, how.damping, how.cutoff), np.ones(len(noise))
    R = list(R)
    shares = hessian.shrinkage(R, noise)
    return hessian.inverse_root(hessian.shrunk(R, shares), _FLOOR, how.cutoff), 1 - shares


def factors(scorer: Scorer, query_E: np.ndarray, slices: list[slice]) -> list[np.ndarray] | None:
    """F by block with FᵀF the inverse of R that a query is scored with, float64 [E_b, E_b].

    R^(−1/2) itself where the query's own part stays in R. None for the identity.

    Args:
        scorer: how it is scored.
        query_E: its gradient, float32 [E].
        slices: where each block stands.
    """
    if not scorer.own:
        return scorer.roots
    out = []
    for root, s, beta in zip(scorer.roots, slices, scorer.own, strict=True):
        # (R − β g gᵀ)⁻¹ = W (I + γ h hᵀ) W, h = W g (Sherman and Morrison).
        h_E = np.asarray(root, np.float64) @ query_E[s]
        square = h_E @ h_E
        longer = max(1 - beta * square, 1e-6) ** -0.5 - 1
        step = longer / square if square > 0 else 0.0
        out.append(root + step * np.outer(h_E, h_E @ root))
    return out


def _write(path: pathlib.Path, root: _Root) -> None:
    path.parent.mkdir(exist_ok=True)
    with atomic_file.open_atomic(path, "wb") as out:
        np.savez(out, own=np.asarray(root.own), **{str(i): b for i, b in enumerate(root.blocks)})


def _fingerprint(e: Encoded, how: Hessian, kind: str) -> str:
    """Tells a root from others: what its gradients are, and how R is made of them."""

    def of(store: GradientStore):
        return [store.manifest, store.withdrawn.tolist()]

    made_from = [dataclasses.asdict(how), of(e.store)]
    if kind != "train":
        made_from.append(of(e.queries))
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:16]
