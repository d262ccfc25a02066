"""The methods of the second stage in a run and in live questions, against whole gradients."""

import dataclasses

import jax
import numpy as np
import pytest

from tda.data.batches import BatchLayout, draw
from tda.data.rows import Question
from tda.gradients import reference, second_stage
from tda.gradients.moments import second_moments
from tda.live.finished_run import LiveRun
from tda.run import idle_keys, remembered, retrieve, stages
from tda.run import train as training
from tda.run.workdir import Workdir
from tests.experiments.test_trace import make_config
from tests.gradients.test_pair_products import balance, whitener
from tests.run.test_retrieve import changed, scores_of, unit

pytestmark = pytest.mark.slow  # a run of its own, and many encoders

NAMES = "trackstar,rerank_exp3,rerank_exp5,rerank_trackstar"
WEIGHT = 0.6


@pytest.fixture(scope="module")
def traced(tmp_path_factory, one_device):
    """A finished run that scores five candidates of each of two methods again."""
    path = tmp_path_factory.mktemp("second_stage")
    config = make_config(path)
    config.methods = NAMES
    config.projection.blocks = 1
    # The embedding too, which is the head of this model.
    config.gradients.include = "."
    config.rerank.passages, config.rerank.candidates = 5, "trackstar,bm25"
    config.eval.top_k = 5
    config.hessian.weight = WEIGHT
    workdir = Workdir(path / "w")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "make_mesh", lambda config: one_device)
        calls, score = [], second_stage.PairScorer.score
        patch.setattr(
            second_stage.PairScorer,
            "score",
            lambda self, *args: (calls.append(list(self._metrics)), score(self, *args))[1],
        )
        run = stages.prepare(config, workdir)
        ranked, _ = retrieve.retrieve(run)
        remembered.remember(run)
        yield run, ranked, calls[:]


@pytest.fixture(scope="module")
def complete(traced):
    """The rankings of all passages."""
    return retrieve.retrieve(changed(traced[0], rerank__passages=0, eval__top_k=12))[0]


@pytest.fixture(scope="module")
def gradients(traced):
    """Whole gradients of queries and passages, float64 [N, (L,) M, N] by path."""
    run = traced[0]
    gradient = jax.jit(lambda b: reference.per_example_gradients(run.trained.model, b))

    def of(table):
        longest = int(table.lengths.max())
        layout = BatchLayout((longest,), longest * len(table), run.corpus.tokenizer.pad)
        (batch,) = layout.batches(table)
        whole = gradient(batch.arrays())
        sites = run.sites(retrieve.GradientKind())
        return {s.path: np.asarray(jax.vmap(s.matrix)(whole[s.path]), np.float64) for s in sites}

    return of(run.corpus.prompts), of(run.corpus.passages)


def rows(gradients):
    return np.concatenate([x.reshape(len(x), -1) for x in gradients.values()], axis=1)


def test_scores_of_all_passages_are_those_of_whole_gradients(traced, complete, gradients):
    run = traced[0]
    sites = run.sites(retrieve.GradientKind(corrected=True))
    scales = second_moments.read(run.trained.root, sites, "factored", run.trained.step)
    scaled = [{p: x * np.asarray(scales[p].dense()) for p, x in g.items()} for g in gradients]
    queries, passages = map(unit, map(rows, scaled))
    expected = queries @ passages.T
    np.testing.assert_allclose(scores_of(complete, "rerank_exp3"), expected, rtol=0, atol=1e-5)
    # By hand, with R of all passages, which are fewer than curvature.sample, and of all queries.
    for name, weight in (("rerank_exp5", 0.0), ("rerank_trackstar", WEIGHT)):
        changed_by_r = []
        for g in scaled:
            whitened = {}
            for p, x in g.items():
                is_table = "embedding" in p
                how = dict(queries=scaled[0][p], weight=weight)
                whitened[p] = whitener(lambda G: G, scaled[1][p], is_table, **how)(x)
            changed_by_r.append(whitened)
        changed_by_r = balance(changed_by_r, lambda path: "embedding" in path)
        queries, passages = map(unit, map(rows, changed_by_r))
        # R of twelve passages is damped in most directions, which magnifies rounding.
        got = scores_of(complete, name)
        np.testing.assert_allclose(got, queries @ passages.T, rtol=0, atol=1e-3)


def test_lambda_is_that_of_the_rule_and_noted(traced):
    run = traced[0]
    _, notes = retrieve.retrieve(changed(run, methods="rerank_trackstar", hessian__component=3))
    assert notes["rerank_trackstar"]["lambda"] == WEIGHT
    by_rule = changed(run, methods="rerank_trackstar", hessian__component=3, hessian__weight=-1.0)
    _, notes = retrieve.retrieve(by_rule)
    assert (
        0 < notes["rerank_trackstar"]["lambda"] < 1 and notes["rerank_trackstar"]["component"] == 3
    )


def test_candidates_have_the_scores_that_they_have_among_all(traced, complete):
    run, ranked, _ = traced
    first = [ranked["trackstar"].proponents]
    first.append(retrieve.retrieve(changed(run, methods="bm25"))[0]["bm25"].proponents)
    for name in NAMES.split(",")[1:]:
        scores = scores_of(complete, name)
        for q in range(4):
            candidates = np.unique(np.concatenate([x[q] for x in first]))
            candidates = candidates[candidates >= 0]
            best = candidates[np.lexsort((candidates, -scores[q, candidates]))][:5]
            assert ranked[name].proponents[q].tolist() == best.tolist()
            np.testing.assert_allclose(
                ranked[name].proponent_scores[q], scores[q, best], rtol=1e-3, atol=1e-5
            )


