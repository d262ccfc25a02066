"""The stage that measures what the methods retrieved, and writes results and metrics."""

import json
import os

import numpy as np

from experiments.corpus import Corpus
from experiments.training import Trained, make_optimizer, restore_state
from experiments.workdir import Workdir, fingerprint, write_json
from tda import processes, results
from tda.evaluation import knowledge, ranking
from tda.evaluation.tail_patch import tail_patch
from tda.retrieval.ranked import Ranked


def sample(count: int, wanted: int, seed: int) -> np.ndarray:
    """A fixed sample of `wanted` of `count` queries (all where 0), in order."""
    if not wanted or wanted >= count:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).permutation(count)[:wanted])


def run(
    config, corpus: Corpus, trained: Trained, ranked: dict[str, Ranked], workdir: Workdir
) -> dict:
    """Metrics by method; writes `results/METHOD.jsonl` and `metrics.json`.

    Of several processes all compute, since the model may be spread over them; the first writes.
    """
    layout = dict(bucket_lengths=corpus.buckets, pad=corpus.tokenizer.pad)
    known = knowledge.target_statistics(
        trained.model, corpus.prompts, tokens_per_batch=config.gradients.tokens_per_batch, **layout
    )
    asked = sample(len(corpus.queries), config.eval.queries, config.data.seed)
    knows = known["rank"][asked] <= config.eval.known_rank
    print(
        f"the model ranks the target first for {np.mean(known['rank'][asked] == 1):.1%} of the "
        f"queries, in the top {config.eval.known_rank} for {knows.mean():.1%}; "
        f"median −log p {np.median(known['nats'][asked]):.2f} nats"
    )
    patched, control, patch_queries = _tail_patches(config, corpus, trained, ranked, workdir, asked)
    metrics = {}
    for name, found in ranked.items():
        m = {"n_queries": int(len(asked)), "n_known": int(knows.sum())}
        for label, suffix in (("all", ""), ("strict", "_strict")):
            ranks = found.first_ranks[label][asked]
            for part, some in (("", ranks), ("_known", ranks[knows])):
                m[f"mrr{suffix}{part}"] = ranking.mean_reciprocal_rank(some)
                m[f"recall_at_10{suffix}{part}"] = ranking.recall_at(some, 10)
        pairs = [(q, p) for q in patch_queries for p in found.proponents[q]]
        m["tail_patch"] = float(np.mean([patched[p] for p in pairs])) if pairs else None
        m["tail_patch_control"] = float(np.mean(control)) if len(control) else None
        m["n_tail_patch_queries"] = len(patch_queries)
        metrics[name] = m

    def write():
        (workdir / "results").mkdir(exist_ok=True)
        for name, found in ranked.items():
            records = [_record(config, corpus, found, known, int(q)) for q in asked]
            results.write(workdir / "results" / f"{name}.jsonl", records)
        write_json(workdir / "metrics.json", metrics)

    processes.by_first("write results", write)
    return metrics


def _tail_patches(config, corpus, trained, ranked, workdir, asked):
    e = config.eval
    if not e.tail_patch_queries:
        return {}, [], []
    chosen = [int(q) for q in asked[sample(len(asked), e.tail_patch_queries, config.data.seed)]]
    # A pair is computed once, whichever methods retrieved it, and kept for the next run.
    pairs = sorted({(q, int(p)) for f in ranked.values() for q in chosen for p in f.proponents[q]})
    pairs += [(q, -1) for q in chosen]
    made_from = {"model": trained.fingerprint, "rate": e.tail_patch_learning_rate}
    path = workdir / f"tail_patch-{fingerprint([made_from, corpus.fingerprint])}.jsonl"
    have = {(q, p): x for q, p, x in processes.by_first("read", lambda: _read_patches(path))}
    todo = [p for p in pairs if p not in have]
    if todo:
        model_fn, state = restore_state(trained)
        tx = make_optimizer(config, trained.step, e.tail_patch_learning_rate)
        with open(path if processes.is_first() else os.devnull, "a", encoding="utf-8") as out:

            def keep(which, change):
                for i, x in zip(which, change, strict=True):
                    query, passage = todo[i]
                    have[query, passage] = float(x)
                    line = {"query": query, "passage": passage, "change": float(x)}
                    out.write(json.dumps(line) + "\n")
                out.flush()

            tail_patch(
                model_fn,
                state,
                tx,
                corpus.passages,
                corpus.prompts,
                todo,
                bucket_lengths=corpus.buckets,
                pad=corpus.tokenizer.pad,
                on_done=keep,
            )
    return have, [have[q, -1] for q in chosen], chosen


def _read_patches(path) -> list[tuple[int, int, float]]:
    """What an earlier run computed, (query, passage, change); a line torn by a kill is cut off."""
    have: list[tuple[int, int, float]] = []
    if not path.exists():
        return have
    whole = 0
    with open(path, "rb") as lines:
        for line in lines:
            if not line.endswith(b"\n"):
                break
            item = json.loads(line)
            have.append((item["query"], item["passage"], item["change"]))
            whole += len(line)
    if whole < path.stat().st_size:
        with open(path, "r+b") as out:
            out.truncate(whole)
    return have


def _record(config, corpus: Corpus, found: Ranked, known: dict, q: int) -> dict:
    fact = corpus.queries[q]
    correct = set(corpus.correct["all"][q].tolist())

    def passages(rows, scores):
        return [
            (corpus.passages.ids[r], corpus.text_of(r), s)
            for r, s in zip(rows, scores, strict=True)
        ]

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
        proponent_correct=[int(r) in correct for r in found.proponents[q]],
        target_nats=float(known["nats"][q]),
        target_rank=int(known["rank"][q]),
    )
