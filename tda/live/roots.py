"""R^(−1/2) of stores, for questions: made as a run makes it, and kept for the next start."""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Sequence

import numpy as np

from tda import hessian
from tda import store as stores
from tda.gradients.projection import Projection
from tda.store import GradientStore

Progress = Callable[[str, int, int], None]


def silent(what: str, done: int, total: int) -> None:
    """Progress that nobody looks at."""


@dataclasses.dataclass(frozen=True)
class Hessian:
    """How R is made; see `tda.hessian`.

    Attributes:
        sample, seed: passages that R_train is taken of (0: all), and the seed of their draw.
        component: k of the mixing rule; 0: in proportion to the width.
        weight: λ; below 0: by the rule.
        damping: in mean eigenvalues of a block.
    """

    sample: int = 0
    seed: int = 0
    component: int = 0
    weight: float = -1.0
    damping: float = 1e-3


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A corpus's gradients, and all that makes a query's gradient like them.

    Attributes:
        store: the corpus's gradients.
        queries: the gradients that R_eval is taken of; None where there are none.
        projection: P.
        scales: gives 1/√V by path, or None; called when a query is first encoded.
        output, include, exclude, untapped: as for `tda.gradients.encoder.make_encoder`.
    """

    store: GradientStore
    queries: GradientStore | None
    projection: Projection
    scales: Callable[[], dict | None] = lambda: None
    output: str = "loss"
    include: str | None = None
    exclude: str | None = None
    untapped: str = "leave"


class Roots:
    """R^(−1/2) of each store and kind.

    Args:
        encoded: the corpus's gradients, by whether they are corrected.
        how: how R is made.
        folder: where roots are kept for the next start; None keeps them in memory alone.
    """

    def __init__(self, encoded: dict[bool, Encoded], how: Hessian, folder=None):
        self._encoded, self._how = encoded, how
        self._folder = None if folder is None else pathlib.Path(folder)
        self._roots: dict[tuple[bool, str], list[np.ndarray] | None] = {}

    def get(self, corrected: bool, kind: str, on_progress: Progress) -> list[np.ndarray] | None:
        """R^(−1/2) by block, float32 [E_b, E_b] each; None for the identity.

        Args:
            corrected: of which gradients.
            kind: "none", "train" or "mixed".
            on_progress: told what is done.
        """
        key = corrected, kind
        if key not in self._roots:
            self._roots[key] = None if kind == "none" else self._kept(*key, on_progress)
        return self._roots[key]

    def _kept(self, corrected: bool, kind: str, on_progress: Progress) -> list[np.ndarray]:
        e = self._encoded[corrected]
        path = None
        if self._folder is not None:
            path = self._folder / f"root-{kind}-{_fingerprint(e, self._how, kind)}.npz"
            if path.exists():
                on_progress("reading R", 0, 0)
                with np.load(path, allow_pickle=False) as kept:
                    return [kept[str(i)] for i in range(len(e.store.slices))]
        made = self._made(e, kind, on_progress)
        if path is not None:
            # A run that may only be read is asked all the same; R is made again at each start.
            with contextlib.suppress(PermissionError):
                _write(path, made)
        return made

    def _made(self, e: Encoded, kind: str, on_progress: Progress) -> list[np.ndarray]:
        how, slices = self._how, e.store.slices
        total = min(how.sample or e.store.rows, e.store.rows)

        def rows():
            done = 0
            for x_RxE in hessian.rows_for(e.store, how.sample, how.seed):
                on_progress("R of the passages", done, total)
                yield x_RxE
                done += len(x_RxE)

        train = hessian.autocorrelation(rows(), slices)
        on_progress("decomposing R", 0, 0)
        if kind == "train":
            return hessian.inverse_root(train, how.damping)
        gradients_QxE = e.queries.read(slice(0, e.queries.rows))
        evaluation = hessian.autocorrelation([gradients_QxE], slices)
        weight = how.weight
        if weight < 0:
            k = how.component or hessian.component(e.store.width)
            spectra = hessian.spectrum(train), hessian.spectrum(evaluation)
            weight = hessian.mixing_weight(*spectra, k)
        return hessian.inverse_root(hessian.mix(train, evaluation, weight), how.damping)


def _write(path: pathlib.Path, roots: list[np.ndarray]) -> None:
    path.parent.mkdir(exist_ok=True)
    part = f"{path}.part"
    with open(part, "wb") as out:
        np.savez(out, **{str(i): root for i, root in enumerate(roots)})
    os.replace(part, path)


def _fingerprint(e: Encoded, how: Hessian, kind: str) -> str:
    """Tells a root from others: what its gradients are, and how R is made of them."""

    def of(store: GradientStore):
        return [store.manifest, store.withdrawn.tolist()]

    made_from = [dataclasses.asdict(how), of(e.store)]
    if kind == "mixed":
        made_from.append(of(e.queries))
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:16]


def finished_stores(paths: Sequence) -> list[GradientStore]:
    """The stores among some paths that lack nothing, those written last first."""
    there = [p for p in map(pathlib.Path, paths) if stores.finished(p)]
    there.sort(key=lambda p: (p / "manifest.json").stat().st_mtime, reverse=True)
    return [stores.open_store(p) for p in there]
