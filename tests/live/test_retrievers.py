"""Retrievers without gradients, and how a question is known to be one of the run's."""

import numpy as np
import pytest

from tda.live.questions import Question
from tda.live.retrievers import Control, Labels, Vectors, Words, random_scores
from tda.methods import METHODS
from tda.retrieval import bm25, by_score
from tda.run.remembered import Known
from tda.store import Passage

TEXTS = ["Oslo is the capital.", "It rains in Oslo.", "Rome fell.", "Oslo, Oslo, Oslo!"]


class Passages:
    """A corpus, of which a passage may be withdrawn."""

    rows = len(TEXTS)

    def __init__(self, *withdrawn):
        self.withdrawn = np.asarray(withdrawn, np.int64)

    def read_passages(self, numbers):
        return [Passage(f"d{i}", f"d{i}", TEXTS[i]) for i in numbers]


def silent(what, done, total):
    pass


def ask(retriever, name, number=None, k=10):
    question = Question("Where is", "Oslo", None, number)
    found = retriever.search(METHODS[name], question, k, silent)
    return found.proponents[0].tolist(), found.proponent_scores[0]


def test_words_score_as_without_a_withdrawal():
    whole = bm25.search(["Where is Oslo"], TEXTS)
    rows, scores = ask(Words(Passages()), "bm25")
    assert rows == whole.proponents[0].tolist()
    np.testing.assert_array_equal(scores, whole.proponent_scores[0])
    rows, scores = ask(Words(Passages(rows[0])), "bm25", k=2)
    assert rows == whole.proponents[0].tolist()[1:3]
    np.testing.assert_array_equal(scores, whole.proponent_scores[0][1:3])


def test_vectors_are_asked_for_once_for_each_layer():
    x = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)
    asked = []

    def of_passages(method, on_progress):
        asked.append(method.layer)
        return x if method.layer == "last" else -x

    vectors = Vectors(Passages(2), of_passages, lambda method, question: x[1:2])
    for _ in range(2):
        rows, scores = ask(vectors, "hidden_last")
        assert rows[0] == 1 and set(rows) == {0, 1, 3} and scores[0] == pytest.approx(1)
        rows, _ = ask(vectors, "hidden_middle")
        assert rows[-1] == 1
    assert asked == ["last", "middle"] and np.isfinite(x).all()


def test_chance_is_the_runs_for_its_queries_and_the_texts_for_others():
    control = Control(Passages(), random_scores(Passages(), 7))
    expected = list(by_score.at_random(4, 3, 7))
    for number in range(3):
        rows, scores = ask(control, "random", number)
        np.testing.assert_allclose(scores, np.sort(expected[number])[::-1], rtol=1e-6)
    once, again = (ask(control, "random")[1] for _ in range(2))
    np.testing.assert_array_equal(once, again)
    assert not any(np.allclose(once, np.sort(e)[::-1]) for e in expected)
    assert len(ask(Control(Passages(1), random_scores(Passages(), 7)), "random")[0]) == 3


def test_labels_are_of_the_runs_queries_alone():
    known = Known(["q0", "q1"], ["a", "b"], ["c", "d"], [np.array([3]), np.array([0, 2])])
    labels = Labels(known, 0)
    rows, _ = ask(labels, "annotated", 1)
    assert set(rows) - {-1} == {0, 2}
    assert ask(labels, "annotated")[0] == []
    assert labels.lacks(METHODS["annotated"]) is None
    assert "kept no list of its queries" in Labels(Known(), 0).lacks(METHODS["annotated"])


def test_a_question_is_known_by_its_text():
    known = Known(["q0", "q1", "q2"], ["a", "b", "b"], ["c", "d", "d"], [np.zeros(0, int)] * 3)
    assert known.number("a", "c") == 0
    assert known.number("b ", " d") == 1  # the first of two alike
    assert known.number("a", "d") is None and Known().number("a", "c") is None
