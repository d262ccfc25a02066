"""Facts stated in the words of their prompts, never those of the queries."""

import pytest

from tda.facts.records import fact_from_dict
from tda.facts.statements import statements


def fact(name, subject, target, **more):
    d = {"fact_id": name, "entity0": subject, "relation": "r", "entity1": target}
    return fact_from_dict(d | {"prompt0": f"{subject} is by"} | more, name)


FACTS = [
    fact("a", "Norway", "Oslo", prompt1="Norway lies at"),
    fact("b", "Oslo", "Norway"),
    fact("c", "Norway", "Europe"),
    fact("d", "Rome", "Oslo", prompt1="Rome lies at", prompt2="Rome has"),
]


def test_each_fact_is_stated_by_its_prompts():
    assert list(statements(FACTS[3:], [], 2)) == [
        ("statement-d-0", "Rome is by Oslo."),
        ("statement-d-1", "Rome lies at Oslo."),
    ]
    ids = [name for name, _ in statements(FACTS, [], 3)]
    assert ids == [f"statement-{x}" for x in ("a-0", "a-1", "b-0", "c-0", "d-0", "d-1", "d-2")]


def test_a_queried_fact_is_never_stated():
    """Guards: a query's answer in the training text, by its own words or turned around."""
    assert [name for name, _ in statements(FACTS, FACTS[:1], 1)] == ["statement-d-0"]
    assert [name for name, _ in statements(FACTS, FACTS[1:2], 1)] == [
        "statement-c-0",
        "statement-d-0",
    ]


@pytest.mark.parametrize("n", [0, 4])
def test_a_fact_has_one_to_three_prompts(n):
    with pytest.raises(ValueError, match=f"n={n}"):
        list(statements(FACTS, [], n))