def test_candidates_of_queries_that_are_not_evaluated_are_not_scored(traced, monkeypatch):
    """And a later run that evaluates all of them scores all."""
    run, ranked, _ = traced
    scored, score = [], second_stage.PairScorer.score
    monkeypatch.setattr(
        second_stage.PairScorer,
        "score",
        lambda self, *args: (scored.append(np.unique(args[2].queries)), score(self, *args))[1],
    )
    few = retrieve.retrieve(changed(run, eval__queries=2))[0]
    (evaluated,) = scored
    assert evaluated.tolist() == draw(4, 2, run.config.data.seed).tolist()
    for name in NAMES.split(",")[1:]:
        of_evaluated = few[name].proponents[evaluated]
        np.testing.assert_array_equal(of_evaluated, ranked[name].proponents[evaluated])
        others = np.setdiff1d(np.arange(4), evaluated)
        assert (few[name].proponents[others] == -1).all()
    again = retrieve.retrieve(run)[0]
    assert len(scored) == 1 and (again["rerank_exp3"].proponents >= 0).any(axis=1).all()


def test_a_live_question_has_the_runs_answer(traced):
    run, ranked, _ = traced
    live = LiveRun(run.workdir.path)
    live._open(lambda *_: None)
    number = 2
    fact = run.corpus.queries[number]
    methods = {n: retrieve.methods.METHODS[n] for n in NAMES.split(",")[1:]}
    query = Question("", fact.prompt(run.config.data.prompt), fact.entity1)
    records = live.records(query, methods, 5, lambda *_: None)
    for name, record in records.items():
        ids = [run.corpus.passages.ids[r] for r in ranked[name].proponents[number]]
        assert record["proponent_ids"] == ids
    described = {m["name"]: m["lacks"] for m in live.describe(lambda *_: None)["methods"]}
    assert described["rerank_cos"] is None and "not run" in described["rerank_exp4"]


def test_every_pair_is_scored_once_for_all_methods(traced):
    assert traced[2] == [NAMES.split(",")[1:]]


def test_what_does_not_fit_is_refused(traced):
    run = traced[0]
    for keys, message in (
        (dict(rerank__passages=3), "rerank.passages=3 is below eval.top_k=5"),
        (dict(rerank__candidates="trackstar,rerank_cos"), "rerank_cos score the candidates"),
        (dict(gradients__correction="adam"), "exact Adam correction"),
        (dict(rerank__candidates="trackstars"), "unknown method 'trackstars'"),
        (dict(hessian__evaluation="disjoint"), "R_eval without projection is of all queries"),
    ):
        config = changed(run, **keys).config
        with pytest.raises(ValueError, match=message):
            retrieve.check(config, retrieve.methods.parse(NAMES))
    apart = dataclasses.replace(retrieve.methods.METHODS["rerank_cos"], query_output="logit")
    with pytest.raises(ValueError, match="one function of passages and queries"):
        retrieve.check(run.config, {"apart": apart})
    with pytest.raises(ValueError, match="scale.*multiply their input by a matrix"):
        retrieve.check_run(changed(run, gradients__untapped="reference"))


def test_keys_without_effect_are_told(traced):
    run = traced[0]
    without = changed(run, methods="trackstar").config
    assert "no method is of the second stage" in idle_keys.describe(without, ["rerank.passages"])[0]
    every = changed(run, rerank__passages=0).config
    assert "rerank.passages is 0" in idle_keys.describe(every, ["rerank.candidates"])[0]
    keys = ["rerank.passages", "rerank.candidates", "projection.side", "curvature.sample"]
    assert not idle_keys.describe(changed(run, methods="rerank_exp4").config, keys)


def test_words_and_gradients_together(traced, complete):
    run, ranked, _ = traced
    joined, _ = retrieve.retrieve(changed(run, methods="rerank_bm25,rrf,bm25"))
    scores = scores_of(complete, "rerank_trackstar")
    for q in range(4):
        words, gradients = (
            [row for row in x.proponents[q].tolist() if row >= 0]
            for x in (joined["bm25"], ranked["trackstar"])
        )
        assert joined["rerank_bm25"].proponents[q].tolist() == sorted(
            words, key=lambda row, q=q: (-scores[q, row], row)
        )
        matching = words[: int((joined["bm25"].proponent_scores[q] > 0).sum())]
        ranks = {row: 0.0 for row in sorted({*matching, *gradients})}
        for rows in (matching, gradients):
            for i, row in enumerate(rows):
                ranks[row] += 1 / (61 + i)
        best = sorted(ranks, key=lambda row: -ranks[row])[:5]
        assert joined["rrf"].proponents[q].tolist() == best
    # Candidates of the others do not count.
    together, _ = retrieve.retrieve(changed(run, methods="rerank_bm25,rerank_exp5"))
    np.testing.assert_array_equal(
        together["rerank_exp5"].proponents, ranked["rerank_exp5"].proponents
    )
    live = LiveRun(run.workdir.path)
    fact = run.corpus.queries[1]
    chosen = {n: retrieve.methods.METHODS[n] for n in ("rerank_bm25", "rrf")}
    query = Question("", fact.prompt0, fact.entity1)
    records = live.records(query, chosen, 5, lambda *_: None)
    for name, record in records.items():
        rows = joined[name].proponents[1]
        assert record["proponent_ids"] == [run.corpus.passages.ids[r] for r in rows]
