"""Passages that a judge reads for each query, in windows of sentences; scores are kept on disk."""

import dataclasses
import functools
from collections.abc import Iterable

import numpy as np

from tda.evaluation import judges, kinds
from tda.evaluation.judge import Claim, Judge, JudgeSettings, windows
from tda.evaluation.summary import CUT
from tda.run.result_log import ResultLog
from tda.run.run import Run
from tda.runtime import processes, progress
from tda.runtime.fingerprint import fingerprint, fingerprint_parts

# Pairs whose scores are written together, and lost by a kill.
_TOGETHER = 1024
# A probability of float32 may be so much above 1.
_ROUNDING = 1e-5


@dataclasses.dataclass(frozen=True)
class Verdict:
    """A judge's score of a passage for a query, that of the best window."""

    score: float
    window: str  # the window's text
    kind: str  # what the passage says, a key of `tda.viewer.notes.TYPES`


def make_judge(config) -> Judge | None:
    """Returns the judge that a config names; None if it names none.

    Raises:
        ValueError: there is no such judge, it lacks an extra or a model, or its figures would not
            be what their names say.
    """
    j, top_k = config.judge, config.eval.top_k
    if not j.name:
        return None
    if top_k < CUT:
        raise ValueError(
            f"eval.top_k={top_k}: a judge's recall@{CUT} and precision@{CUT} are of {CUT} "
            f"proponents; use eval.top_k={CUT} or more"
        )
    if j.threshold >= 1:
        raise ValueError(
            f"judge.threshold={j.threshold}: no score is above it; give less than 1, such as 0.5"
        )
    return _make(j.name, judges.JUDGES.get(j.name), JudgeSettings(j.model, j.batch, j.tokens))


# The check before a run and the judging after it share one judge: its model is loaded once.
# `factory` is part of the key, since a plugin may register another under the same name.
@functools.lru_cache(1)
def _make(name: str, factory, settings: JudgeSettings) -> Judge:
    return judges.make(name, settings)


def claims_of(run: Run, queries: Iterable[int]) -> dict[int, Claim]:
    """Returns, by query row, the claim that a passage must entail to state the query's fact."""
    claims, texts = {}, run.query_texts
    for q in queries:
        fact = run.corpus.queries[q]
        subject = tuple(n for n in (fact.entity0, *fact.entity0_alias) if n.strip())
        prompt = fact.prompt(run.config.data.prompt)
        claims[q] = Claim(texts[q], prompt, tuple(run.corpus.answers(q)), subject)
    return claims


def judge_passages(
    run: Run, judge: Judge, pairs: Iterable[tuple[int, int]]
) -> dict[tuple[int, int], Verdict]:
    """Returns the verdict on every pair of a query row and a passage row.

    A pair of a window and a claim that this judge has scored before, for any method, is read.
    """
    pairs = sorted(set(pairs))
    log = ResultLog(run.workdir / f"judge-{fingerprint([judge.identity])}.jsonl")
    claims = claims_of(run, {q for q, _ in pairs})
    texts = {p: run.corpus.text_of(p) for p in {p for _, p in pairs}}
    spans = {p: windows(text, run.config.judge.sentences) for p, text in texts.items()}
    names = {q: fingerprint(dataclasses.asdict(claim)) for q, claim in claims.items()}
    windows_of = {
        (q, p): {texts[p][s]: fingerprint_parts([names[q], texts[p][s]]) for s in spans[p]}
        for q, p in pairs
    }
    with run.engine.alone():
        scores = log.read()
        todo = {
            key: (text, claims[q])
            for (q, _), keys in windows_of.items()
            for text, key in keys.items()
            if key not in scores
        }
        processes.on_first_process("judge passages", lambda: _score(judge, todo, log))
        if todo:
            scores = log.read()
    verdicts = {}
    for pair, keys in windows_of.items():
        best = max(keys, key=lambda text: scores[keys[text]])  # of equal ones the first
        score, (q, p) = scores[keys[best]], pair
        kind = kinds.kind_of(texts[p], claims[q], score > run.config.judge.threshold)
        verdicts[pair] = Verdict(score, best, kind)
    return verdicts


def _score(judge: Judge, todo: dict[str, tuple[str, Claim]], log: ResultLog) -> None:
    """Scores windows, and adds them to the log group by group.

    Raises:
        ValueError: a score is no number from 0 to 1.
    """
    keys = list(todo)
    with progress.bar(len(keys), "judge", "window", saves_work=True) as bar:
        for first in range(0, len(keys), _TOGETHER):
            group = keys[first : first + _TOGETHER]
            scores = np.asarray(judge.score([todo[key] for key in group]))
            # Not saved. A window whose score is NaN would be the best one: none is above it.
            wrong = np.flatnonzero(~((scores >= 0) & (scores <= 1 + _ROUNDING)))
            if len(wrong):
                raise ValueError(
                    f"judge {judge.identity} gave {scores[wrong[0]]} to the window "
                    f"{todo[group[wrong[0]]][0][:80]!r}; a score is a number from 0 to 1"
                )
            log.add(zip(group, map(float, scores), strict=True))
            bar.update(len(group))
            processes.check_preemption()
