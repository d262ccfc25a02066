"""Which methods find the candidates of others, and what is refused."""

import types

import numpy as np
import pytest

from tda import methods
from tda.retrieval.ranked import Ranked
from tda.run import defaults
from tda.run.first_stage import first_methods
from tda.run.fusion import Fusion
from tda.run.retrievers import Queries, Result, Retriever, Words
from tda.run.run import Run
from tda.store import Passage


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


class Backwards(Retriever):
    """Ranks the last passage first."""

    def search(self, queries, methods, k, on_progress=None):
        rows = np.arange(self.run.corpus.rows)[::-1][None, :k]
        return dict.fromkeys(methods, Result(Ranked.of_proponents(rows, -np.float32(rows))))


def fuse(question, texts):
    """The fusion of BM25 with `Backwards`, by row."""
    corpus = types.SimpleNamespace(
        rows=len(texts),
        withdrawn=np.zeros(0, np.int64),
        read_passages=lambda rows: [Passage(str(i), str(i), texts[i]) for i in rows],
    )
    config = defaults.get_config()
    config.eval.top_k = config.rerank.passages = 4
    run = Run(config, None, corpus, None, live=True)
    fusion = Fusion(run, lambda method: Words if method.retriever == "bm25" else Backwards)
    queries = Queries(None, [question], [None], {})
    (ranked,) = (r.ranked for r in fusion.search(queries, methods.parse("rrf"), 4).values())
    return ranked


def test_passages_without_a_shared_word_have_no_rank_among_words():
    """Guards: BM25's list filled up in the order of rows, each of which would count fully."""
    texts = ["rain", "snow", "wind", "Oslo", "fog", "hail"]
    ranked = fuse("Where is Oslo", texts)
    assert ranked.proponents[0].tolist() == [3, 5, 4, 2]
    expected = [1 / 61 + 1 / 63, 1 / 61, 1 / 62, 1 / 64]
    np.testing.assert_allclose(ranked.proponent_scores[0], expected, rtol=1e-6)
    assert fuse("Where is Rome", texts).proponents[0].tolist() == [5, 4, 3, 2]


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
