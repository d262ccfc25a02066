"""Retrievers by projected gradients: of one checkpoint, and sums over several."""

import functools

import numpy as np

from tda import store as stores
from tda.encoding import table as encoding
from tda.methods import GradientKind, Method
from tda.retrieval import ranked
from tda.retrieval.sources import Source
from tda.retrieval.whitening import Whitening
from tda.run import checkpoints, encode, index, vectors
from tda.run.checkpoints import Part
from tda.run.retrievers import Queries, Result, Retriever, scan, tell
from tda.run.run import Run, stored_as
from tda.runtime import processes, progress
from tda.runtime.fingerprint import plain
from tda.runtime.groups import ONE_GROUP
from tda.runtime.progress import Progress


class Encodings:
    """Gradients of a run at one checkpoint, and R^(−1/2), by kind; each is computed once."""

    def __init__(self, run: Run):
        self.run = run
        self._passages: dict[GradientKind, Source] = {}
        self._queries: dict[GradientKind, np.ndarray | None] = {}
        self._encoders: dict = {}
        self._whitenings: dict[tuple[GradientKind, GradientKind], Whitening] = {}
        self._on_progress: Progress | None = None

    def encode(self, method: Method) -> None:
        """Encodes the rows that are missing from the stores of a method's gradients."""
        kind, of_queries = method.kinds
        if kind != of_queries:
            # Passages of the queries' kind would not be read.
            self.passages(kind)
            self.run_queries(of_queries)
        elif kind not in self._passages or kind not in self._queries:
            self._passages[kind], self._queries[kind] = encode.encode(self.run, kind)

    def passages(self, kind: GradientKind) -> Source:
        """Returns the passages' gradients."""
        if kind not in self._passages:
            self._passages[kind] = encode.encode_passages(self.run, kind)
        return self._passages[kind]

    def run_queries(self, kind: GradientKind) -> np.ndarray | None:
        """Returns the gradients of the run's own queries; None if a finished run has none."""
        if kind not in self._queries:
            absent = self.run.live and encode.missing_stores(self.run, kind, "queries")
            self._queries[kind] = None if absent else encode.encode_queries(self.run, kind)
        return self._queries[kind]

    def encoder(self, kind: GradientKind, on_progress: Progress | None = None):
        """Returns the encoder of a kind."""
        if kind not in self._encoders:
            tell(on_progress, "preparing the encoder")
            self._encoders[kind] = encode.make_encoder(self.run, kind, on_progress)
        return self._encoders[kind]

    def of_queries(
        self, queries: Queries, kind: GradientKind, on_progress: Progress | None = None
    ) -> np.ndarray:
        """Returns the gradients of queries, float32 [Q, E]; the run's own are read from the store.

        Raises:
            ValueError: a gradient is not finite, or is that of its contrast.
        """
        stored_QxE = self.run_queries(kind)
        if stored_QxE is not None and None not in queries.numbers:
            # All queries of a run may take gigabytes: no copy.
            is_all = len(queries) == len(stored_QxE)
            return stored_QxE if is_all else stored_QxE[list(queries.numbers)]
        encoder = self.encoder(kind, on_progress)
        tell(on_progress, "taking the gradient")
        # One query a batch, so that its bytes do not depend on the others.
        layout, rows = self.run.corpus.layout(1), np.arange(len(queries))
        encoded_QxE = encoding.encode_rows(encoder, queries.table, rows, layout)
        if queries.contrast is not None:
            encoded_QxE -= encoding.encode_rows(encoder, queries.contrast, rows, layout)
            if not encoded_QxE.any(axis=1).all():
                raise ValueError("both targets have the same gradient; give another one")
        if not np.isfinite(encoded_QxE).all():
            raise ValueError("the question's gradient is not finite: look at the model's logits")
        return encoded_QxE

    def identity(self, method: Method) -> list:
        """Returns JSON values that identify a method's gradients of passages and queries."""
        run = self.run
        if not run.live:
            return [*gradients_provenance(run, method), run.corpus.fingerprint]
        # By the stores: the fingerprint would read the whole corpus.
        paths = list(map(run.store_path, ("corpus", "queries"), method.kinds))
        opened = [stores.open_store(p) for p in paths if stores.finished(p)]
        return [x for s in opened for x in (s.manifest, s.withdrawn.tolist())]

    def whitening(self, method: Method, on_progress: Progress | None = None) -> Whitening:
        """Returns R^(−1/2) of a method's gradients; a live session keeps it for the next one."""
        self._on_progress = on_progress
        kinds = method.kinds
        if kinds not in self._whitenings:
            run, source = self.run, self.passages(method.gradients)
            # R takes a scan of the store, for minutes: kept for the next session or restart.
            groups = ONE_GROUP if run.live else run.groups
            folder = run.workdir / "live" if run.live else groups.directory
            self._whitenings[kinds] = Whitening(
                run.hessian,
                source,
                self.run_queries(method.query_gradients),
                run.search_mesh,
                folder=folder,
                identity=self.identity(method),
                shapes=run.block_shapes(method.gradients),
                groups=groups,
                on_progress=self._relay if run.live else None,
            )
        return self._whitenings[kinds]

    def _relay(self, description: str, done: int, total: int) -> None:
        # R outlives its first question; later ones report to their own progress.
        if self._on_progress is not None:
            self._on_progress(description, done, total)

    def release(self) -> None:
        """Frees all gradients."""
        for cache in (self._passages, self._queries, self._encoders, self._whitenings):
            cache.clear()


