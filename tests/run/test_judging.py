"""Verdicts of a judge on passages of a run: the best window, and what is kept of them."""

import json

import numpy as np
import pytest

from tda.evaluation import judges
from tda.run import corpus, judging, stages
from tda.run.run import Run
from tda.run.workdir import Workdir
from tests.experiments.test_trace import make_config, without_labels, write

TEXT = "It rains. Oslo is in Norway. Bergen is not. The capital of Norway is Oslo. It rains again."


class Recorder(judges.Judge):
    """The lexical judge, which notes what it is asked."""

    identity = "recorder"

    def __init__(self):
        self.asked = []

    def score(self, pairs):
        self.asked += [premise for premise, _ in pairs]
        return judges.Lexical().score(pairs)


@pytest.fixture
def run(tmp_path):
    config = without_labels(make_config(tmp_path), tmp_path)
    config.data.corpus = write(tmp_path / "d.jsonl", [{"text": TEXT}, {"text": "Oslo."}])
    config.judge.name, config.judge.sentences = "lexical", 2
    workdir = Workdir(tmp_path / "w")
    return Run(config, workdir, corpus.load(config, workdir), None)


def test_a_passage_has_the_score_of_its_best_window(run):
    norway = [f.fact_id for f in run.corpus.queries].index("f1")
    verdicts = judging.judge_passages(run, judges.Lexical(), [(norway, 0), (norway, 1)])
    assert verdicts[norway, 0] == judging.Verdict(
        1.0, "Bergen is not. The capital of Norway is Oslo.", "states"
    )
    assert verdicts[norway, 1].window == "Oslo." and verdicts[norway, 1].score == 0
    run.config.judge.sentences = 0
    assert judging.judge_passages(run, judges.Lexical(), [(norway, 0)])[norway, 0].window == TEXT


@pytest.mark.parametrize("score", [np.nan, 3.5, -0.5])
def test_a_score_that_is_no_share_is_refused_and_not_kept(run, monkeypatch, score):
    """Guards: NaN as the best window of all, and logits taken for probabilities."""
    judge = Recorder()
    monkeypatch.setattr(judge, "score", lambda pairs: np.full(len(pairs), score, np.float32))
    with pytest.raises(ValueError, match=rf"recorder gave {score} to .*from 0 to 1"):
        judging.judge_passages(run, judge, [(0, 0)])
    assert not [line for f in run.workdir.path.glob("judge-*.jsonl") for line in f.open()]


def test_a_window_is_judged_once_and_a_kill_loses_little(run, monkeypatch):
    monkeypatch.setattr(judging, "_TOGETHER", 3)
    judge, pairs = Recorder(), [(q, p) for q in range(4) for p in range(2)]
    monkeypatch.setattr(judge, "score", lambda group, score=judge.score: dying(judge, group, score))
    with pytest.raises(KeyboardInterrupt):
        judging.judge_passages(run, judge, pairs)
    monkeypatch.undo()
    (path,) = run.workdir.path.glob("judge-*.jsonl")
    scored = [json.loads(line)["key"] for line in path.read_text().splitlines()]
    assert len(scored) == len(judge.asked) == 6
    again = Recorder()
    verdicts = judging.judge_passages(run, again, pairs)
    # Four windows of the one passage and one of the other, for each of four queries.
    assert len(again.asked) == 4 * 5 - 6 and len(verdicts) == 8
    judging.judge_passages(run, again, pairs)
    assert len(again.asked) == 4 * 5 - 6
    fresh = {}
    for pair in pairs:
        texts = [
            run.corpus.text_of(pair[1])[w] for w in judging.windows(run.corpus.text_of(pair[1]), 2)
        ]
        claim = judging.claims_of(run, [pair[0]])[pair[0]]
        fresh[pair] = max(judges.Lexical().score([(t, claim) for t in texts]))
    assert {pair: np.float32(v.score) for pair, v in verdicts.items()} == fresh


def dying(judge, group, score):
    """Scores two groups, and is killed in the third."""
    if len(judge.asked) == 6:
        raise KeyboardInterrupt
    return score(group)


def test_claims_have_the_names_of_their_facts(tmp_path):
    config = make_config(tmp_path)
    workdir = Workdir(tmp_path / "w")
    run = Run(config, workdir, corpus.load(config, workdir), None)
    norway = [f.fact_id for f in run.corpus.queries].index("f1")
    claim = judging.claims_of(run, [norway])[norway]
    assert claim.text == "The capital of Norway is Oslo"
    assert claim.subject == ("Norway",) and claim.target == ("Oslo",)


def test_a_judge_that_cannot_be_had_is_refused_before_all_work(run):
    run.config.judge.name = "nobody"
    with pytest.raises(ValueError, match="unknown judge.name='nobody'"):
        stages.check(run.config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval.top_k": 5}, "eval.top_k=5: a judge's recall@10"),
        ({"judge.threshold": 1.0}, "judge.threshold=1.0: no score is above it"),
    ],
)
def test_a_judges_figures_are_what_their_names_say(run, changes, message):
    """Mistake: recall@10 of five proponents, and a bound that nothing passes."""
    run.config.update_from_flattened_dict(changes)
    with pytest.raises(ValueError, match=message):
        stages.check(run.config)


def test_the_check_and_the_reading_share_one_judge(run, monkeypatch):
    """A judge's model may take minutes to load, and be as large as the run's own."""
    made = []

    def make(settings):
        made.append(settings)
        return judges.Lexical()

    monkeypatch.setitem(judges.JUDGES, "heavy", make)
    run.config.judge.name = "heavy"
    stages.check(run.config)
    judge = judging.make_judge(run.config)
    assert len(made) == 1
    run.config.judge.batch += 1
    assert judging.make_judge(run.config) is not judge and len(made) == 2
