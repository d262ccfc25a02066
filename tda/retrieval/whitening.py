"""R of passages and queries, and the scorers that methods derive from it: the one recipe for R.

`tda.trace`, runs and live questions all whiten by this module.
"""

import contextlib
import copy
import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterable, Sequence

import jax
import numpy as np

from tda import hessian
from tda.methods import Method
from tda.retrieval import root_file
from tda.retrieval.hessian_settings import HessianSettings
from tda.retrieval.root_file import Root
from tda.retrieval.scorer import Scorer
from tda.retrieval.sources import InMemory, Source
from tda.runtime import atomic_file, preemption, processes, progress
from tda.runtime.fingerprint import fingerprint
from tda.runtime.groups import ONE_GROUP, Groups
from tda.runtime.progress import Progress

# Eigenvalues below this are the rounding of float32 products, in mean eigenvalues.
_FLOOR = 1e-6
_HALVES = ("first half", "second half")
# The kind of R_eval without query 3 is "without 3".
_WITHOUT = "without "


@dataclasses.dataclass(frozen=True)
class Part:
    """Queries that are searched together.

    Attributes:
        queries: their places among all queries, ascending.
        make_scorers: returns the scorers by the method's name; R is computed only then.
    """

    queries: np.ndarray
    make_scorers: Callable[[], dict[str, Scorer]]

    @property
    def scorers(self) -> dict[str, Scorer]:
        """The scorers by the method's name."""
        return self.make_scorers()


