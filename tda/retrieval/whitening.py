"""R of a store and of its queries, and the scorers that methods make of them."""

import dataclasses
import pathlib

import numpy as np

from tda import hessian
from tda.methods import Method
from tda.retrieval import scorer
from tda.retrieval.scorer import Scorer
from tda.runtime import atomic_file, progress
from tda.runtime.fingerprint import fingerprint

EVALUATIONS = ("all", "leave_one_out", "disjoint")
# Eigenvalues below this are the rounding of float32 products, in mean eigenvalues.
_FLOOR = 1e-6


def evaluation_of(config, method: Method) -> str:
    """What a method's R_eval is made of.

    Raises:
        ValueError: `hessian.evaluation` is unknown.
    """
    name = method.evaluation or config.hessian.evaluation
    if name not in EVALUATIONS:
        raise ValueError(f"unknown hessian.evaluation={name!r}; use {', '.join(EVALUATIONS)}")
    return name


@dataclasses.dataclass(frozen=True)
class Part:
    """Queries that are searched together, and how.

    Attributes:
        queries: their numbers, rising.
        scorers: by the method's name.
    """

    queries: np.ndarray
    scorers: dict[str, Scorer]


class Whitening:
    """R_train of a source and R_eval of its queries, taken when they are first needed.

    Args:
        config: of the run.
        source: the corpus's gradients.
        queries_QxE: the queries' gradients.
        mesh: the devices; one where None.
    """

    def __init__(self, config, source, queries_QxE: np.ndarray, mesh):
        self._config, self._h = config, config.hessian
        self._source, self._queries, self._mesh = source, queries_QxE, mesh
        self.slices = scorer.slices_of(source.form.widths)
        self._train = None
        self.notes: dict[str, dict] = {}
        self.spectra: dict[str, np.ndarray] = {}

    @property
    def train(self) -> hessian.Autocorrelation:
        """R_train."""
        if self._train is None:
            count = min(self._h.sample or self._source.rows, self._source.rows)
            with progress.bar(count, "R_train", "passage") as bar:
                self._train = hessian.of_source(
                    self._source, self._h.sample, self._h.seed, self._mesh, bar.update
                )
            self.spectra["train"] = np.concatenate(hessian.spectra(self._train.blocks))
        return self._train

    def _roots(self, R, noise, note: dict) -> tuple[list[np.ndarray], np.ndarray]:
        """R^(−1/2), and how much of R is in it, by block: 1, or less where R was shrunk."""
        h = self._h
        note["cutoff"] = h.cutoff
        if h.damping >= 0:
            note["damping"] = h.damping
            return hessian.inverse_root(R, h.damping, h.cutoff), np.ones(len(self.slices))
        R = list(R)
        shares = hessian.shrinkage(R, noise)
        note["shrinkage"] = float(np.median(shares))
        return hessian.inverse_root(hessian.shrunk(R, shares), _FLOOR, h.cutoff), 1 - shares

    def train_roots(self) -> list[np.ndarray]:
        """R_train^(−1/2) by block."""
        self.notes["train"] = {}
        return self._roots(self.train.blocks, self.train.noise, self.notes["train"])[0]

    def _mixed(self, evaluation: hessian.Autocorrelation, weight: float, name: str):
        """Of λ R_eval + (1 − λ) R_train, what `_roots` gives."""
        noise = weight**2 * evaluation.noise + (1 - weight) ** 2 * self.train.noise
        R = hessian.mix(self.train.blocks, evaluation.blocks, weight)
        return self._roots(R, noise, self.notes[name])

    def _weight(self, evaluation: hessian.Autocorrelation, name: str) -> float:
        """λ, by the rule or as the config says."""
        k = self._h.component or hessian.component(self._source.form.width)
        weight = self._h.weight
        by_block = hessian.spectra(evaluation.blocks)
        if weight < 0:
            hessian.check_component(by_block, k, evaluation.count)
        spectrum = np.concatenate(by_block)
        self.spectra.setdefault("evaluation", spectrum)
        _ = self.train  # its spectrum is taken with it
        if weight < 0:
            both = (np.sort(x)[::-1] for x in (self.spectra["train"], spectrum))
            weight = hessian.mixing_weight(*both, k)
        self.notes[name] = {"lambda": weight, "component": k, "evaluation": name}
        return weight

    def _autocorrelation(self, rows: np.ndarray) -> hessian.Autocorrelation:
        return hessian.of_source(scorer.InMemory(self._queries[rows], self.slices))

    def parts(self, methods: dict[str, Method]) -> list[Part]:
        """How to search for some methods: all queries together but where R differs by half."""
        everyone = np.arange(len(self._queries))
        roots: dict = {"none": None}
        together, by_half = {}, []
        for name, method in methods.items():
            kind = method.hessian
            own: tuple[float, ...] = ()
            if kind == "train" and kind not in roots:
                roots[kind] = self.train_roots()
            if kind == "mixed":
                kind = evaluation_of(self._config, method)
                if kind == "disjoint":
                    by_half.append(name)
                    continue
                if kind not in roots:
                    roots[kind] = self._whole(kind, everyone)
                if kind == "leave_one_out":
                    own = roots[kind][1]
                together[name] = Scorer(roots[kind][0], method.unit_norm, own)
                continue
            together[name] = Scorer(roots[kind], method.unit_norm)
        found = [Part(everyone, together)] if together else []
        return found + (self._halves(methods, by_half) if by_half else [])

    def _whole(self, kind: str, everyone: np.ndarray) -> tuple[list, tuple[float, ...]]:
        """Roots of R with all queries, and β of one query's own part in each block of it."""
        n = len(everyone)
        evaluation = self._autocorrelation(everyone)
        weight = self._weight(evaluation, kind)
        if kind == "all":
            return self._mixed(evaluation, weight, kind)[0], ()
        if n < 2:
            raise ValueError("hessian.evaluation=leave_one_out needs two queries or more")
        # The mean over the other n − 1: the whole sum goes in, one part of it comes out again.
        grown = dataclasses.replace(
            evaluation, blocks=[b * (n / (n - 1)) for b in evaluation.blocks]
        )
        roots, kept = self._mixed(grown, weight, kind)
        return roots, tuple((kept * (weight / (n - 1))).tolist())

    def _halves(self, methods: dict[str, Method], names: list[str]) -> list[Part]:
        halves = hessian.halves(len(self._queries), self._h.seed)
        found, weights = [], []
        for mine, others in (halves, halves[::-1]):
            evaluation = self._autocorrelation(others)
            weights.append(self._weight(evaluation, "disjoint"))
            roots, _ = self._mixed(evaluation, weights[-1], "disjoint")
            found.append(Part(mine, {n: Scorer(roots, methods[n].unit_norm) for n in names}))
        self.notes["disjoint"]["lambda"] = float(np.mean(weights))
        return found

    def note(self, method: Method) -> dict | None:
        """What a table says of a method's R."""
        kind = evaluation_of(self._config, method) if method.hessian == "mixed" else method.hessian
        return self.notes.get(kind)

    def keep_spectra(self, directory: pathlib.Path, layout_blocks, made_from) -> str | None:
        """Writes the spectra that were taken (.npz), and gives the file's name.

        Arrays: "blocks" (names), "widths", and float64 [E] "train" and "evaluation", each block's
        eigenvalues falling, block after block.
        """
        if not self.spectra:
            return None
        name = f"spectra-{fingerprint(made_from)}.npz"
        arrays = {"blocks": np.array(layout_blocks), "widths": np.array(self._source.form.widths)}
        if (directory / name).exists():
            # An earlier search may have needed an R that this one did not.
            with np.load(directory / name, allow_pickle=False) as there:
                arrays = dict(there) | arrays
        with atomic_file.open_atomic(directory / name, "wb") as out:
            np.savez(out, **arrays | self.spectra)
        return name
