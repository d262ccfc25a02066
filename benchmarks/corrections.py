"""How close each correction comes to exact Adam on a trained model, and its cost.

    python -m benchmarks.corrections --workdir=demo --json=corrections.json
    python -m benchmarks.corrections --workdir=runs/trex_small --config=configs/trex_small.py \\
        --config.data.sentences=trex_lama_sentences.jsonl.gz \\
        --config.data.facts=trex_lama_facts.jsonl.gz --passages=6000 --json=corrections.json

The workdir is that of a run of `experiments.trace` whose training is done; the config, with what
the command line sets, must be the run's (projection and λ may differ). Queries, and passages beside
those that state them, are sampled at random, or all are taken. Every correction encodes the same
ones with the same projection matrices, and is compared with exact Adam:

    relative error  √(mean (1 − Ŝ/S)²) of S = 1/√V over all weights; and with every matrix
                    multiplied by the constant that minimises it (the error of shape alone)
                    (--fresh=N also compares with S estimated anew from N batches, which separates
                    exact Adam's S from the noise of the optimizer's short memory)
    cosine          of a passage's encoding with its exact-Adam encoding; and of whole gradients,
                    not projected, of some passages, by kind of layer
    overlap         of the ten passages retrieved, |A ∩ B| / 10, mean over queries

Overlaps are to be read beside the noise floor, that of exact Adam with itself under another seed of
the projection. Times are in turns on the same batches. Nothing is written to the workdir.
"""

import dataclasses
import functools
import itertools
import statistics
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from benchmarks import finished_run, record
from experiments import launch
from tda import hessian
from tda import loss as losses
from tda.data import batches
from tda.encoding import table
from tda.evaluation import ranking
from tda.gradients import reference, sites
from tda.gradients.encoder import Encoder, make_encoder, scored_positions
from tda.gradients.moments import estimate, second_moments
from tda.gradients.moments.scales import Scale
from tda.gradients.projection import Projection
from tda.gradients.sites import find_sites
from tda.retrieval import exact
from tda.retrieval.ranked import Ranked
from tda.retrieval.scorer import Scorer
from tda.retrieval.sources import InMemory
from tda.run.run import Corpus, Trained
from tda.training import loop

_QUERIES = flags.DEFINE_integer("queries", 200, "queries, sampled at random; 0: all")
_PASSAGES = flags.DEFINE_integer("passages", 0, "passages, at least all correct ones; 0: all")
_WHOLE = flags.DEFINE_integer("whole", 64, "passages whose whole gradients are compared")
_FRESH = flags.DEFINE_integer("fresh", 0, "batches of a new estimate of V; 0: none")
_ROUNDS = flags.DEFINE_integer("rounds", 7, "rounds of timing after warm-up")
_SEED = flags.DEFINE_integer("seed", 0, "of the samples")

RANKS = (1, 2, 4, 8, 16)
CORRECTIONS = ("none", "factored", *(f"low_rank({r})" for r in RANKS), "adam")
K = 10


@dataclasses.dataclass(frozen=True)
class Run:
    """The rows to encode, and the model.

    Attributes:
        config: of the run.
        corpus: of the run.
        trained: the model and its checkpoint.
        chosen: the sites.
        queries, passages: rows that are encoded.
        correct: of each of these queries, the numbers of its correct passages among `passages`.
    """

    config: object
    corpus: Corpus
    trained: Trained
    chosen: list[sites.Site]
    queries: np.ndarray
    passages: np.ndarray
    correct: dict[str, list[np.ndarray]]

    @property
    def layout(self) -> batches.BatchLayout:
        """How passages are batched: in few lengths, as each is compiled for nine encoders."""
        lengths = batches.buckets(self.config.model.context, ratio=2.0)
        tokens = self.config.gradients.tokens_per_batch
        return batches.BatchLayout(lengths, tokens, self.corpus.tokenizer.pad)

    @property
    def scope(self) -> dict:
        """Keyword arguments that choose the sites."""
        g = self.config.gradients
        return dict(include=g.include or None, exclude=g.exclude or None, untapped=g.untapped)


