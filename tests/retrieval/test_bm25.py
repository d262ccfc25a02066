"""BM25: what it ranks, and against the formula."""

import math

import numpy as np
import pytest

from tda.facts import files, labels
from tda.retrieval import bm25
from tests.facts import trex

TEXTS = ["paris capital france", "berlin capital germany", "paris hotel guide", "oslo ferry"]


def test_ranks_the_passage_that_states_the_fact_first():
    ranking = bm25.Index(TEXTS).search(
        ["capital france paris", "oslo"], 2, {"all": [np.array([0]), np.array([3])]}
    )
    assert ranking.proponents[0, 0] == 0 and ranking.proponents[1, 0] == 3
    np.testing.assert_array_equal(ranking.first_ranks["all"], [1, 1])
    assert ranking.opponents.shape == (2, 0)


def test_scores_are_the_formula():
    """Lucene's variant: idf = ln(1 + (N − n + ½)/(n + ½)), tf / (tf + k1 (1 − b + b |d|/avg))."""
    ranking = bm25.Index(TEXTS).search(["ferry"], 1)
    average = (3 + 3 + 3 + 2) / 4
    idf = math.log(1 + (4 - 1 + 0.5) / (1 + 0.5))
    expected = idf / (1 + 1.5 * (1 - 0.75 + 0.75 * 2 / average))
    assert ranking.proponent_scores[0, 0] == pytest.approx(expected, rel=1e-5)


def test_a_query_of_unknown_words_ranks_nothing_first():
    ranking = bm25.Index(TEXTS).search(["zzz qqq"], 2, {"all": [np.array([0])]})
    assert (ranking.proponent_scores == 0).all()
    assert ranking.first_ranks["all"][0] == 4


def test_withdrawn_passages_have_no_rank_and_leave_the_scores_as_they_are():
    index, correct = bm25.Index(TEXTS), {"all": [np.array([0]), np.array([0, 1])]}
    whole, less = (index.search(["capital france"] * 2, 3, correct, w) for w in ([], [0]))
    assert whole.proponents[0].tolist() == [0, 1, 2] and less.proponents[0].tolist() == [1, 2, 3]
    np.testing.assert_array_equal(less.proponent_scores[:, :2], whole.proponent_scores[:, 1:])
    assert less.first_ranks["all"].tolist() == [0, 1]


def test_a_corpus_without_words_is_an_error():
    with pytest.raises(ValueError, match="no passage has a word"):
        bm25.Index(["!", "?"])


@pytest.mark.slow
@trex.needed
def test_equals_a_second_implementation_on_a_thousand_queries():
    """`rank_bm25` (BM25Okapi) with Lucene's idf has the same scores, but for a constant k1 + 1.

    With its own idf, which is negative for words in more than half of the passages and then made
    a quarter of the mean, the first passage is the same for nearly all queries.
    """
    rank_bm25 = pytest.importorskip("rank_bm25")
    import bm25s

    sentences = list(files.iter_sentences(trex.SENTENCES))
    facts = list(files.iter_facts(trex.FACTS))
    facts = labels.clean_pool(facts, sentences)
    sentences, facts = labels.select(sentences, facts, 10_000, 1000, seed=0)
    texts, queries = [s.text for s in sentences], [f"{f.prompt0} {f.entity1}" for f in facts]
    assert len(queries) == 1000

    class Lucene(rank_bm25.BM25Okapi):
        def _calc_idf(self, nd):
            for word, n in nd.items():
                self.idf[word] = math.log(1 + (self.corpus_size - n + 0.5) / (n + 0.5))

    def words(x):
        return bm25s.tokenize(x, stopwords="en", return_ids=False, show_progress=False)

    corpus = words(texts)
    lucene, okapi = Lucene(corpus), rank_bm25.BM25Okapi(corpus)
    ranking = bm25.Index(texts).search(queries, 10)
    same_first = 0
    for q, query in enumerate(words(queries)):
        scores = lucene.get_scores(query) / 2.5
        np.testing.assert_allclose(
            ranking.proponent_scores[q], np.sort(scores)[::-1][:10], rtol=1e-4, atol=1e-5
        )
        np.testing.assert_allclose(
            scores[ranking.proponents[q]], ranking.proponent_scores[q], rtol=1e-4, atol=1e-5
        )
        same_first += okapi.get_scores(query).argmax() == ranking.proponents[q, 0]
    assert same_first >= 970
