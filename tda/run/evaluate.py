"""The stage that measures what the methods retrieved, and writes results and metrics."""

import dataclasses

import numpy as np

from tda import results
from tda.evaluation import content, frequency, ranking, sampling, statistics, summary
from tda.evaluation.likelihood import Likelihood
from tda.evaluation.tail_patch import change, log_change
from tda.retrieval.ranked import Ranked
from tda.run import measures
from tda.run.measures import CONTROL
from tda.run.run import Corpus, Trained
from tda.run.workdir import Workdir
from tda.runtime import processes, progress
from tda.runtime.atomic_file import write_json


def sample(count: int, wanted: int, seed: int) -> np.ndarray:
    """A fixed sample of `wanted` of `count` queries (all where 0), in order."""
    if not wanted or wanted >= count:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).permutation(count)[:wanted])


@dataclasses.dataclass(frozen=True)
class Known:
    """What is known of the queries, apart from any method.

    Attributes:
        nats: float32 [Q], −log p(target | prompt).
        ranks: int64 [Q], worst rank of a token of the target.
        frequencies: int64 [Q], passages of the corpus that name both entities.
        bucket: int64 [Q], the bucket of each frequency.
        buckets: what the buckets are called.
        generations: by query row, what the model said.
        confidence: by query row, the share of that which states the target.
    """

    nats: np.ndarray
    ranks: np.ndarray
    frequencies: np.ndarray
    bucket: np.ndarray
    buckets: list[str]
    generations: dict[int, list[str]]
    confidence: dict[int, float]


def run(
    config,
    corpus: Corpus,
    trained: Trained,
    ranked: dict[str, Ranked],
    workdir: Workdir,
    out=None,
) -> dict:
    """Metrics by method; writes `results/METHOD.jsonl` and `metrics.json`.

    Of several processes all compute, since the model may be spread over them; the first writes.

    Args:
        config, corpus, trained, workdir: of the run.
        ranked: what each method retrieved. A row of −1 is none: a method may find fewer than K.
        out: directory to write to; the workdir by default.
    """
    asked = sample(len(corpus.queries), config.eval.queries, config.data.seed)
    known = _known(config, corpus, trained, workdir, asked)
    patches = _Patches.measure(config, corpus, trained, ranked, workdir, asked)
    values = {n: _values(config, found, known, patches, asked) for n, found in ranked.items()}
    metrics = _metrics(config, corpus, trained, known, patches, values, asked)
    for name, found in _contents(config, corpus, ranked, patches, asked).items():
        metrics[name]["by_content"] = found

    def write():
        where = workdir.path if out is None else out
        (where / "results").mkdir(parents=True, exist_ok=True)
        # They say whose the results are: of some written over, those of before must not.
        (where / "metrics.json").unlink(missing_ok=True)
        for name, found in ranked.items():
            records = [_record(config, corpus, found, known, patches, int(q)) for q in asked]
            results.write(where / "results" / f"{name}.jsonl", records)
        write_json(where / "metrics.json", metrics)

    processes.on_first_process("write results", write)
    return metrics


def _known(config, corpus: Corpus, trained: Trained, workdir: Workdir, asked) -> Known:
    e = config.eval
    likelihood = Likelihood(trained.model, corpus.layout(config.gradients.tokens_per_batch))
    targets = likelihood(corpus.prompts)
    edges = _edges(e.frequency_edges)
    with progress.bar(len(corpus.sentences), "fact frequency", "passage") as bar:
        texts = (s.text for s in corpus.sentences)
        frequencies = frequency.counts(corpus.queries, texts, bar.update)
    bucket, buckets = frequency.buckets(frequencies, edges)
    drawn: dict[int, list[str]] = {}
    if e.samples:
        chosen = asked[sample(len(asked), e.sampled_queries, config.data.seed)]
        drawn = measures.generations(config, corpus, trained, workdir, chosen.tolist())
    confidence = {q: sampling.confidence(g, corpus.answers(q)) for q, g in drawn.items()}
    known = Known(targets.nats, targets.ranks, frequencies, bucket, buckets, drawn, confidence)
    ranks = known.ranks[asked]
    print(
        f"the model ranks the target first for {np.mean(ranks == 1):.1%} of the "
        f"queries, in the top {e.known_rank} for {np.mean(ranks <= e.known_rank):.1%}; "
        f"median −log p {np.median(known.nats[asked]):.2f} nats"
    )
    if confidence:
        print(
            f"of {e.samples} samples for each of {len(confidence)} queries "
            f"{np.mean(list(confidence.values())):.1%} state the target"
        )
    return known


