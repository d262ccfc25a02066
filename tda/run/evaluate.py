"""The stage that measures the retrieved passages, and writes results and metrics."""

import dataclasses
import functools
import pathlib

import numpy as np

from tda import results
from tda.data.batches import draw
from tda.evaluation import content, frequency, kinds, ranking, sampling, summary
from tda.evaluation.tail_patch import change, log_change
from tda.retrieval.ranked import Ranked
from tda.run import judging, measures
from tda.run.measures import CONTROL
from tda.run.run import Run
from tda.runtime import metrics as metric_writers
from tda.runtime import processes, progress
from tda.runtime.atomic_file import write_json

# Metrics that are null for a method that ranks nothing.
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


# By (query, passage) row.
_Verdicts = dict[tuple[int, int], judging.Verdict]


@dataclasses.dataclass(frozen=True)
class Known:
    """What the model and the corpus know of the queries; the same for every method."""

    nats: np.ndarray  # float32 [Q], −log p(target | prompt)
    ranks: np.ndarray  # int64 [Q], worst rank of a token of the target
    priors: dict[int, float]  # by query row, mean −log p(target | prompts about other subjects)
    knowledge: np.ndarray  # int64, of each sampled query (`tda.evaluation.summary.knowledge`)
    choices: dict[int, list[float]]  # by query row, −log p of each choice beside the target
    # None without labels: such a corpus is never read as a whole.
    frequencies: np.ndarray | None  # int64 [Q], passages of the corpus that name both entities
    bucket: np.ndarray  # int64 [Q], the number of each frequency's bucket
    buckets: list[str]  # the buckets' names
    generations: dict[int, list[str]]  # the model's sampled answers, by query row
    confidence: dict[int, float]  # share of these that state the target, by query row

    @property
    def chosen(self) -> float:
        """The share of queries with choices whose target is likelier than every other choice."""
        return ranking.mean([self.nats[q] < min(nats) for q, nats in self.choices.items()])

    def stated(self, queries: np.ndarray) -> np.ndarray:
        """Returns whether greedy decoding states each target: it has rank 1 at every token."""
        return self.ranks[queries] == 1


def evaluate(run: Run, rankings: dict[str, Ranked], out: pathlib.Path | None = None) -> dict:
    """Computes the metrics of every method; writes `results/METHOD.jsonl` and `metrics.json`.

    All processes compute, since the model may be spread over them; process 0 writes.

    Args:
        run: the run.
        rankings: by method. A row of −1 is no passage: a method may find fewer than K.
        out: directory to write to; by default the workdir.
    """
    queries = run.evaluated
    known = _known(run, queries)
    # All methods at once: a pair that several retrieve is measured once.
    patches = _Patches.measure(run, rankings, queries)
    verdicts = _judge(run, rankings, queries)
    values = {n: _values(run, r, known, patches, verdicts, queries) for n, r in rankings.items()}
    metrics = _metrics(run, known, patches, values, queries)
    contents = _contents(run, queries) if run.corpus.has_labels else None
    of_kinds = functools.partial(
        content.figures,
        knowledge_Q=known.knowledge,
        resamples=run.config.eval.resamples,
        seed=run.config.eval.seed,
    )
    for name, ranked in rankings.items():
        proponents_QxK = ranked.proponents[queries]
        steps_QxK = change(patches.changes(ranked.proponents)[queries])
        if contents is not None:
            kinds_QxK = contents.kinds(proponents_QxK)
            metrics[name]["by_content"] = of_kinds(content.KINDS, kinds_QxK, steps_QxK)
        if verdicts is not None:
            kinds_QxK = _judged_kinds(verdicts, proponents_QxK, queries)
            metrics[name]["by_kind"] = of_kinds(kinds.TITLES, kinds_QxK, steps_QxK)

    def write():
        # Another task of the same array has written what this one would write.
        if run.engine.party and run.workdir.has_new("metrics.json"):
            return
        directory = run.workdir.path if out is None else out
        (directory / "results").mkdir(parents=True, exist_ok=True)
        # metrics.json marks the results as complete, so it is removed while they are overwritten.
        (directory / "metrics.json").unlink(missing_ok=True)
        for name, ranked in rankings.items():
            records = [_record(run, ranked, known, patches, verdicts, int(q)) for q in queries]
            results.write(directory / "results" / f"{name}.jsonl", records)
        write_json(directory / "metrics.json", metrics)
        metric_writers.log_figures(run.trained.step, _figures(metrics))

    with run.engine.alone():
        processes.on_first_process("write results", write)
    return metrics


