"""The stage that retrieves passages for every query by every method."""

import dataclasses
import functools
import json
import pathlib
import shutil
from collections.abc import Callable

import numpy as np

from tda import methods
from tda import store as stores
from tda.gradients import adam_steps
from tda.methods import GradientKind, Method
from tda.retrieval import annotated, bm25, by_score, dense, exact, ranked
from tda.retrieval.ranked import Ranked
from tda.retrieval.scorer import Scorer
from tda.retrieval.sources import InMemory
from tda.retrieval.whitening import HessianSettings, Whitening
from tda.run import checkpoints, encode, index, vectors
from tda.run.run import Corpus, Run
from tda.runtime import processes, progress
from tda.runtime.atomic_file import write_json
from tda.runtime.fingerprint import fingerprint, plain


def retrieve(run: Run) -> tuple[dict[str, Ranked], dict]:
    """What every method of the config ranks, and facts about how (λ and the like).

    A ranking that is there already, from the same gradients and settings, is read. Of several
    processes all encode, and the first searches.
    """
    chosen = methods.parse(run.config.methods)
    check(run.config, chosen)
    files = {n: _file(run, m) for n, m in chosen.items()}
    lacking = processes.on_first_process(
        "look for rankings", lambda: [n for n, f in files.items() if not f.exists()]
    )
    # Methods that differ in their title alone share a file, and are searched once.
    todo = {files[n]: n for n in reversed(lacking)}
    todo = {n: chosen[n] for n in chosen if n in todo.values()}
    at_end = [m.gradients for m in todo.values() if m.takes_gradients]
    encode.print_coverage(run, at_end)
    encode.encode_together(run, at_end)
    sharing: dict[GradientKind, dict] = {
        k: {} for k in (GradientKind(), GradientKind(corrected=True))
    }
    for name, method in todo.items():
        if method.shares_scan:
            sharing.setdefault(method.gradients, {})[name] = method
    for kind, own in sharing.items():
        # A store that lost a shard is mended even if nothing is to be searched in it.
        if own or _is_begun(run, kind):
            store, queries = encode.encode(run, kind)
        if own:
            work = functools.partial(_search, run, kind, store, queries, own, files)
            processes.on_first_process("search", work)
            del store, queries
    after = dict(todo)
    for name, method in todo.items():
        del after[name]
        if method.shares_scan:
            continue
        if method.retriever == "gradient":
            found = checkpoints.summed(run, method, after.values())
            work = functools.partial(_search_summed, run, name, found, files)
            processes.on_first_process("search", work)
            del found, work
            if not run.config.several.keep_stores:
                _drop_earlier(run, method)
        else:
            _OTHERS[method.retriever](run, method, files[name])
    notes = processes.on_first_process("read notes", lambda: _notes(files))
    return {n: ranked.load(files[n]) for n in chosen}, notes


def check(config, chosen: dict[str, Method]) -> None:
    """Nothing, where the config fits its methods.

    Raises:
        ValueError: it does not, or a method needs an extra that is not installed; the message
            names the key or the extra.
    """
    if config.eval.top_k < 1:
        raise ValueError(f"eval.top_k={config.eval.top_k} must be 1 or more")
    for method in chosen.values():
        if method.hessian == "mixed":
            evaluation = HessianSettings(**dict(config.hessian)).evaluation_of(method)
            if evaluation == "leave_one_out" and config.search.index != "none":
                raise ValueError(
                    f"{method.title}: with R_eval leave_one_out a passage has another norm for "
                    "every query, which no index can hold; use hessian.evaluation=disjoint or all, "
                    "or search.index=none"
                )
        if method.steps_by_adam and config.train.optimizer not in adam_steps.OPTIMIZERS:
            raise ValueError(
                f"{method.title} steps by Adam, whose moments train.optimizer="
                f"{config.train.optimizer} does not keep; leave it out of methods, or train by adam"
            )
        if method.retriever == "dense":
            if not config.dense.model:
                raise ValueError(
                    "the method dense needs --config.dense.model: the directory of a "
                    "sentence-transformers model, or its name on the hub"
                )
            dense.check(config.dense.model)


def _is_begun(run: Run, kind: GradientKind) -> bool:
    path = run.store_path("corpus", kind)

    def ask():
        return (path / "manifest.json").exists() and not stores.finished(path)

    return processes.on_first_process("look for an unfinished store", ask)