def load(config, directory: str) -> Run:
    """Returns the finished run in a workdir, with samples of it."""
    finished = finished_run.load(config, directory)
    corpus, trained = finished.corpus, finished.trained
    rng = np.random.default_rng(_SEED.value)
    queries = np.sort(rng.permutation(len(corpus.prompts))[: _QUERIES.value or None])
    stating = np.unique(np.concatenate([corpus.correct["all"][q] for q in queries]))
    others = rng.permutation(np.setdiff1d(np.arange(len(corpus.passages)), stating))
    if _PASSAGES.value:
        others = others[: max(0, _PASSAGES.value - len(stating))]
    passages = np.sort(np.concatenate([stating, others]))
    correct = {
        label: [np.searchsorted(passages, lists[q]) for q in queries]
        for label, lists in corpus.correct.items()
    }
    run = Run(config, corpus, trained, [], queries, passages, correct)
    return dataclasses.replace(run, chosen=find_sites(trained.model, **run.scope))


def read_scales(run: Run, correction: str) -> tuple[dict[str, Scale] | None, list[float]]:
    """Returns the scales, and the seconds of reading them the first and the second time."""
    if correction == "none":
        return None, [0.0, 0.0]
    seconds = []
    for _ in range(2):
        started = time.perf_counter()
        root, step = run.trained.root, run.trained.step
        scales = second_moments.read(root, run.chosen, correction, step)
        jax.block_until_ready([(s.left, s.right, s.full) for s in scales.values()])
        seconds.append(time.perf_counter() - started)
    return scales, seconds


def encoder_of(run: Run, scales: dict[str, Scale] | None, other_seed: bool = False) -> Encoder:
    """Returns the encoder of a run with these scales."""
    projection = Projection(**dict(run.config.projection))
    if other_seed:
        projection = dataclasses.replace(projection, seed=projection.seed + 1)
    output = run.config.gradients.output
    return make_encoder(run.trained.model, projection, scales, output, **run.scope)


def encode(run: Run, encoder: Encoder) -> tuple[np.ndarray, np.ndarray]:
    """Returns the gradients of queries and passages, float32 [Q, E] and [C, E]."""
    rows_of = functools.partial(table.encode_rows, encoder, layout=run.layout)
    return (rows_of(run.corpus.prompts, run.queries), rows_of(run.corpus.passages, run.passages))


def retrieve(run: Run, queries, passages, slices) -> dict[str, Ranked]:
    """Ranks by gradient cosine and TrackStar, with λ by the rule unless the config sets it."""
    h = run.config.hessian
    loop = hessian.autocorrelation_of_source(InMemory(passages, slices)).blocks
    evaluation = hessian.autocorrelation_of_source(InMemory(queries, slices)).blocks
    weight = h.weight
    if weight < 0:
        spectra = hessian.spectra(loop), hessian.spectra(evaluation)
        width = passages.shape[1]
        weight = hessian.mixing_weight(*spectra, h.component or hessian.default_component(width))
    roots = hessian.inverse_root(hessian.mix(loop, evaluation, weight), h.damping)
    scorers = {"cosine": Scorer(None, True), "TrackStar": Scorer(roots, True)}
    return exact.search(queries, InMemory(passages, slices), scorers, K, run.correct)


def cosines(a_RxE: np.ndarray, b_RxE: np.ndarray) -> np.ndarray:
    """Returns the cosine of each row with the other's: float64 [R]."""
    dots = np.einsum("re,re->r", a_RxE, b_RxE, dtype=np.float64)
    return dots / (np.linalg.norm(a_RxE, axis=1) * np.linalg.norm(b_RxE, axis=1))


def mean_and_tail(values: np.ndarray) -> dict:
    """Returns the mean and the 5th percentile."""
    return {"mean": float(np.mean(values)), "5%": float(np.percentile(values, 5))}


def overlap(a: Ranked, b: Ranked) -> float:
    """Returns |A ∩ B| / K of the proponents, the mean over queries."""
    pairs = zip(a.proponents, b.proponents, strict=True)
    return float(np.mean([len(np.intersect1d(x, y)) / len(x) for x, y in pairs]))