def _figures(metrics: dict) -> dict[str, float]:
    """Returns the main figures and the ends of their intervals, such as "mrr/bm25/low"."""
    figures = {}
    for method, m in metrics.items():
        for name in (n for n in summary.HEADLINE if m.get(n) is not None):
            figures[f"{name}/{method}"] = m[name]
            ends = zip(("low", "high"), m["intervals"].get(name, ()), strict=False)
            figures |= {f"{name}/{method}/{end}": x for end, x in ends if x is not None}
    return figures


def _known(run: Run, queries: np.ndarray) -> Known:
    corpus, e = run.corpus, run.config.eval
    nats, ranks = measures.likelihoods(run)
    priors = measures.priors(run, queries.tolist())
    knowledge = measures.knowledge_by(nats, ranks, priors, queries)
    choices = measures.other_choices(run, queries.tolist())
    frequencies, bucket, buckets = None, np.zeros(0, np.int64), []
    if corpus.has_labels:
        with progress.bar(len(corpus.sentences), "fact frequency", "passage") as bar:
            texts = (s.text for s in corpus.sentences)
            frequencies = frequency.counts(corpus.queries, texts, bar.update)
        bucket, buckets = frequency.buckets(frequencies, frequency_edges(run.config))
    answers: dict[int, list[str]] = {}
    if e.samples:
        chosen = queries[draw(len(queries), e.sampled_queries, run.config.data.seed)]
        answers = measures.generations(run, chosen.tolist())
    confidence = {q: sampling.confidence(g, corpus.answers(q)) for q, g in answers.items()}
    known = Known(
        nats, ranks, priors, knowledge, choices, frequencies, bucket, buckets, answers, confidence
    )
    ranks = ranks[queries]
    print(
        f"the model ranks the target first for {np.mean(ranks == 1):.1%} of the "
        f"queries, in the top {e.known_rank} for {np.mean(ranks <= e.known_rank):.1%}; "
        f"median −log p {np.median(nats[queries]):.2f} nats"
    )
    if choices:
        print(
            f"of several choices the model prefers the right one for {known.chosen:.1%} of "
            f"{len(choices)} queries"
        )
    if confidence:
        print(
            f"of {e.samples} samples for each of {len(confidence)} queries "
            f"{np.mean(list(confidence.values())):.1%} state the target"
        )
    return known


def frequency_edges(config) -> list[int]:
    """Returns where the buckets of fact frequency begin.

    Raises:
        ValueError: the config's value is not a list of rising whole numbers from 1 up.
    """
    text = config.eval.frequency_edges
    try:
        edges = [int(x) for x in text.split(",")]
        frequency.buckets([], edges)
    except ValueError as error:
        raise ValueError(
            f"eval.frequency_edges={text!r} must be rising whole numbers from 1 up with commas, "
            "such as 1,10,100"
        ) from error
    return edges


@dataclasses.dataclass(frozen=True)
class _Patches:
    """Tail-patches of a sample of queries."""

    log_p: dict[tuple[int, int], tuple[float, float]]  # before, after; by (query, passage) row
    queries: list[int]  # query rows of the sample
    rule: dict | None  # what a step is

    @classmethod
    def measure(cls, run: Run, rankings: dict[str, Ranked], queries: np.ndarray) -> "_Patches":
        e = run.config.eval
        if not e.tail_patch_queries:
            return cls({}, [], None)
        drawn = draw(len(queries), e.tail_patch_queries, run.config.data.seed)
        chosen = queries[drawn].tolist()
        pairs = [(q, int(p)) for r in rankings.values() for q in chosen for p in r.proponents[q]]
        pairs = [pair for pair in pairs if pair[1] >= 0] + [(q, CONTROL) for q in chosen]
        return cls(measures.tail_patches(run, pairs), chosen, measures.step_rule(run))

    def changes(self, proponents_QxK: np.ndarray) -> np.ndarray:
        """Returns log p before and after, float64 [Q, K, 2]; NaN where not measured."""
        out = np.full((*proponents_QxK.shape, 2), np.nan)
        for q in self.queries:
            for i, p in enumerate(proponents_QxK[q].tolist()):
                if p >= 0:
                    out[q, i] = self.log_p[q, p]
        return out

    def control(self, queries: np.ndarray) -> np.ndarray:
        """Returns the same for a step with a zero gradient, float64 [queries, 2].

        With its restored state Adam moves even then, by momentum.
        """
        absent = (np.nan, np.nan)
        log_p = [self.log_p.get((int(q), CONTROL), absent) for q in queries]
        return np.array(log_p).reshape(-1, 2)


