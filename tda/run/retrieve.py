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
from tda.methods import Gradients, Method
from tda.retrieval import annotated, bm25, by_score, dense, exact, ranked, whitening
from tda.retrieval.ranked import Ranked
from tda.retrieval.whitening import Whitening, search_mesh
from tda.run import checkpoints, encode, index, vectors
from tda.run.run import Corpus, Trained
from tda.run.workdir import Workdir
from tda.runtime import processes, progress
from tda.runtime.atomic_file import write_json
from tda.runtime.fingerprint import fingerprint, plain


def retrieve(
    config, corpus: Corpus, trained: Trained, workdir: Workdir
) -> tuple[dict[str, Ranked], dict]:
    """What every method of the config ranks, and facts about how (λ and the like).

    A ranking that is there already, from the same gradients and settings, is read. Of several
    processes all encode, and the first searches.
    """
    chosen = methods.parse(config.methods)
    check(config, chosen)
    files = {n: _file(config, corpus, trained, workdir, m) for n, m in chosen.items()}
    lacking = processes.on_first_process(
        "look for rankings", lambda: [n for n, f in files.items() if not f.exists()]
    )
    # Methods that differ in their title alone share a file, and are searched once.
    todo = {files[n]: n for n in reversed(lacking)}
    todo = {n: chosen[n] for n in chosen if n in todo.values()}
    at_end = [m.gradients for m in todo.values() if m.takes_gradients]
    encode.tell_coverage(config, trained, at_end)
    encode.ahead(config, corpus, trained, workdir, at_end)
    sharing: dict[Gradients, dict] = {g: {} for g in (Gradients(), Gradients(corrected=True))}
    for name, method in todo.items():
        if method.shares_scan:
            sharing.setdefault(method.gradients, {})[name] = method
    for what, own in sharing.items():
        # A store that lost a shard is mended even if nothing is to be searched in it.
        if own or _is_begun(config, corpus, trained, workdir, what):
            store, queries = encode.encode(config, corpus, trained, workdir, what)
        if own:
            work = functools.partial(
                _search, config, corpus, trained, workdir, what, store, queries, own, files
            )
            processes.on_first_process("search", work)
            del store, queries
    after = dict(todo)
    for name, method in todo.items():
        del after[name]
        if method.shares_scan:
            continue
        if method.retriever == "gradient":
            found = checkpoints.summed(config, corpus, trained, workdir, method, after.values())
            work = functools.partial(_search_summed, config, corpus, trained, name, found, files)
            processes.on_first_process("search", work)
            del found, work
            if not config.several.keep_stores:
                _drop_earlier(config, corpus, trained, workdir, method)
        else:
            _OTHERS[method.retriever](config, corpus, trained, workdir, method, files[name])
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
            evaluation = whitening.evaluation_of(config, method)
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


def _is_begun(config, corpus: Corpus, trained: Trained, workdir: Workdir, what: Gradients) -> bool:
    made = encode.made_from(config, corpus, trained, what)
    path = encode.path_of(config, corpus, workdir, "corpus", made)

    def ask():
        return (path / "manifest.json").exists() and not stores.finished(path)

    return processes.on_first_process("look for an unfinished store", ask)


def _search(
    config, corpus, trained, workdir, what: Gradients, store, queries, sharing: dict, files: dict
) -> None:
    print(f"search {store.rows:,} passages: {', '.join(sharing)}")
    mesh = search_mesh(trained)
    made = Whitening(config, store, queries, mesh)
    found: dict[str, list] = {n: [] for n in sharing}
    notes: dict[str, dict] = {n: {} for n in sharing}
    parts = made.parts(sharing)
    for number, part in enumerate(parts):

        def exactly(gradients_QxE, scorers, k, correct):
            return _scan(gradients_QxE, store, scorers, k, correct, mesh)

        # Methods whose R differs by half have an index for each.
        names = {n: f"{files[n].stem}-{number}" if number else files[n].stem for n in part.scorers}
        rankings, told = index.search(
            config,
            store,
            queries[part.queries],
            part.scorers,
            _labels(corpus, part.queries),
            workdir,
            names,
            exactly,
        )
        for name, ranking in rankings.items():
            found[name].append((part.queries, ranking))
            notes[name] |= told.get(name, {})
    names = encode.blocks_of(config, trained, what)
    made_from = [encode.made_from(config, corpus, trained, what), dict(config.hessian)]
    made_from += [corpus.fingerprint, config.store.dtype]
    file = made.keep_spectra(workdir / "retrieval", names, plain(made_from))
    for name, method in sharing.items():
        note = made.note(method)
        notes[name] |= note | {"spectra": file} if note else {}
        _keep(files[name], ranked.join(found[name]), notes[name])


def _drop_earlier(config, corpus, trained, workdir, method: Method) -> None:
    """Removes the corpus's stores of all checkpoints but the traced one, once they were searched.

    A ranking that is kept does not need them; another one would have them made again.
    """
    for step in checkpoints.steps_of(config, trained, method)[:-1]:
        then = dataclasses.replace(trained, step=step)
        made = encode.made_from(config, corpus, then, method.gradients)
        path = encode.path_of(config, corpus, workdir, "corpus", made)
        processes.on_first_process("remove a store", lambda path=path: shutil.rmtree(path, True))