def _edges(text: str) -> list[int]:
    try:
        return [int(x) for x in text.split(",")]
    except ValueError as error:
        raise ValueError(
            f"eval.frequency_edges={text!r} must be whole numbers with commas, such as 1,10,100"
        ) from error


@dataclasses.dataclass(frozen=True)
class _Patches:
    """Tail-patches of a sample of queries.

    Attributes:
        log_p: before and after, by (query row, passage row).
        queries: the query rows of the sample.
        rule: what a step is.
    """

    log_p: dict[tuple[int, int], tuple[float, float]]
    queries: list[int]
    rule: dict | None

    @classmethod
    def measure(cls, config, corpus, trained, ranked, workdir, asked) -> "_Patches":
        e = config.eval
        if not e.tail_patch_queries:
            return cls({}, [], None)
        chosen = asked[sample(len(asked), e.tail_patch_queries, config.data.seed)].tolist()
        found = [(q, int(p)) for f in ranked.values() for q in chosen for p in f.proponents[q]]
        pairs = [pair for pair in found if pair[1] >= 0] + [(q, CONTROL) for q in chosen]
        log_p = measures.tail_patches(config, corpus, trained, workdir, pairs)
        return cls(log_p, chosen, measures.step_rule(config, trained))

    def of(self, proponents_QxK: np.ndarray) -> np.ndarray:
        """float64 [Q, K, 2], NaN where there is no passage or the query is not in the sample."""
        out = np.full((*proponents_QxK.shape, 2), np.nan)
        for q in self.queries:
            for i, p in enumerate(proponents_QxK[q].tolist()):
                if p >= 0:
                    out[q, i] = self.log_p[q, p]
        return out

    def control(self, asked) -> np.ndarray:
        """float64 [asked, 2] of a step with a zero gradient, NaN where not in the sample."""
        nothing = (np.nan, np.nan)
        return np.array([self.log_p.get((int(q), CONTROL), nothing) for q in asked]).reshape(-1, 2)


def _values(config, found: Ranked, known: Known, patches: _Patches, asked) -> dict:
    """A method's metrics, a number for each query that was asked."""
    values = summary.rank_values({label: r[asked] for label, r in found.first_ranks.items()})
    knows = known.ranks[asked] <= config.eval.known_rank
    values |= summary.restricted(values, knows, "_known")
    if patches.queries:
        steps_QxKx2 = patches.of(found.proponents)[asked]
        values |= summary.patch_values(steps_QxKx2, patches.control(asked))
    return values


def _metrics(config, corpus, trained, known, patches, values, asked) -> dict:
    e = config.eval
    how = dict(resamples=e.resamples, seed=e.seed)
    relations = sorted({corpus.queries[q].relation for q in asked})
    number = {name: i for i, name in enumerate(relations)}
    of_relation = np.array([number[corpus.queries[q].relation] for q in asked], np.int64)
    stated = (known.ranks[asked] != 1).astype(np.int64)
    found = summary.intervals(values, **how)
    groups = {
        "by_relation": summary.grouped(values, of_relation, relations, **how),
        "by_frequency": summary.grouped(values, known.bucket[asked], known.buckets, **how),
        "by_stated": summary.grouped(
            values, stated, ["stated", "not stated"], **how, differences=True
        ),
    }
    differences = summary.compared(values, **how)
    control = patches.control(asked)
    shared = {
        "n_queries": int(len(asked)),
        "n_known": int(np.sum(known.ranks[asked] <= e.known_rank)),
        "n_stated": int(np.sum(stated == 0)),
        "n_tail_patch_queries": len(patches.queries),
        "tail_patch_control": summary.number(ranking.mean(change(control))),
        "tail_patch_log_control": summary.number(ranking.mean(log_change(control))),
        "tail_patch_rule": patches.rule,
        "confidence": summary.number(ranking.mean(list(known.confidence.values()))),
    }
    empty = dict.fromkeys(_ALWAYS)
    return {
        name: empty
        | summary.as_json(found[name])
        | shared
        | {key: by_method[name] for key, by_method in groups.items()}
        | {"differences": differences[name]}
        for name in values
    }


