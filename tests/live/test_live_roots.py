"""R of one question, through the retriever that answers it, against R made by hand."""

import types

import numpy as np
import pytest

from tda.methods import METHODS, GradientKind
from tda.retrieval.hessian_settings import HessianSettings
from tda.retrieval.sources import InMemory
from tda.run.gradient_retrievers import Gradients
from tda.run.retrievers import Queries
from tests.retrieval import test_query_whitening as by_hand
from tests.retrieval.test_query_whitening import LAMBDA, SLICES, D, N, cosines, data, inverses

__all__ = ["data"]  # a fixture
CORRECTED = GradientKind(corrected=True)
# Of a question that is none of the run's queries.
OTHER_E = by_hand.gradients(1, 9)[0].astype(np.float64)


def ask(data, folder, number, k=40, on_progress=lambda *report: None, **settings):
    """Scores of all passages for the run's query of this number, or for another question."""
    passages, queries = (x.astype(np.float32) for x in data)
    run = types.SimpleNamespace(
        live=True,
        hessian=HessianSettings(**settings),
        workdir=folder,
        search_mesh=None,
        block_shapes=lambda kind: None,
        store_path=lambda name, kind: folder / "stores" / name,
        config=types.SimpleNamespace(search=types.SimpleNamespace(index="none")),
        corpus=types.SimpleNamespace(layout=lambda tokens: None),
    )
    retriever = Gradients(run)
    encodings = retriever.encodings
    encodings._passages[CORRECTED] = InMemory(passages, SLICES)
    encodings._queries[CORRECTED] = queries
    if number is None:
        encodings.of_queries = lambda *arguments: OTHER_E[None].astype(np.float32)
    question = Queries([None], ["a question"], [number], {})
    methods = {"trackstar": METHODS["trackstar"]}
    ranked = retriever.search(question, methods, k, on_progress)["trackstar"].ranked
    scores = np.empty(len(passages))
    scores[ranked.proponents[0]] = ranked.proponent_scores[0]
    return scores


@pytest.mark.parametrize("number", [0, 5, None])
def test_a_question_is_whitened_by_the_inverse_made_by_hand(data, tmp_path, number):
    p, q = data
    settings = dict(weight=LAMBDA, damping=D, evaluation="leave_one_out")
    scores = ask(data, tmp_path, number, **settings)
    query_E = OTHER_E if number is None else q[number]
    blocks = inverses(p, q) if number is None else inverses(p, q, q[number], N)
    np.testing.assert_allclose(scores, cosines(p, query_E, blocks), rtol=1e-3, atol=1e-4)
    # The next session reads this R, and scores by it as before.
    reports = []
    again = ask(data, tmp_path, number, on_progress=lambda *r: reports.append(r[0]), **settings)
    assert "reading R" in reports and "decomposing R" not in reports
    np.testing.assert_array_equal(again, scores)


def test_a_live_root_is_shrunk_and_cut_off_as_the_config_says(data, tmp_path):
    p, q = data
    for settings in (dict(damping=-1.0), dict(damping=D, cutoff=0.5)):
        rules = dict(weight=LAMBDA, evaluation="all") | settings
        scores = ask(data, tmp_path, 1, **rules)
        roots = by_hand.whitening(data, **rules).scorer(METHODS["trackstar"], 1).roots
        blocks = [np.asarray(r, np.float64).T @ r for r in roots]
        np.testing.assert_allclose(scores, cosines(p, q[1], blocks), rtol=1e-3, atol=1e-4)
        plain = cosines(p, q[1], inverses(p, q))
        assert np.abs(scores - plain).max() > 1e-2


def test_too_few_queries_are_refused_through_one_question(data, tmp_path):
    settings = dict(component=7, evaluation="disjoint", seed=3)
    with pytest.raises(ValueError, match="3 queries.*component 7.*hessian.weight.*exp5"):
        ask(data, tmp_path, 0, **settings)
    # All six queries whiten a question that is none of them.
    assert np.isfinite(ask(data, tmp_path, None, **settings)).all()