def gradients_provenance(run: Run, method: Method, step: int | None = None) -> list:
    """Returns what a ranking depends on of a method's gradients, as JSON values."""
    kinds = dict.fromkeys(method.kinds)
    return [x for kind in kinds for x in encode.ranking_provenance(run, kind, step)]


class Gradients(Retriever):
    """Methods that scan the gradients of the traced checkpoint: those of a kind share a scan."""

    shares_search = True
    takes_contrasts = True

    def __init__(self, run: Run):
        super().__init__(run)
        self.encodings = Encodings(run)

    @property
    def same_for_every_k(self) -> bool:
        """Whether the search is exact: an index reads more the more passages are asked for."""
        return self.run.config.search.index == "none"

    def lacks(self, method):
        """Returns which of the gradients that a method needs are missing, or None."""
        missing = encode.missing_stores(self.run, method.gradients, "corpus")
        if missing or method.hessian != "mixed":
            return missing
        if encode.missing_stores(self.run, method.query_gradients, "queries"):
            return "R_eval needs the gradients of the run's queries, which are not stored"
        return None

    def provenance(self, method):
        """Returns what identifies gradients, R and the index."""
        config = self.run.config
        provenance = gradients_provenance(self.run, method)
        if method.hessian != "none":
            provenance.append(dict(config.hessian))
        if config.search.index != "none":
            provenance.append(config.search.to_dict())
        return provenance

    def prepare(self, methods, later=()):
        """Encodes corpus and queries."""
        for method in methods.values():
            self.encodings.encode(method)

    def search(self, queries, methods, k, on_progress=None):
        """See `Retriever`."""
        kinds: dict[tuple, dict[str, Method]] = {}
        for name, method in methods.items():
            kinds.setdefault(method.kinds, {})[name] = method
        results: dict[str, Result] = {}
        for sharing in kinds.values():
            results |= self._search_kinds(queries, sharing, k, on_progress)
        return results

    def _search_kinds(self, queries, methods, k, on_progress) -> dict[str, Result]:
        """Searches by methods of the same kinds of gradients."""
        any_method = next(iter(methods.values()))
        run, source = self.run, self.encodings.passages(any_method.gradients)
        if not run.live:
            print(f"search {source.rows:,} passages: {', '.join(methods)}")
        gradients_QxE = self.encodings.of_queries(queries, any_method.query_gradients, on_progress)
        whitening = self.encodings.whitening(any_method, on_progress)
        rankings: dict[str, list] = {n: [] for n in methods}
        notes: dict[str, dict] = {n: {} for n in methods}

        # A live question leaves no files.
        identity = None if run.live else self.encodings.identity(any_method)
        parts = whitening.parts(methods, queries.numbers)
        # With an R for each query, one bar for all of them.
        counts = [len(part.queries) for part in parts]
        is_by_query = counts.count(1) > 2 and on_progress is None
        title = f"search ({', '.join(methods)})"
        on_rows = progress.silent if is_by_query else on_progress
        search_exactly = functools.partial(scan, run, source, identity, on_rows)
        with progress.hidden(not is_by_query):
            bar = progress.bar(sum(counts), title, "query")
        for number, part in enumerate(parts):
            # A method whose R differs between halves of the queries has an index for each half.
            suffix, scorers, names = f"-{number}" if number else "", part.scorers, {}
            if run.config.search.index != "none":
                names = {n: f"{self.ranking_name(methods[n])}{suffix}" for n in scorers}
            correct = {
                label: [lists[q] for q in part.queries] for label, lists in queries.correct.items()
            }
            rankings_by_name, index_notes = index.search(
                run,
                source,
                gradients_QxE[part.queries],
                scorers,
                correct,
                names,
                search_exactly,
                k,
            )
            for name, ranking in rankings_by_name.items():
                rankings[name].append((part.queries, ranking))
                notes[name] |= index_notes.get(name, {})
            bar.update(len(part.queries))
        bar.close()
        if not all(rankings.values()):
            return {}  # another process merges the groups' rankings
        # Spectra are for a run's plots; a live question writes no files.
        spectra = None if run.live else self._keep_spectra(any_method, whitening)
        for name, method in methods.items():
            note = whitening.note(method)
            notes[name] |= note | {"spectra": spectra} if note else {}
        return {n: Result(ranked.join(rankings[n]), notes[n]) for n in methods}

    def _keep_spectra(self, method: Method, whitening: Whitening) -> str | None:
        run, kind = self.run, method.gradients
        provenance: list = [
            *map(run.provenance, dict.fromkeys(method.kinds)),
            dict(run.config.hessian),
        ]
        provenance += [run.corpus.fingerprint, stored_as(run.config)]
        directory = run.workdir / "retrieval"
        return whitening.keep_spectra(directory, run.blocks(kind), plain(provenance))

    def release(self, methods):
        """Frees the gradients."""
        self.encodings.release()