def _judge(run: Run, rankings: dict[str, Ranked], queries: np.ndarray) -> _Verdicts | None:
    """Returns verdicts on the proponents of all methods; None without a judge."""
    judge = judging.make_judge(run.config)
    if judge is None:
        return None
    proponents = ((int(q), r.proponents[q]) for r in rankings.values() for q in queries)
    pairs = ((q, int(p)) for q, rows in proponents for p in rows if p >= 0)
    return judging.judge_passages(run, judge, pairs)


def _values(run: Run, ranked, known: Known, patches: _Patches, verdicts, queries) -> dict:
    """Returns a method's metrics, a number for each query."""
    values = summary.rank_values({label: r[queries] for label, r in ranked.first_ranks.items()})
    is_known = known.ranks[queries] <= run.config.eval.known_rank
    values |= summary.restricted(values, is_known)
    if patches.queries:
        steps_QxKx2 = patches.changes(ranked.proponents)[queries]
        # The change, and the change less that of a step with a zero gradient.
        values |= summary.patch_values(steps_QxKx2, patches.control(queries))
    if verdicts is not None:
        entails_QxK = [
            [
                p >= 0 and verdicts[int(q), int(p)].score > run.config.judge.threshold
                for p in ranked.proponents[q]
            ]
            for q in queries
        ]
        values |= summary.judged_values(np.array(entails_QxK))
    return values


def _metrics(run: Run, known: Known, patches: _Patches, values: dict, queries) -> dict:
    corpus, e = run.corpus, run.config.eval
    bootstrap = dict(resamples=e.resamples, seed=e.seed)
    relations = sorted({corpus.queries[q].relation for q in queries})
    number = {name: i for i, name in enumerate(relations)}
    of_relation = np.array([number[corpus.queries[q].relation] for q in queries], np.int64)
    stated = (~known.stated(queries)).astype(np.int64)
    intervals = summary.intervals(values, **bootstrap)
    groups = {}
    if relations != [""]:  # prompts and targets alone have none
        groups["by_relation"] = summary.grouped(values, of_relation, relations, **bootstrap)
    if corpus.has_labels:
        by_bucket = known.bucket[queries], known.buckets
        groups["by_frequency"] = summary.grouped(values, *by_bucket, **bootstrap)
    groups["by_stated"] = summary.grouped(
        values, stated, ["stated", "not stated"], **bootstrap, differences=True
    )
    if known.priors:
        groups["by_prior"] = summary.grouped(
            values, known.knowledge, summary.KNOWLEDGE, **bootstrap
        )
    differences = summary.compared(values, **bootstrap)
    control = patches.control(queries)
    shared = {
        "n_queries": int(len(queries)),
        "n_known": int(np.sum(known.ranks[queries] <= e.known_rank)),
        "n_stated": int(np.sum(stated == 0)),
        "n_tail_patch_queries": len(patches.queries),
        "tail_patch_control": summary.number(ranking.mean(change(control))),
        "tail_patch_log_control": summary.number(ranking.mean(log_change(control))),
        "tail_patch_rule": patches.rule,
        "confidence": summary.number(ranking.mean(list(known.confidence.values()))),
        "n_with_choices": len(known.choices),
        "chosen": summary.number(known.chosen),
    }
    if run.config.judge.name:
        shared["judge"] = dict(run.config.judge)
    if not corpus.has_labels:
        shared["has_labels"] = False
    always = [m for m in _ALWAYS if corpus.has_labels or m.startswith("tail_patch")]
    return {
        name: dict.fromkeys(always)
        | summary.as_json(intervals[name])
        | shared
        | {key: by_method[name] for key, by_method in groups.items()}
        | {"differences": differences[name]}
        for name in values
    }