def _search(run: Run, kind: GradientKind, store, queries, sharing: dict, files: dict) -> None:
    print(f"search {store.rows:,} passages: {', '.join(sharing)}")
    mesh = run.search_mesh
    whitening = Whitening(run.hessian, store, queries, mesh)
    found: dict[str, list] = {n: [] for n in sharing}
    notes: dict[str, dict] = {n: {} for n in sharing}
    parts = whitening.parts(sharing)
    for number, part in enumerate(parts):

        def exactly(gradients_QxE, scorers, k, correct):
            return _scan(gradients_QxE, store, scorers, k, correct, mesh)

        # Methods whose R differs by half have an index for each.
        names = {n: f"{files[n].stem}-{number}" if number else files[n].stem for n in part.scorers}
        rankings, told = index.search(
            run,
            store,
            queries[part.queries],
            part.scorers,
            _labels(run.corpus, part.queries),
            names,
            exactly,
        )
        for name, ranking in rankings.items():
            found[name].append((part.queries, ranking))
            notes[name] |= told.get(name, {})
    provenance = [run.provenance(kind), dict(run.config.hessian)]
    provenance += [run.corpus.fingerprint, run.config.store.dtype]
    directory = run.workdir / "retrieval"
    file = whitening.keep_spectra(directory, run.blocks(kind), plain(provenance))
    for name, method in sharing.items():
        note = whitening.note(method)
        notes[name] |= note | {"spectra": file} if note else {}
        _keep(files[name], ranked.join(found[name]), notes[name])


def _drop_earlier(run: Run, method: Method) -> None:
    """Removes the corpus's stores of all checkpoints but the traced one, once they were searched.

    A ranking that is kept does not need them; another one would have them made again.
    """
    for step in checkpoints.steps_of(run, method)[:-1]:
        path = run.store_path("corpus", method.gradients, step)
        processes.on_first_process("remove a store", lambda path=path: shutil.rmtree(path, True))


def _labels(corpus: Corpus, queries: np.ndarray) -> dict[str, list[np.ndarray]]:
    """For each set of labels, the correct rows of some queries."""
    return {label: [lists[q] for q in queries] for label, lists in corpus.correct.items()}


def _scan(gradients_QxE, source, scorers, k: int, correct, mesh, opponents: bool = True):
    with progress.bar(source.rows, f"search ({', '.join(scorers)})", "passage") as bar:
        return exact.search(gradients_QxE, source, scorers, k, correct, mesh, bar.update, opponents)


def _search_summed(run: Run, name: str, found: checkpoints.Summed, files) -> None:
    k, mesh, corpus = run.config.eval.top_k, run.search_mesh, run.corpus
    scorers = {name: found.scorer}
    ranking = _scan(found.queries_QxE, found.source, scorers, k, corpus.correct, mesh)[name]
    _keep(files[name], ranking, found.note)


def _by_words(run: Run, method: Method, file: pathlib.Path) -> None:
    def work():
        corpus, k = run.corpus, run.config.eval.top_k
        texts = [corpus.text_of(i) for i in range(len(corpus.passages))]
        _keep(file, bm25.search(run.query_texts, texts, k, corpus.correct), None)

    processes.on_first_process("search", work)


def _by_vectors(run: Run, method: Method, file: pathlib.Path) -> None:
    corpus = run.corpus
    names = ("queries", "corpus")
    if method.retriever == "dense":
        encoder = functools.cache(lambda: dense.SentenceEncoder(run.config.dense.model))
        queries_QxD, passages_CxD = (vectors.sentence_vectors(run, encoder, n) for n in names)
    else:
        pooler = vectors.make_pooler(run, method.layer)
        queries_QxD, passages_CxD = (
            vectors.hidden_states(run, pooler, method.layer, n) for n in names
        )

    def work():
        source = InMemory(passages_CxD, [slice(0, passages_CxD.shape[1])])
        scorer = {"vectors": Scorer(None, method.unit_norm)}
        k, mesh = run.config.eval.top_k, run.search_mesh
        # What is least like a text says nothing.
        ranking = _scan(queries_QxD, source, scorer, k, corpus.correct, mesh, opponents=False)
        _keep(file, ranking["vectors"], None)

    processes.on_first_process("search", work)