def _contents(config, corpus: Corpus, ranked: dict[str, Ranked], patches: _Patches, asked) -> dict:
    """By method and kind of passage: its share of the proponents, and what a step on it does."""
    sentences = {s.sentence_id: s for s in corpus.sentences}
    says = content.Content(
        [corpus.queries[q] for q in asked],
        [corpus.correct["all"][q] for q in asked],
        corpus.text_of,
        lambda row: sentences[corpus.passages.documents[row]].fact_triples,
    )
    out: dict[str, dict] = {}
    for name, found in ranked.items():
        kinds_QxK = says.kinds(found.proponents[asked])
        shares = statistics.intervals(
            content.shares(kinds_QxK), resamples=config.eval.resamples, seed=config.eval.seed
        )
        steps_QxK = change(patches.of(found.proponents)[asked])
        out[name] = {
            kind: {
                "share": summary.number(share.mean),
                "interval": [summary.number(share.low), summary.number(share.high)],
                "tail_patch": summary.number(step),
                "n_tail_patches": int(np.sum((kinds_QxK == k) & np.isfinite(steps_QxK))),
            }
            for k, (kind, share, step) in enumerate(
                zip(content.KINDS, shares, content.by_kind(kinds_QxK, steps_QxK), strict=True)
            )
        }
    return out


# A method that ranks nothing has these too, as null.
_ALWAYS = (
    *(
        f"{metric}{label}{known}"
        for label in ("", "_strict")
        for known in ("", "_known")
        for metric in ("mrr", "mrr_at_10", "recall_at_10")
    ),
    "tail_patch",
    "tail_patch_log",
)


def _record(config, corpus: Corpus, found: Ranked, known: Known, patches: _Patches, q: int) -> dict:
    fact = corpus.queries[q]
    correct = set(corpus.correct["all"][q].tolist())

    def passages(rows, scores):
        return [
            (corpus.passages.ids[r], corpus.text_of(r), s)
            for r, s in zip(rows, scores, strict=True)
            if r >= 0
        ]

    more: dict = {}
    if q in known.generations:
        more["8b_generations"] = known.generations[q]
        more["8b_confidence"] = known.confidence[q]
    for label, ranks in found.first_ranks.items():
        more["first_correct_rank" if label == "all" else f"first_{label}_rank"] = int(ranks[q])
    proponents = [int(p) for p in found.proponents[q] if p >= 0]
    if q in patches.queries:
        log_p = [patches.log_p[q, p] for p in proponents]
        more["proponent_tail_patch"] = change(np.reshape(log_p, (-1, 2))).tolist()
    return results.record(
        fact.fact_id,
        config.data.name if not config.data.sentences else "jsonl",
        fact.prompt(config.data.prompt),
        fact.entity1,
        passages(found.proponents[q], found.proponent_scores[q]),
        passages(found.opponents[q], found.opponent_scores[q]),
        fact_id=fact.fact_id,
        relation=fact.relation,
        groundtruth=fact.entity1,
        proponent_correct=[p in correct for p in proponents],
        has_trex_sentence=bool(correct),
        is_8b_correct=bool(known.ranks[q] == 1),
        c4_frequency=int(known.frequencies[q]),
        c4_frequency_bucket=known.buckets[known.bucket[q]],
        target_nats=float(known.nats[q]),
        target_rank=int(known.ranks[q]),
        **more,
    )
