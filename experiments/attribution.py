"""The stages that encode corpus and queries into stores, and retrieve by every method."""

import dataclasses
import json
import pathlib

import numpy as np

from experiments.corpus import Corpus
from experiments.training import Trained
from experiments.workdir import Workdir, fingerprint, plain, write_json
from tda import encoding, hessian, methods
from tda import store as stores
from tda.gradients import encoder as encoders
from tda.gradients import second_moments, sites
from tda.gradients.projection import Projection
from tda.retrieval import bm25, exact, ranked
from tda.retrieval.ranked import Ranked


def _made_from(config, corpus: Corpus, trained: Trained, corrected: bool) -> dict:
    """What decides the gradients of a store, apart from the rows."""
    g = config.gradients
    return plain(
        {
            "checkpoint": fingerprint(trained.fingerprint),
            "step": trained.step,
            "projection": dataclasses.asdict(Projection(**dict(config.projection))),
            "correction": g.correction if corrected else "none",
            "output": g.output,
            "include": g.include,
            "exclude": g.exclude,
            "tokenizer": corpus.fingerprint["tokenizer"],
        }
    )


def encode(
    config, corpus: Corpus, trained: Trained, workdir: Workdir, corrected: bool
) -> tuple[stores.GradientStore, np.ndarray]:
    """The store of the corpus's gradients, and the queries' gradients, encoded if not there yet."""
    g = config.gradients
    made_from = _made_from(config, corpus, trained, corrected)
    correction, projection = made_from["correction"], Projection(**dict(config.projection))
    scope = dict(include=g.include or None, exclude=g.exclude or None)
    chosen, scales = sites.find(trained.model, **scope), None
    if correction != "none":
        scales = second_moments.read(trained.root, chosen, correction, trained.step)
    _tell_coverage(trained, chosen)
    make = encoders.make_encoder(trained.model, projection, scales, g.output, **scope)
    blocks = dict.fromkeys(make.layout.blocks, projection.side**2)
    layout = dict(
        bucket_lengths=corpus.buckets,
        tokens_per_batch=g.tokens_per_batch,
        pad=corpus.tokenizer.pad,
        mesh=trained.mesh,
    )
    found = []
    for name, table in (("queries", corpus.prompts), ("corpus", corpus.passages)):
        whole = made_from | {name: corpus.fingerprint[name], "dtype": config.store.dtype}
        path = workdir / "stores" / f"{name}-{correction}-{fingerprint(whole)}"
        store = stores.create(path, table.ids, blocks, whole, config.store.dtype)
        encoding.fill(store, make, table, f"encode {name} ({correction})", **layout)
        found.append(store)
    queries, passages = found
    return passages, queries.read(slice(0, queries.rows))


def _tell_coverage(trained: Trained, chosen: list[sites.Site]) -> None:
    covered = sum(s.rows * s.columns * (s.stack or 1) for s in chosen)
    out = sites.left_out(trained.model, chosen)
    total = covered + sum(out.values())
    print(
        f"gradients of {covered:,} of {total:,} parameters ({covered / total:.0%}); "
        f"left out: {', '.join(out) or 'none'}"
    )


def retrieve(
    config, corpus: Corpus, trained: Trained, workdir: Workdir
) -> tuple[dict[str, Ranked], dict]:
    """What every method of the config ranks, and facts about how (λ and the like).

    A ranking that is there already, from the same gradients and settings, is read.
    """
    chosen = methods.parse(config.methods)
    files = {n: _file(config, corpus, trained, workdir, m) for n, m in chosen.items()}
    todo = {n: m for n, m in chosen.items() if not files[n].exists()}
    for corrected in (False, True):
        sharing = {
            n: m for n, m in todo.items() if m.retriever == "gradient" and m.corrected == corrected
        }
        if sharing:
            store, queries = encode(config, corpus, trained, workdir, corrected)
            print(f"search {store.rows:,} passages: {', '.join(sharing)}")
            scorers, note = _scorers(config, store, queries, sharing)
            found = exact.search(
                queries,
                store.chunks(),
                store.rows,
                store.slices,
                scorers,
                config.eval.top_k,
                corpus.correct,
                store.read,
            )
            for name, ranking in found.items():
                _keep(files[name], ranking, note.get(name))
    for name, method in todo.items():
        if method.retriever == "bm25":
            texts = [corpus.text_of(i) for i in range(len(corpus.passages))]
            asked = [f"{f.prompt(config.data.prompt)} {f.entity1}" for f in corpus.queries]
            found = bm25.search(asked, texts, config.eval.top_k, corpus.correct)
            _keep(files[name], found, None)
    notes = {n: json.loads(_note(f).read_text()) for n, f in files.items() if _note(f).exists()}
    return {n: ranked.load(files[n]) for n in chosen}, notes


def _file(config, corpus: Corpus, trained: Trained, workdir: Workdir, method) -> pathlib.Path:
    """Where a method's ranking is kept: named by all that it depends on."""
    made_from: list = [dataclasses.asdict(method), corpus.fingerprint, config.eval.top_k]
    if method.retriever == "gradient":
        made_from += [_made_from(config, corpus, trained, method.corrected), dict(config.hessian)]
        made_from.append(config.store.dtype)
    directory = workdir / "retrieval"
    directory.mkdir(exist_ok=True)
    return directory / f"{method.retriever}-{fingerprint(plain(made_from))}.npz"


def _note(file: pathlib.Path) -> pathlib.Path:
    return file.with_suffix(".json")


def _keep(file: pathlib.Path, found: Ranked, note: dict | None) -> None:
    if note:
        write_json(_note(file), note)
    ranked.save(file, found)


def _scorers(config, store, queries, sharing) -> tuple[dict[str, exact.Scorer], dict]:
    h = config.hessian
    kinds = {m.hessian for m in sharing.values()}
    roots, note = {"none": None}, {}
    if kinds - {"none"}:
        train = hessian.autocorrelation((x for _, x in store.chunks()), store.slices)
        if "train" in kinds:
            roots["train"] = hessian.inverse_root(train, h.damping)
        if "mixed" in kinds:
            evaluation = hessian.autocorrelation([queries], store.slices)
            k = h.component or hessian.component(store.width)
            weight = h.weight
            if weight < 0:
                spectra = hessian.spectrum(train), hessian.spectrum(evaluation)
                weight = hessian.mixing_weight(*spectra, k)
            roots["mixed"] = hessian.inverse_root(hessian.mix(train, evaluation, weight), h.damping)
            note = {"lambda": weight, "component": k}
    scorers = {n: exact.Scorer(roots[m.hessian], m.unit_norm) for n, m in sharing.items()}
    return scorers, {n: note for n, m in sharing.items() if m.hessian == "mixed"}