def retrieval_figures(found: dict[str, Ranked], exactly: dict[str, Ranked]) -> dict:
    """Returns each method's overlap with exact Adam, MRR and recall."""
    return {
        name: {
            "overlap": overlap(r, exactly[name]),
            "MRR": ranking.mean(ranking.reciprocal_ranks(r.first_ranks["all"])),
            "recall@10": ranking.mean(ranking.hits(r.first_ranks["all"], 10)),
        }
        for name, r in found.items()
    }


def _ratio(mine: Scale | None, exactly: Scale):
    """Returns Ŝ/S of every weight; without correction Ŝ is the constant of least error."""
    if mine is not None:
        return mine.dense() / exactly.full
    inverse = 1.0 / exactly.full
    mean, square = (jnp.mean(x, (-1, -2), keepdims=True) for x in (inverse, jnp.square(inverse)))
    return inverse * mean / square


def errors(run: Run, scales: dict[str, Scale] | None, exactly: dict[str, Scale]) -> dict:
    """Returns the relative errors of 1/√V over all weights."""
    sizes, as_is, shape = [], [], {}
    for site in run.chosen:
        ratio = _ratio(scales and scales[site.path], exactly[site.path])
        mean, square = (jnp.mean(x, axis=(-1, -2)) for x in (ratio, jnp.square(ratio)))
        as_is += np.atleast_1d(jnp.mean(jnp.square(1.0 - ratio), axis=(-1, -2))).tolist()
        of_shape = np.atleast_1d(jnp.maximum(0.0, 1.0 - jnp.square(mean) / square))
        shape |= dict(zip(site.names(), of_shape.tolist(), strict=True))
        sizes += [site.rows * site.columns] * len(of_shape)
    worst = max(shape, key=shape.get)
    return {
        "relative error": float(np.sqrt(np.average(as_is, weights=sizes))),
        "relative error of shape": float(np.sqrt(np.average([*shape.values()], weights=sizes))),
        "of shape, worst matrix": {worst: shape[worst] ** 0.5},
    }


def fresh_moments(run: Run) -> dict[str, Scale]:
    """Estimates 1/√V anew from batches of the training text, at the checkpoint."""
    text = run.corpus.training
    layout = dataclasses.replace(run.layout, tokens_per_batch=run.config.train.tokens_per_batch)
    found = (b.arrays() for b in loop.epoch_batches(text, 0, layout, _SEED.value))

    def loss(model, batch):
        return losses.cross_entropy(model(batch["tokens"]), batch["targets"], batch["weights"])

    some = itertools.islice(found, _FRESH.value)
    return estimate.estimate(
        run.trained.model, loss, some, run.chosen, "adam", run.config.train.eps
    )


def against_fresh(run: Run, scales: dict[str, dict | None]) -> dict[str, dict]:
    """Returns errors against moments estimated anew, by correction; empty without --fresh."""
    if not _FRESH.value:
        return {}
    fresh = fresh_moments(run)
    return {correction: errors(run, mine, fresh) for correction, mine in scales.items()}


def whole_cosines(run: Run, scales: dict[str, dict | None]) -> dict[str, dict]:
    """Returns cosines of whole scaled gradients with exact Adam's, by correction and layer."""
    rng = np.random.default_rng(_SEED.value)
    rows = run.passages[rng.permutation(len(run.passages))[: _WHOLE.value]]
    gradients = jax.jit(lambda b: reference.per_example_gradients(run.trained.model, b))
    products = {c: {} for c in scales}  # by kind: lists of [B, 3] products
    for start in range(0, len(rows), 4):
        context, pad = run.config.model.context, run.corpus.tokenizer.pad
        batch = batches.materialise(run.corpus.passages, rows[start : start + 4], context, 4, pad)
        found, count = gradients(batch.arrays()), len(batch.rows)
        for site in run.chosen:
            G = jax.vmap(site.matrix)(found[site.path][:count])
            E = G * scales["adam"][site.path].full
            for correction, mine in scales.items():
                C = G if mine is None else G * mine[site.path].dense()
                axes = tuple(range(1, C.ndim))
                three = [np.asarray(jnp.sum(x * y, axes)) for x, y in ((C, E), (C, C), (E, E))]
                kinds = products[correction].setdefault(site.group, {})
                kinds[start] = kinds.get(start, 0.0) + np.stack(three, -1).astype(np.float64)
    out = {}
    for correction, kinds in products.items():
        by_kind = {k: np.concatenate(list(parts.values())) for k, parts in kinds.items()}
        by_kind["all"] = sum(by_kind.values())
        out[correction] = {
            k: mean_and_tail(x[:, 0] / np.sqrt(x[:, 1] * x[:, 2])) for k, x in by_kind.items()
        }
    return out


