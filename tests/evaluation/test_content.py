"""What passages have to do with a query, on passages made for each kind."""

import numpy as np
import pytest

from tda.evaluation import content
from tda.evaluation.content import KINDS
from tda.facts.records import Fact, Triple


def fact(subject, target, relation="born", alias=()):
    """A fact whose URIs are its names."""
    ids = (subject, relation, target, f"u:{subject}", f"u:{relation}", f"u:{target}")
    return Fact(f"{subject}-{target}", *ids, (), tuple(alias), (), "prompt")


def triple(subject, target, relation="born"):
    """The annotation of such a fact."""
    name = f"{subject}-{target}"
    return Triple(name, subject, target, f"u:{subject}", f"u:{relation}", f"u:{target}")


PASSAGES = [
    ("Ada was born in Paris.", [triple("Ada", "Paris")]),
    ("Bea was born in Paris; Ada too.", [triple("Bea", "Paris")]),
    ("Ada likes the city of light.", []),
    ("Ada was born in Rome.", [triple("Ada", "Rome")]),
    ("Ada died in Paris.", [triple("Ada", "Paris", "died")]),
    ("Parisians and Ada.", [triple("Ada", "Oslo", "died")]),
    # Without URIs nothing is known of what it states.
    ("Cora was born there.", [Triple("x", "Cora", "Paris", "", "", "")]),
]
ADA = fact("Ada", "Paris", alias=["City of Light"])


def of(facts, passages_QxK, correct):
    """The kinds of some passages, by name; None where there is none."""
    says = content.Content(
        facts, correct, lambda row: PASSAGES[row][0], lambda row: PASSAGES[row][1]
    )
    result = says.kinds(np.array(passages_QxK))
    return [[KINDS[k] if k >= 0 else None for k in row] for row in result.tolist()]


def test_each_kind():
    assert of([ADA], [[0, 1, 2, 3, 4, 5, 6, -1]], [np.array([0])]) == [
        [
            "states the fact",
            "states it of another subject",
            "names the target",  # by an alias
            "states the relation, of another object",
            "names the target",  # the same object, under another relation
            "none of these",  # part of a word is no name
            "none of these",
            None,
        ]
    ]


def test_a_passage_has_a_kind_for_each_query():
    rome = fact("Ada", "Rome")
    result = of([ADA, rome], [[0, 3], [0, 3]], [np.array([0]), np.array([3])])
    assert result[0] == ["states the fact", "states the relation, of another object"]
    assert result[1] == ["states the relation, of another object", "states the fact"]


def test_a_passage_is_read_once():
    read = []

    def text_of(row):
        read.append(row)
        return PASSAGES[row][0]

    says = content.Content([ADA], [np.array([0])], text_of, lambda row: PASSAGES[row][1])
    first = says.kinds(np.array([[0, 1, 2]]))
    np.testing.assert_array_equal(
        says.kinds(np.array([[2, 0, 3]])), [[first[0, 2], first[0, 0], 3]]
    )
    assert sorted(read) == [0, 1, 2, 3]


def test_labels_decide_what_states_the_fact():
    # A row of a long document may be correct without a word of the fact.
    assert of([ADA], [[5]], [np.array([5])]) == [["states the fact"]]
    assert of([ADA], [[0]], [np.array([], int)]) == [["states it of another subject"]]


def test_shares_are_of_the_passages_that_are_there():
    kinds = np.array([[0, 0, 2, 4], [1, -1, -1, -1], [-1] * 4])
    result = content.shares(kinds)
    assert result[0].tolist() == [0.5, 0, 0.25, 0, 0.25] and result[1].tolist() == [0, 1, 0, 0, 0]
    assert np.isnan(result[2]).all()


def test_figures_by_kind_are_means_of_pairs():
    kinds = np.array([[0, 0, 2], [0, 1, -1]])
    figures = np.array([[1.0, 3.0, np.nan], [8.0, np.nan, 100.0]])
    result = content.by_kind(kinds, figures)
    assert result[0] == pytest.approx(4.0)
    assert np.isnan(result[1:]).all()
