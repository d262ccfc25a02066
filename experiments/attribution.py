"""The stage that retrieves passages for every query by every method."""

import dataclasses
import functools
import json
import pathlib

import jax

from experiments import encoding, indexing
from experiments.corpus import Corpus
from experiments.training import Trained
from experiments.workdir import Workdir, fingerprint, plain, write_json
from tda import hessian, methods, processes, progress, sharding
from tda import store as stores
from tda.retrieval import bm25, exact, ranked, scorer
from tda.retrieval.ranked import Ranked


def retrieve(
    config, corpus: Corpus, trained: Trained, workdir: Workdir
) -> tuple[dict[str, Ranked], dict]:
    """What every method of the config ranks, and facts about how (λ and the like).

    A ranking that is there already, from the same gradients and settings, is read. Of several
    processes all encode, and the first searches.
    """
    chosen = methods.parse(config.methods)
    files = {n: _file(config, corpus, trained, workdir, m) for n, m in chosen.items()}
    lacking = processes.by_first(
        "look for rankings", lambda: [n for n, f in files.items() if not f.exists()]
    )
    todo = {n: chosen[n] for n in lacking}
    for corrected in (False, True):
        sharing = {
            n: m for n, m in todo.items() if m.retriever == "gradient" and m.corrected == corrected
        }
        # A store that lost a shard is mended even if nothing is to be searched in it.
        if sharing or _is_begun(config, corpus, trained, workdir, corrected):
            store, queries = encoding.encode(config, corpus, trained, workdir, corrected)
        if sharing:
            work = functools.partial(
                _search, config, corpus, trained, store, queries, sharing, files, workdir
            )
            processes.by_first("search", work)
    for name, method in todo.items():
        if method.retriever == "bm25":
            work = functools.partial(_search_text, config, corpus, files[name])
            processes.by_first("search", work)
    notes = processes.by_first("read notes", lambda: _notes(files))
    return {n: ranked.load(files[n]) for n in chosen}, notes


def _is_begun(config, corpus: Corpus, trained: Trained, workdir: Workdir, corrected: bool) -> bool:
    made = encoding.made_from(config, corpus, trained, corrected)
    path = encoding.path_of(config, corpus, workdir, "corpus", made)

    def ask():
        return (path / "manifest.json").exists() and not stores.finished(path)

    return processes.by_first("look for an unfinished store", ask)


def _search(
    config,
    corpus: Corpus,
    trained: Trained,
    store,
    queries,
    sharing: dict,
    files: dict,
    workdir: Workdir,
) -> None:
    print(f"search {store.rows:,} passages: {', '.join(sharing)}")
    scorers, notes = _scorers(config, store, queries, sharing)

    def exactly(gradients_QxE, scorers, k, correct):
        with progress.bar(store.rows, f"search ({', '.join(scorers)})", "passage") as bar:
            return exact.search(
                gradients_QxE, store, scorers, k, correct, _search_mesh(trained), bar.update
            )

    names = {n: files[n].stem for n in sharing}
    found, told = indexing.search(
        config, store, queries, scorers, corpus.correct, workdir, names, exactly
    )
    for name, ranking in found.items():
        _keep(files[name], ranking, notes.get(name, {}) | told.get(name, {}))


def _search_mesh(trained: Trained):
    """The devices that this process searches on; None where it is one."""
    mesh = trained.mesh
    if not sharding.is_local(mesh):
        mesh = sharding.make_mesh(devices=jax.local_devices())
    return mesh if sharding.batch_devices(mesh) > 1 else None


def _search_text(config, corpus: Corpus, file: pathlib.Path) -> None:
    texts = [corpus.text_of(i) for i in range(len(corpus.passages))]
    asked = [f"{f.prompt(config.data.prompt)} {f.entity1}" for f in corpus.queries]
    _keep(file, bm25.search(asked, texts, config.eval.top_k, corpus.correct), None)


def _file(config, corpus: Corpus, trained: Trained, workdir: Workdir, method) -> pathlib.Path:
    """Where a method's ranking is kept: named by all that it depends on."""
    made_from: list = [dataclasses.asdict(method), corpus.fingerprint, config.eval.top_k]
    if method.retriever == "gradient":
        made = encoding.made_from(config, corpus, trained, method.corrected)
        made_from += [made, dict(config.hessian), config.store.dtype]
        made_from.append(_withdrawn(encoding.path_of(config, corpus, workdir, "corpus", made)))
        if config.search.index != "none":
            made_from.append(config.search.to_dict())
    directory = workdir / "retrieval"
    directory.mkdir(exist_ok=True)
    return directory / f"{method.retriever}-{fingerprint(plain(made_from))}.npz"


def _withdrawn(path: pathlib.Path) -> list[int]:
    """The rows that were withdrawn from a store, if there is one."""

    def ask():
        there = (path / "manifest.json").exists()
        return stores.open_store(path).withdrawn.tolist() if there else []

    return processes.by_first("look for withdrawn passages", ask)


def _note(file: pathlib.Path) -> pathlib.Path:
    return file.with_suffix(".json")


def _notes(files: dict[str, pathlib.Path]) -> dict:
    return {n: json.loads(_note(f).read_text()) for n, f in files.items() if _note(f).exists()}


def _keep(file: pathlib.Path, found: Ranked, note: dict | None) -> None:
    if note:
        write_json(_note(file), note)
    ranked.save(file, found)


def _scorers(config, store, queries, sharing) -> tuple[dict[str, exact.Scorer], dict]:
    h = config.hessian
    kinds = {m.hessian for m in sharing.values()}
    roots, note = {"none": None}, {}
    if kinds - {"none"}:
        slices = scorer.slices_of(store.form.widths)
        train = hessian.autocorrelation(hessian.rows_for(store, h.sample, h.seed), slices)
        if "train" in kinds:
            roots["train"] = hessian.inverse_root(train, h.damping)
        if "mixed" in kinds:
            evaluation = hessian.autocorrelation([queries], slices)
            k = h.component or hessian.component(store.form.width)
            weight = h.weight
            if weight < 0:
                spectra = hessian.spectrum(train), hessian.spectrum(evaluation)
                weight = hessian.mixing_weight(*spectra, k)
            roots["mixed"] = hessian.inverse_root(hessian.mix(train, evaluation, weight), h.damping)
            note = {"lambda": weight, "component": k}
    scorers = {n: exact.Scorer(roots[m.hessian], m.unit_norm) for n, m in sharing.items()}
    return scorers, {n: note for n, m in sharing.items() if m.hessian == "mixed"}