def encoding_times(run: Run, encoders: dict[str, Encoder]) -> dict[str, dict]:
    """Returns times over exact Adam's and over those without correction, on four batches."""
    planned = run.layout.batches(run.corpus.passages, run.passages)
    inputs = []
    for i in np.unique(np.linspace(0, len(planned) - 1, 6).astype(int)[1:-1]):
        batch = planned[i]
        inputs.append((batch.arrays(), scored_positions(batch.weights)))
    sides = {
        name: functools.partial(lambda e: [e(*x) for x in inputs], encoder)
        for name, encoder in encoders.items()
    }
    times = record.in_turns(sides, _ROUNDS.value)

    def over(name, other):
        pairs = zip(times[name], times[other], strict=True)
        return statistics.median(a / b for a, b in pairs)

    tokens = sum(float(x["weights"].sum()) for x, _ in inputs)
    return {
        name: {
            "over none": over(name, "none"),
            "over adam": over(name, "adam"),
            "tokens a second": tokens / statistics.median(seconds),
        }
        for name, seconds in times.items()
    }


def measure(run: Run, figures: dict) -> Iterator[None]:
    """Adds all figures by correction; yields when some are there."""
    scales, seconds, encoders = {}, {}, {}
    for correction in CORRECTIONS:
        scales[correction], seconds[correction] = read_scales(run, correction)
        encoders[correction] = encoder_of(run, scales[correction])
    slices = encoders["adam"].layout.slices
    exact_queries, exact_passages = encode(run, encoders["adam"])
    exactly = retrieve(run, exact_queries, exact_passages, slices)
    for correction in CORRECTIONS:
        mine = exact_queries, exact_passages
        if correction != "adam":
            mine = encode(run, encoders[correction])
        figures[correction] = errors(run, scales[correction], scales["adam"]) | {
            "cosine of encodings": mean_and_tail(cosines(mine[1], exact_passages)),
            "cosine of queries' encodings": mean_and_tail(cosines(mine[0], exact_queries)),
            **retrieval_figures(retrieve(run, *mine, slices), exactly),
            "seconds to read, first and second time": seconds[correction],
        }
        _tell(correction, figures[correction])
        yield
    del mine
    floor = retrieve(run, *encode(run, encoder_of(run, scales["adam"], other_seed=True)), slices)
    figures["adam, another seed"] = retrieval_figures(floor, exactly)
    _tell("adam, another seed", figures["adam, another seed"])
    del exact_passages, floor
    yield
    stages = {
        "cosine of whole gradients": lambda: whole_cosines(run, scales),
        "errors against fresh moments": lambda: against_fresh(run, scales),
        "encoding time": lambda: encoding_times(run, encoders),
    }
    for name, stage in stages.items():
        for correction, found in stage().items():
            figures[correction][name] = found
            _tell(correction, {name: found})
        yield


def _short(value) -> str:
    """Formats numbers with three decimals."""
    if isinstance(value, dict):
        return "; ".join(f"{k} {_short(v)}" for k, v in value.items())
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _tell(name: str, figures: dict) -> None:
    print(f"{name:12} {_short(figures)}", flush=True)


def main(config, workdir):
    """Measures one run, and writes the figures."""
    run = load(config, workdir)
    figures = {
        "parameters with gradients": sum(s.rows * s.columns * len(s.names()) for s in run.chosen),
        "queries": len(run.queries),
        "passages": len(run.passages),
        "training step": run.trained.step,
        "projection": dict(config.projection),
        "corrections": {},
    }
    print(f"{len(run.queries)} queries, {len(run.passages):,} passages", flush=True)
    for _ in measure(run, figures["corrections"]):
        record.write("corrections", figures)


if __name__ == "__main__":
    flags.set_default(launch.CONFIG, "configs/world_facts.py:pooled")
    launch.launch(main)
