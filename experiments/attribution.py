"""The stages that encode corpus and queries into stores, and retrieve by every method."""

import dataclasses

import numpy as np

from experiments.corpus import Corpus
from experiments.training import Trained
from experiments.workdir import Workdir, fingerprint, plain, write_json
from tda import encoding, hessian, methods
from tda import store as stores
from tda.gradients import encoder as encoders
from tda.gradients import second_moments, sites
from tda.gradients.projection import Projection
from tda.retrieval import bm25, exact
from tda.retrieval.ranked import Ranked


def encode(
    config, corpus: Corpus, trained: Trained, workdir: Workdir, corrected: bool
) -> tuple[stores.GradientStore, np.ndarray]:
    """The store of the corpus's gradients, and the queries' gradients, encoded if not there yet."""
    g = config.gradients
    correction = g.correction if corrected else "none"
    projection = Projection(**dict(config.projection))
    made_from = plain(
        {
            "checkpoint": fingerprint(trained.fingerprint),
            "step": trained.step,
            "projection": dataclasses.asdict(projection),
            "correction": correction,
            "output": g.output,
            "include": g.include,
            "exclude": g.exclude,
            "tokenizer": corpus.fingerprint["tokenizer"],
        }
    )
    scope = dict(include=g.include or None, exclude=g.exclude or None)
    scales = None
    if correction != "none":
        chosen = sites.find(trained.model, **scope)
        scales = second_moments.read(trained.root, chosen, correction, trained.step)
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


def retrieve(
    config, corpus: Corpus, trained: Trained, workdir: Workdir
) -> tuple[dict[str, Ranked], dict]:
    """What every method of the config ranks, and facts about how (λ and the like)."""
    chosen = methods.parse(config.methods)
    ranked, notes = {}, {}
    for corrected in (False, True):
        sharing = {
            n: m
            for n, m in chosen.items()
            if m.retriever == "gradient" and m.corrected == corrected
        }
        if sharing:
            store, queries = encode(config, corpus, trained, workdir, corrected)
            scorers, note = _scorers(config, store, queries, sharing)
            notes |= note
            ranked |= exact.search(
                queries,
                store.chunks(),
                store.rows,
                store.slices,
                scorers,
                config.eval.top_k,
                corpus.correct,
                store.read,
            )
    for name, method in chosen.items():
        if method.retriever == "bm25":
            texts = [corpus.text_of(i) for i in range(len(corpus.passages))]
            asked = [f"{f.prompt(config.data.prompt)} {f.entity1}" for f in corpus.queries]
            ranked[name] = bm25.search(asked, texts, config.eval.top_k, corpus.correct)
    write_json(workdir / "retrieval.json", notes)
    return {name: ranked[name] for name in chosen}, notes


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
