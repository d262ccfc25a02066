"""Which methods find the candidates of others, and what is refused."""

import pytest

from tda import methods
from tda.run import defaults
from tda.run.first_stage import first_methods


def first_of(names, **changes):
    config = defaults.get_config()
    config.update_from_flattened_dict(changes)
    return list(first_methods(config, methods.parse(names)))


def test_methods_have_their_own_candidates_or_those_of_the_config():
    assert first_of("trackstar,bm25") == []
    assert first_of("rerank_cos,bm25") == ["trackstar"]
    assert first_of("rerank_bm25") == ["bm25"]
    assert first_of("rerank_bm25,rerank_cos,rrf", **{"rerank.candidates": "exp4"}) == [
        "bm25",
        "exp4",
        "trackstar",
    ]
    assert first_of("rerank_cos", **{"rerank.passages": 0}) == []


@pytest.mark.parametrize(
    ("names", "changes", "message"),
    [
        (
            "rerank_bm25",
            {"rerank.passages": 0},
            "takes the first passages of bm25, .*rerank.passages=0",
        ),
        ("rrf", {"rerank.passages": 0}, "takes the first passages of bm25,trackstar"),
        ("rrf", {"rerank.passages": 9}, "rerank.passages=9 is below eval.top_k=10"),
        ("rerank_cos", {"rerank.candidates": "rrf"}, "rrf score the candidates of others"),
    ],
)
def test_candidates_that_cannot_be_had_are_refused(names, changes, message):
    with pytest.raises(ValueError, match=message):
        first_of(names, **changes)