def _by_labels(run: Run, method: Method, file: pathlib.Path) -> None:
    def work():
        ids, config = [f.fact_id for f in run.corpus.queries], run.config
        correct = run.corpus.correct["all"]
        found = annotated.ranked(ids, correct, config.eval.top_k, config.data.seed)
        _keep(file, found, None)

    processes.on_first_process("search", work)


def _by_control(scores: Callable):
    """A retriever whose scores look at no query."""

    def search(run: Run, method: Method, file: pathlib.Path) -> None:
        found = scores(run, method)
        count, corpus, k = len(run.corpus.queries), run.corpus, run.config.eval.top_k

        def work():
            _keep(file, by_score.rank(found, count, k, corpus.correct), None)

        processes.on_first_process("search", work)

    return search


def _at_random(run: Run, method: Method):
    return by_score.at_random(len(run.corpus.passages), len(run.corpus.queries), run.config.seed)


def _lengths(run: Run, method: Method):
    lengths_C = run.corpus.lengths.astype(np.float32)
    return (lengths_C for _ in run.corpus.queries)


def _norms(run: Run, method: Method):
    store, _ = encode.encode(run, method.gradients)
    norms_C = by_score.norms(store, exact.step_rows(store.form.width))
    return (norms_C for _ in run.corpus.queries)


_OTHERS = {
    "bm25": _by_words,
    "dense": _by_vectors,
    "hidden": _by_vectors,
    "annotated": _by_labels,
    "random": _by_control(_at_random),
    "length": _by_control(_lengths),
    "gradient_norm": _by_control(_norms),
}


def _file(run: Run, method: Method) -> pathlib.Path:
    """The file of a method's ranking, named by all that the ranking depends on."""
    config = run.config
    fields = dataclasses.asdict(method)
    fields.pop("title")
    provenance: list = [fields, run.corpus.fingerprint, config.eval.top_k]
    if method.takes_gradients:
        for step in checkpoints.steps_of(run, method):
            for kind in {method.gradients: 0, method.query_gradients: 0}:
                withdrawn = _withdrawn(run.store_path("corpus", kind, step))
                provenance += [run.provenance(kind, step), config.store.dtype, withdrawn]
        if method.hessian != "none":
            provenance.append(dict(config.hessian))
        if method.shares_scan and config.search.index != "none":
            provenance.append(config.search.to_dict())
    elif method.retriever == "hidden":
        provenance += [fingerprint(run.trained.fingerprint), run.trained.step]
    elif method.retriever == "dense":
        provenance.append(dense.identity(config.dense.model))
    elif method.retriever == "random":
        provenance.append(config.seed)
    elif method.retriever == "annotated":
        provenance.append(config.data.seed)
    directory = run.workdir / "retrieval"
    directory.mkdir(exist_ok=True)
    return directory / f"{method.retriever}-{fingerprint(plain(provenance))}.npz"


def _withdrawn(path: pathlib.Path) -> list[int]:
    """The rows that were withdrawn from a store, if there is one."""

    def ask():
        there = (path / "manifest.json").exists()
        return stores.open_store(path).withdrawn.tolist() if there else []

    return processes.on_first_process("look for withdrawn passages", ask)


def _note(file: pathlib.Path) -> pathlib.Path:
    return file.with_suffix(".json")


def _notes(files: dict[str, pathlib.Path]) -> dict:
    return {n: json.loads(_note(f).read_text()) for n, f in files.items() if _note(f).exists()}


def _keep(file: pathlib.Path, found: Ranked, note: dict | None) -> None:
    if note:
        write_json(_note(file), note)
    ranked.save(file, found)


def describe(note: dict) -> str:
    """Describes a note of `retrieve` in a line."""
    parts = []
    if "lambda" in note:
        parts.append(f"λ = {note['lambda']:.3f} at component {note['component']}")
        parts.append(f"R_eval of {_OF_QUERIES[note['evaluation']]}")
    if "damping" in note:
        parts.append(f"damping {note['damping']:.3g}")
    if "shrinkage" in note:
        parts.append(f"shrunk by {note['shrinkage']:.2g}, the blocks' median")
    if "checkpoints" in note:
        pairs = zip(note["checkpoints"], note["weights"], strict=True)
        parts.append("checkpoints " + ", ".join(f"{s} ({w:.2f})" for s, w in pairs))
    return "; ".join(parts)


_OF_QUERIES = {
    "all": "all queries",
    "leave_one_out": "all but the query",
    "disjoint": "the half without the query",
}