def _labels(corpus: Corpus, queries: np.ndarray) -> dict[str, list[np.ndarray]]:
    """For each set of labels, the correct rows of some queries."""
    return {label: [lists[q] for q in queries] for label, lists in corpus.correct.items()}


def _scan(gradients_QxE, source, scorers, k: int, correct, mesh, opponents: bool = True):
    with progress.bar(source.rows, f"search ({', '.join(scorers)})", "passage") as bar:
        return exact.search(gradients_QxE, source, scorers, k, correct, mesh, bar.update, opponents)


def _search_summed(config, corpus, trained, name: str, found: checkpoints.Summed, files) -> None:
    k, mesh = config.eval.top_k, search_mesh(trained)
    scorers = {name: found.scorer}
    ranking = _scan(found.queries_QxE, found.source, scorers, k, corpus.correct, mesh)[name]
    _keep(files[name], ranking, found.note)


def _asked(config, corpus: Corpus) -> list[str]:
    """The text of each query: prompt and target."""
    return [f"{f.prompt(config.data.prompt)} {f.entity1}" for f in corpus.queries]


def _by_words(config, corpus, trained, workdir, method, file: pathlib.Path) -> None:
    def work():
        texts = [corpus.text_of(i) for i in range(len(corpus.passages))]
        asked = _asked(config, corpus)
        _keep(file, bm25.search(asked, texts, config.eval.top_k, corpus.correct), None)

    processes.on_first_process("search", work)


def _by_vectors(config, corpus, trained, workdir, method, file: pathlib.Path) -> None:
    if method.retriever == "dense":
        asked = _asked(config, corpus)
        found = vectors.of_sentences(config, corpus, workdir, asked)
    else:
        found = vectors.of_hidden_states(config, corpus, trained, workdir, method.layer)

    def work():
        whole = [slice(0, found.passages.shape[1])]
        source = exact.InMemory(found.passages, whole)
        scorer = {"vectors": exact.Scorer(None, method.unit_norm)}
        k, mesh = config.eval.top_k, search_mesh(trained)
        # What is least like a text says nothing.
        ranking = _scan(found.queries, source, scorer, k, corpus.correct, mesh, opponents=False)
        _keep(file, ranking["vectors"], None)

    processes.on_first_process("search", work)


def _by_labels(config, corpus, trained, workdir, method, file: pathlib.Path) -> None:
    def work():
        ids = [f.fact_id for f in corpus.queries]
        found = annotated.ranked(ids, corpus.correct["all"], config.eval.top_k, config.data.seed)
        _keep(file, found, None)

    processes.on_first_process("search", work)


def _by_control(scores: Callable):
    """A retriever whose scores look at no query."""

    def search(config, corpus, trained, workdir, method, file: pathlib.Path) -> None:
        found = scores(config, corpus, trained, workdir, method)
        count = len(corpus.queries)

        def work():
            _keep(file, by_score.rank(found, count, config.eval.top_k, corpus.correct), None)

        processes.on_first_process("search", work)

    return search


def _at_random(config, corpus, trained, workdir, method):
    return by_score.at_random(len(corpus.passages), len(corpus.queries), config.seed)


def _lengths(config, corpus, trained, workdir, method):
    lengths_C = vectors.scored_tokens(corpus.passages).astype(np.float32)
    return (lengths_C for _ in corpus.queries)


def _norms(config, corpus, trained, workdir, method):
    store, _ = encode.encode(config, corpus, trained, workdir, method.gradients)
    norms_C = by_score.norms(store, exact.step_rows(store.form.width))
    return (norms_C for _ in corpus.queries)


_OTHERS = {
    "bm25": _by_words,
    "dense": _by_vectors,
    "hidden": _by_vectors,
    "annotated": _by_labels,
    "random": _by_control(_at_random),
    "length": _by_control(_lengths),
    "gradient_norm": _by_control(_norms),
}


def _file(config, corpus: Corpus, trained: Trained, workdir: Workdir, method) -> pathlib.Path:
    """Where a method's ranking is kept: named by all that it depends on."""
    fields = dataclasses.asdict(method)
    fields.pop("title")
    made_from: list = [fields, corpus.fingerprint, config.eval.top_k]
    if method.takes_gradients:
        for step in checkpoints.steps_of(config, trained, method):
            then = dataclasses.replace(trained, step=step)
            for what in {method.gradients: 0, method.query_gradients: 0}:
                made = encode.made_from(config, corpus, then, what)
                path = encode.path_of(config, corpus, workdir, "corpus", made)
                made_from += [made, config.store.dtype, _withdrawn(path)]
        if method.hessian != "none":
            made_from.append(dict(config.hessian))
        if method.shares_scan and config.search.index != "none":
            made_from.append(config.search.to_dict())
    elif method.retriever == "hidden":
        made_from += [fingerprint(trained.fingerprint), trained.step]
    elif method.retriever == "dense":
        made_from.append(dense.identity(config.dense.model))
    elif method.retriever == "random":
        made_from.append(config.seed)
    elif method.retriever == "annotated":
        made_from.append(config.data.seed)
    directory = workdir / "retrieval"
    directory.mkdir(exist_ok=True)
    return directory / f"{method.retriever}-{fingerprint(plain(made_from))}.npz"


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


def told(note: dict) -> str:
    """What `retrieve` says of a method, in a line."""
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