def _contents(run: Run, queries: np.ndarray) -> content.Content:
    """Returns the object that classifies passages by their labels and a query's."""
    corpus = run.corpus
    sentences = {s.sentence_id: s for s in corpus.sentences}
    return content.Content(
        [corpus.queries[q] for q in queries],
        [corpus.correct["all"][q] for q in queries],
        corpus.text_of,
        lambda row: sentences[corpus.passages.documents[row]].fact_triples,
    )


def _judged_kinds(verdicts: _Verdicts, proponents_QxK: np.ndarray, queries) -> np.ndarray:
    """Returns what proponents say, by the judge, as indices into `kinds.KINDS`; −1 for none."""
    rows = zip(queries.tolist(), proponents_QxK.tolist(), strict=True)
    return np.array(
        [[kinds.KINDS.index(verdicts[q, p].kind) if p >= 0 else -1 for p in ps] for q, ps in rows]
    )


def _query_set(data) -> str:
    """Returns the name of the queries: that of their file, of facts "jsonl", or the data set's."""
    if data.corpus and data.queries:
        return pathlib.Path(data.queries).name.split(".")[0]
    return "jsonl" if data.sentences or data.corpus else data.name


def _record(run: Run, ranked: Ranked, known: Known, patches: _Patches, verdicts, q: int) -> dict:
    """Returns the record of a query in the results of a method."""
    config, corpus = run.config, run.corpus
    fact = corpus.queries[q]

    def passages(rows, scores):
        return [
            (corpus.passages.ids[r], corpus.text_of(r), s)
            for r, s in zip(rows, scores, strict=True)
            if r >= 0
        ]

    # Fields that only some queries or methods have.
    more: dict = {}
    if q in known.priors:
        more["target_prior_nats"] = known.priors[q]
    if q in known.choices:
        more["other_choice_nats"] = known.choices[q]
    if q in known.generations:
        # The names of the release's format, also for models of other sizes than 8B.
        more["8b_generations"] = known.generations[q]
        more["8b_confidence"] = known.confidence[q]
    for label, ranks in ranked.first_ranks.items():
        more["first_correct_rank" if label == "all" else f"first_{label}_rank"] = int(ranks[q])
    proponents = [int(p) for p in ranked.proponents[q] if p >= 0]
    judged, counted = {}, {}
    if known.frequencies is not None:
        correct = set(corpus.correct["all"][q].tolist())
        judged = {
            "proponent_correct": [p in correct for p in proponents],
            "has_trex_sentence": bool(correct),
        }
        counted = {
            "c4_frequency": int(known.frequencies[q]),
            "c4_frequency_bucket": known.buckets[known.bucket[q]],
        }
    if q in patches.queries:
        log_p = [patches.log_p[q, p] for p in proponents]
        more["proponent_tail_patch"] = change(np.reshape(log_p, (-1, 2))).tolist()
    if verdicts is not None:
        more["proponent_ais_scores"] = [verdicts[q, p].score for p in proponents]
        more["proponent_ais_best_windows"] = [verdicts[q, p].window for p in proponents]
        more["proponent_kinds"] = [verdicts[q, p].kind for p in proponents]
    return results.record(
        fact.fact_id,
        _query_set(config.data),
        fact.prompt(config.data.prompt),
        fact.entity1,
        passages(ranked.proponents[q], ranked.proponent_scores[q]),
        passages(ranked.opponents[q], ranked.opponent_scores[q]),
        fact_id=fact.fact_id,
        relation=fact.relation,
        groundtruth=fact.entity1,
        **judged,
        is_8b_correct=bool(known.ranks[q] == 1),
        **counted,
        target_nats=float(known.nats[q]),
        target_rank=int(known.ranks[q]),
        **more,
    )