NO_MIXTURE = "a sum over checkpoints takes R none or train"


class Sums(Retriever):
    """Methods that sum over checkpoints, or first change the passages' gradients."""

    shares_search = True
    takes_contrasts = True

    def __init__(self, run: Run):
        super().__init__(run)
        # A checkpoint's model and gradients are opened once for all methods of a search.
        self._at_step = functools.cache(lambda step: Encodings(run.at_step(step)))

    def lacks(self, method):
        """Returns which of the gradients that a method needs are missing, or None."""
        if method.hessian == "mixed":
            return NO_MIXTURE
        steps = checkpoints.steps_of(self.run, method)
        lacking = [s for s in steps if self._lacks_stores(s, method)]
        if lacking:
            return (
                f"it sums over the checkpoints {', '.join(map(str, steps))}, and the run has no "
                f"store of gradients of {', '.join(map(str, lacking))}: the method was not run, or "
                "its stores were deleted after the search (several.keep_stores=False)"
            )
        return None

    def _lacks_stores(self, step: int, method: Method) -> bool:
        pairs = zip(("corpus", "queries"), method.kinds, strict=True)
        return any(encode.missing_stores(self.run, kind, name, step) for name, kind in pairs)

    def provenance(self, method):
        """Returns what identifies the gradients of every checkpoint, and R."""
        provenance = []
        for step in checkpoints.steps_of(self.run, method):
            provenance += gradients_provenance(self.run, method, step)
        if method.hessian != "none":
            provenance.append(dict(self.run.config.hessian))
        return provenance

    def prepare(self, methods, later=()):
        """Encodes corpus and queries at every checkpoint."""
        for method in methods.values():
            for step in checkpoints.steps_of(self.run, method):
                encodings = self._at_step(step)
                sharing = [
                    m for m in later if m.several and step in checkpoints.steps_of(self.run, m)
                ]
                kinds = [method.gradients, *(m.gradients for m in sharing)]
                encode.encode_together(encodings.run, kinds)
                encodings.encode(method)
                if method.passages == "unsure":
                    vectors.probabilities(encodings.run)

    def search(self, queries, methods, k, on_progress=None):
        """See `Retriever`."""
        results = {}
        for name, method in methods.items():
            steps = checkpoints.steps_of(self.run, method)
            parts = [self._part(s, queries, method, on_progress) for s in steps]
            weights = checkpoints.weights(self.run, method, steps)
            summed = checkpoints.combined(method, parts, steps, weights)
            identity = None if self.run.live else self.ranking_name(method)
            search = functools.partial(scan, self.run, summed.source, identity, on_progress)
            rankings = search(summed.queries_QxE, {name: summed.scorer}, k, queries.correct)
            if rankings:
                results[name] = Result(rankings[name], summed.note)
        return results

    def _part(self, step: int, queries: Queries, method: Method, on_progress) -> Part:
        tell(on_progress, f"opening the checkpoint of step {step}")
        encodings, kind = self._at_step(step), method.gradients
        source = encodings.passages(kind)
        queries_QxE = encodings.of_queries(queries, method.query_gradients, on_progress)
        roots, probabilities = [], None
        if method.hessian == "train":
            roots = encodings.whitening(method, on_progress).train_roots()
        if method.passages == "unsure":
            tell(on_progress, "likelihood of the passages")
            probabilities = vectors.probabilities(encodings.run)
        return Part(source, queries_QxE, roots, probabilities)

    def release(self, methods):
        """Frees the gradients, and removes the stores of earlier checkpoints unless they are kept.

        Finished rankings do not need these stores; a new ranking encodes them again.
        """
        self._at_step.cache_clear()
        if self.run.config.several.keep_stores or self.run.engine.has_readers:
            return
        for method in methods.values():
            for step in checkpoints.steps_of(self.run, method)[:-1]:
                path = self.run.store_path("corpus", method.gradients, step)
                processes.on_first_process("remove a store", lambda path=path: stores.remove(path))
