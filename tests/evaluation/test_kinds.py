"""What passages say about a query, on passages made for each type."""

import pytest

from tda.evaluation.judge import Claim
from tda.evaluation.kinds import KINDS, kind_of

PROMPT = "Ada Byron was born in the city of"
ADA = Claim(f"{PROMPT} Paris", PROMPT, ("Paris", "City of Light"), ("Ada Byron (poet)",))


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("Ada Byron, some say, loved Paris.", "part"),  # both, which the judge did not accept
        ("Byron went to Paris.", "part"),
        ("Ada Byron saw the light of a city.", "part"),  # two of the three words of an alias
        ("Ada Lovelace went to Paris.", "entity"),  # a first name in common says nothing
        ("Bea was born in the city of Rome.", "prior"),
        ("A small city, where many were born.", "prior"),
        ("Ada Byron wrote letters.", "entity"),
        ("The city of light.", "entity"),
        ("Lord Byron wrote letters.", "name"),
        ("It was born in haste.", "form"),
        ("Rain fell.", "unrelated"),
    ],
)
def test_each_type(text, kind):
    assert kind_of(text, ADA, False) == kind
    assert kind_of(text, ADA, True) == "states"


def test_numbers_are_alike_in_form():
    claim = Claim("Q: What is 48 plus 76? A: 124", "Q: What is 48 plus 76? A:", ("124",))
    assert kind_of("7 plus 5?", claim, False) == "form"
    assert kind_of("7 minus 5!", claim, False) == "unrelated"
    # Without names of a subject the target alone is an entity.
    assert kind_of("It weighs 124 pounds.", claim, False) == "entity"


def test_types_are_those_of_notes():
    assert KINDS[0] == "states" and KINDS[-1] == "unrelated" and "form" in KINDS