class Whitening:
    """R^(−1/2) of one source of gradients, each kind computed when it is first needed.

    The kinds are "none" (the identity), "train" (R_train), and mixtures of R_train with an R_eval
    of "all" queries, of all queries where a query's own part is removed when it is scored
    ("leave_one_out"), of all queries but one ("without 3"), or of the "first half" or the "second
    half" of the queries.

    Leaving one query out changes one direction of a dense R, which the scorer takes out again, but
    up to k directions of either factor of a Kronecker product. There each query has an R of its
    own, and a search of its own.

    Args:
        settings: the settings of R.
        source: the passages' gradients.
        queries_QxE: the gradients of the queries of R_eval; not needed for R_train.
        mesh: the devices that R_train is summed on; None for one device.
        folder: where roots are kept for the next start; None keeps them only in memory.
        identity: JSON values that identify these gradients in files.
        shapes: of the gradients' blocks (`Layout.shapes`), which a Kronecker product needs.
        groups: how passages are cut into groups whose part of R_train is kept, and which processes
            share; with a directory there must be a `folder` too, from which all read the roots.
        on_progress: called with the progress; None shows a progress bar.

    Attributes:
        notes: the choices made for each kind of R (λ, damping, shrinkage, …), for tables.
        spectra: eigenvalues of R_train ("train") and of the first R_eval ("evaluation"), float64
            [E], in descending order within each block, block after block.
    """

    def __init__(
        self,
        settings: HessianSettings,
        source: Source,
        queries_QxE: np.ndarray | None = None,
        mesh: jax.sharding.Mesh | None = None,
        *,
        folder: pathlib.Path | None = None,
        identity=None,
        shapes: Sequence[hessian.Shape] | None = None,
        groups: Groups = ONE_GROUP,
        on_progress: Progress | None = None,
    ):
        self._settings, self._source, self._queries = settings, source, queries_QxE
        self._mesh, self._folder, self._identity, self._groups = mesh, folder, identity, groups
        self._on_progress = on_progress
        self._slices = hessian.block_slices(source.form.widths)
        if shapes is None:
            shapes = hessian.dense_shapes(source.form.widths)
        self._shapes = settings.shapes_of(shapes, source.rows)
        self._roots: dict[str, Root] = {"none": Root(None)}
        self.notes: dict[str, dict] = {}
        self.spectra: dict[str, np.ndarray] = {}

    def parts(
        self, methods: dict[str, Method], numbers: Sequence[int | None] | None = None
    ) -> list[Part]:
        """Splits queries into parts that are searched together: one part unless their R differ.

        Args:
            methods: by name.
            numbers: each query's number among the queries of R_eval, None if it is not one of them;
                by default the queries of R_eval in order. A query that is not one of them has no
                part in R_eval of all queries, which serves it under any rule.
        """
        if numbers is None:
            numbers = range(len(self._queries))
        by_kinds: dict[tuple[str, ...], dict[str, Method]] = {}
        for name, method in methods.items():
            kinds = tuple(self._kind(method, number) for number in numbers)
            # Methods with one R for all queries are searched together, whichever it is.
            key = kinds if len(set(kinds)) > 1 else ("",) * len(kinds)
            by_kinds.setdefault(key, {})[name] = method
        parts = []
        for kinds, chosen in sorted(by_kinds.items(), key=lambda item: item[0][0] != ""):
            for kind in sorted(set(kinds), reverse=True):
                places = np.flatnonzero([k == kind for k in kinds])
                make = functools.partial(self._scorers, chosen, numbers[places[0]])
                parts.append(Part(places, make))
        return parts

    def _scorers(self, chosen: dict[str, Method], number: int | None) -> dict[str, Scorer]:
        # Methods of one kind share its root: the search whitens once for all of them.
        roots: dict[str, Root] = {}
        scorers = {}
        for name, method in chosen.items():
            kind = self._kind(method, number)
            if kind not in roots:
                roots[kind] = self._root(kind)
            root = roots[kind]
            scorers[name] = Scorer(root.blocks, method.unit_norm, root.query_weights)
        return scorers

    def scorer(self, method: Method, number: int | None) -> Scorer:
        """Returns how a method scores passages for one query; `number` as in `parts`."""
        return self._scorers({"": method}, number)[""]

    def of_queries(self, queries_QxE: np.ndarray) -> "Whitening":
        """Returns a whitening with the same R of the passages and R of other queries."""
        other = copy.copy(self)
        other._queries = queries_QxE
        other._roots = {k: r for k, r in self._roots.items() if k in ("none", "train")}
        other.notes = {k: n for k, n in self.notes.items() if k == "train"}
        other.spectra = {k: s for k, s in self.spectra.items() if k == "train"}
        return other

    def train_roots(self) -> list[hessian.Root]:
        """Returns R_train^(−1/2) by block."""
        return self._root("train").blocks

    def note(self, method: Method) -> dict | None:
        """Returns a table's note on a method's R; None if no choice was made."""
        rule = method.hessian
        if rule == "mixed":
            rule = self._settings.evaluation_of(method)
        kinds: list[str] = [rule]
        if rule == "disjoint":
            kinds = list(reversed(_HALVES))
        elif rule == "leave_one_out" and self._kronecker:
            kinds = [kind for kind in self.notes if kind.startswith(_WITHOUT)]
        if kinds == [rule]:
            return self.notes.get(rule)
        notes = [self.notes[kind] for kind in kinds if kind in self.notes]
        if not notes:
            return None
        weight = float(np.mean([note["lambda"] for note in notes]))
        return notes[-1] | {"lambda": weight, "evaluation": rule}

    def keep_spectra(self, directory: pathlib.Path, block_names, provenance) -> str | None:
        """Writes the computed spectra (.npz), and returns the file's name.

        Arrays: "blocks" (names), "widths", and float64 [E] "train" and "evaluation".
        """
        if not self.spectra:
            return None
        name = f"spectra-{fingerprint(provenance)}.npz"
        arrays = {"blocks": np.array(block_names), "widths": np.array(self._source.form.widths)}
        if (directory / name).exists():
            # An earlier search may have needed an R that this one did not.
            arrays = atomic_file.read_arrays(directory / name) | arrays
        # Sorted: the same bytes whether R was decomposed or read.
        atomic_file.write_arrays(directory / name, dict(sorted((arrays | self.spectra).items())))
        return name

    def _kind(self, method: Method, number: int | None) -> str:
        if method.hessian != "mixed":
            return method.hessian
        rule = self._settings.evaluation_of(method)
        if number is None:
            return "all"
        if rule == "leave_one_out" and self._kronecker:
            return f"{_WITHOUT}{number}"
        if rule != "disjoint":
            return rule
        # R_eval is that of the half without the query.
        return _HALVES[int(number in self._halves()[0])]

    @property
    def _kronecker(self) -> int:
        """The number of blocks whose R is a Kronecker product."""
        return sum(len(s) == 2 for s in self._shapes)

    def _halves(self) -> tuple[np.ndarray, np.ndarray]:
        return hessian.draw_halves(len(self._queries), self._settings.seed)

    def _root(self, kind: str) -> Root:
        if kind in self._roots:
            return self._roots[kind]
        file = self._file(kind)
        # Without a file every process decomposes R for itself: each has the sums.
        root = self._make(kind, self.train) if file is None else self._kept_root(file, kind)
        # Each of those without a query is for one search.
        if not kind.startswith(_WITHOUT):
            self._roots[kind] = root
        return root

    def _kept_root(self, file: pathlib.Path, kind: str) -> Root:
        root: Root | None = None
        if not processes.on_first_process("look for R", file.exists):
            # All processes sum R; process 0 decomposes it, and the others read its file.
            train = self.train

            def decompose():
                nonlocal root
                # Another task of an array may have decomposed it meanwhile.
                if not (self._groups.engine.party and file.exists()):
                    root = self._make(kind, train)
                    root_file.write(file, root, self.notes[kind], self.spectra)

            with self._groups.engine.alone():
                processes.on_first_process("decompose R", decompose)
        return self._read(file, kind) if root is None else root

    def _file(self, kind: str) -> pathlib.Path | None:
        if self._folder is None:
            return None
        made_from = [dataclasses.asdict(self._settings), self._identity]
        return self._folder / f"inverse-root-{kind.replace(' ', '-')}-{fingerprint(made_from)}.npz"

    def _read(self, file: pathlib.Path, kind: str) -> Root:
        self._tell("reading R")
        root, self.notes[kind], spectra = root_file.read(file, self._shapes)
        self.spectra = spectra | self.spectra
        return root

    def _tell(self, description: str) -> None:
        if self._on_progress is not None:
            self._on_progress(description, 0, 0)

    @functools.cached_property
    def train(self) -> hessian.Autocorrelation | None:
        """R_train; None in all processes but the first of those that share groups."""
        s, rows = self._settings, self._source.rows
        kronecker = [list(self._shapes)] if self._kronecker else []
        name = fingerprint([s.sample, s.seed, self._identity, *kronecker])
        with self._progress(min(s.sample or rows, rows)) as on_rows:
            return hessian.autocorrelation_of_source(
                self._source,
                s.sample,
                s.seed,
                self._mesh,
                on_rows,
                self._groups,
                name,
                self._shapes,
            )

    @contextlib.contextmanager
    def _progress(self, total: int):
        if self._on_progress is not None:
            yield progress.counted(self._on_progress, "R of the passages", total)
            return
        with progress.bar(total, "R_train", "passage") as bar:
            yield bar.update

    def _make(self, kind: str, train: hessian.Autocorrelation) -> Root:
        self._tell("decomposing R")
        if "train" not in self.spectra:
            spectra = preemption.heed(lambda: hessian.spectra(train.blocks, self._shapes))
            self.spectra["train"] = np.concatenate(spectra)
        note: dict = {}
        passages = self._shrink(train, note)
        if kind == "train":
            roots = self._inverse_root(passages, note)
            self.notes[kind] = note
            return Root(roots)
        queries_QxE = self._queries
        if kind in _HALVES:
            queries_QxE = queries_QxE[self._halves()[_HALVES.index(kind)]]
        elif kind.startswith(_WITHOUT):
            queries_QxE = np.delete(queries_QxE, int(kind.removeprefix(_WITHOUT)), axis=0)
        evaluation = hessian.autocorrelation_of_source(
            InMemory(queries_QxE, self._slices), shapes=self._shapes
        )
        weight, n = self._weight(evaluation, kind, note), len(queries_QxE)
        blocks, query_weights = self._shrink_evaluation(evaluation, passages, note), ()
        if kind == "leave_one_out":
            if n < 2:
                raise ValueError("hessian.evaluation=leave_one_out needs two queries or more")
            # The mean over the other n − 1: the sum over all is divided by n − 1, and the query's
            # own part, of this weight in the mixture, is subtracted when it is scored.
            blocks = [b * (n / (n - 1)) for b in blocks]
            query_weights = (weight / (n - 1),) * len(blocks)
        roots = self._inverse_root(hessian.mix(passages, blocks, weight), note)
        self.notes[kind] = note
        return Root(roots, query_weights)

    def _weight(self, evaluation: hessian.Autocorrelation, kind: str, note: dict) -> float:
        """Returns λ, by the rule or from the settings."""
        k = self._settings.component or hessian.default_component(self._source.form.width)
        weight, by_block = self._settings.weight, hessian.spectra(evaluation.blocks, self._shapes)
        self.spectra.setdefault("evaluation", np.concatenate(by_block))
        if weight < 0:
            # With fewer than k directions the rule would compare R_train with rounding.
            hessian.check_component(by_block, k, evaluation.count)
            weight = hessian.mixing_weight([self.spectra["train"]], by_block, k)
        note |= {"lambda": weight, "component": k, "evaluation": kind}
        return weight

    def _shrink(self, train: hessian.Autocorrelation, note: dict) -> list[np.ndarray]:
        """Returns the blocks of R_train, shrunk as its sample size requires unless R is damped."""
        if self._settings.damping >= 0:
            note["damping"] = self._settings.damping
            return train.blocks
        shares = hessian.shrinkage(train.blocks, train.noise)
        note["shrinkage"] = float(np.median(shares))
        return list(hessian.shrink(train.blocks, shares))

    def _shrink_evaluation(
        self, evaluation: hessian.Autocorrelation, passages: list[np.ndarray], note: dict
    ) -> list[np.ndarray]:
        """Returns the blocks of R_eval; the factors of a product are shrunk towards R_train's.

        R_eval is that of the very queries asked, and the own part g gᵀ of a query in a dense R
        only multiplies its products R⁻¹ g by a number (Sherman and Morrison). In a product, G Gᵀ
        and Gᵀ G suppress all that shares rows or columns with G: there R_eval is a sample, noisy
        if queries are few, and the passages tell what it lacks.
        """
        if self._settings.damping >= 0 or not self._kronecker:
            return evaluation.blocks
        in_product = np.concatenate([[len(s) == 2] * len(s) for s in self._shapes])
        shares = hessian.shrinkage(evaluation.blocks, evaluation.noise, passages) * in_product
        note["shrinkage of R_eval"] = float(np.median(shares[in_product]))
        return list(hessian.shrink(evaluation.blocks, shares, passages))

    def _inverse_root(self, R: Iterable[np.ndarray], note: dict) -> list[hessian.Root]:
        s = self._settings
        note["cutoff"] = s.cutoff
        if self._kronecker:
            note |= {"kronecker": self._kronecker, "blocks": len(self._shapes)}
        damping = s.damping if s.damping >= 0 else _FLOOR
        # LAPACK may take longer than the time between a notice of preemption and the kill.
        return preemption.heed(lambda: hessian.inverse_root(R, damping, s.cutoff, self._shapes))


def describe_regularisation(note: dict) -> str:
    """Describes R's structure and regularisation, from a note, in words."""
    text = f"damping {note['damping']:.3g}" if "damping" in note else ""
    if "shrinkage" in note:
        text = f"shrunk by {note['shrinkage']:.2g}, the blocks' median"
    if "shrinkage of R_eval" in note:
        text += f", and R_eval towards R_train by {note['shrinkage of R_eval']:.2g}"
    if "kronecker" in note:
        text += f"; a Kronecker product in {note['kronecker']} of {note['blocks']} blocks"
    if note.get("cutoff"):
        text += f"; without eigenvalues below {note['cutoff']:.3g} of a block's mean"
    return text
