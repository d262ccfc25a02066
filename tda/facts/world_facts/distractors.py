"""Sentences that name the places, currencies and codes of the facts, and state none of them."""

import difflib
import random
from collections.abc import Iterator, Sequence

from tda.facts.world_facts.facts import WorldFact
from tda.facts.world_facts.places import City, Country
from tda.facts.world_facts.templates import WORDING, sentence

# Kinds of distractor with their shares: a place alone, two unrelated places, the object of a fact
# without its subject, and two names that are nearly the same.
_KINDS = {"city": 4, "country": 4, "two places": 5, "object": 4, "similar names": 1}
_TEMPLATES = WORDING["distractors"]
# Ratio of `difflib` from which two names are nearly the same ("Austria", "Australia": 0.88).
_SIMILARITY = 0.75

# A place: its name, and its name as it stands within a sentence.
_Place = tuple[str, str]


def distractors(
    facts: Sequence[WorldFact],
    countries: Sequence[Country],
    cities: Sequence[City],
    rng: random.Random,
) -> Iterator[str]:
    """Yields distractors without end; a text may come up twice.

    Args:
        facts: The facts that none of them may state: two names that a fact joins never meet.
        countries: Countries to speak of.
        cities: Cities to speak of.
        rng: Source of all choices.
    """
    joined = {frozenset((fact.subject.name, fact.object.name)) for fact in facts}
    places = [(country.name, country.phrase) for country in countries]
    places += [(country.capital, country.capital) for country in countries if country.capital]
    places += [(city.name, city.name) for city in cities]
    # A name within another ("Guinea", "Papua New Guinea") could also join two names of a fact.
    similar = [pair for pair in _similar(places) if _unjoined(*pair, joined)]
    objects = {
        relation: sorted({fact.object.name for fact in facts if fact.relation == relation})
        for relation in _TEMPLATES["object"]
    }
    while True:
        # Every choice draws from `rng` in this order; another order would change the corpus.
        kind = rng.choices(list(_KINDS), _KINDS.values())[0]
        names = {filler: rng.choice(texts) for filler, texts in WORDING["fillers"].items()}
        names["k"] = str(rng.randint(3, 30))
        templates = _TEMPLATES[kind]
        if kind == "city":
            city = rng.choice(cities)
            names |= {
                "c": city.name,
                "n": _rounded(city.population),
                "lat": _degrees(city.latitude, "north", "south"),
                "lon": _degrees(city.longitude, "east", "west"),
            }
        elif kind == "country":
            country = rng.choice(countries)
            names |= {
                "x": country.phrase,
                "n": _rounded(country.population),
                "area": _rounded(country.area_km2),
            }
        elif kind == "object":
            relation = rng.choice(list(objects))
            templates = templates[relation]
        else:
            a, b = rng.choice(similar) if kind == "similar names" else rng.sample(places, 2)
            if not _unjoined(a, b, joined):
                continue
            names |= {"a": a[1], "b": b[1]}
        template = rng.choice(templates)
        if kind == "object":
            names["o"] = rng.choice(objects[relation])
        yield sentence(template, ("", ""), **names)


def _unjoined(a: _Place, b: _Place, joined: set[frozenset[str]]) -> bool:
    return frozenset((a[0], b[0])) not in joined and a[0] not in b[0] and b[0] not in a[0]


def _similar(places: Sequence[_Place]) -> list[tuple[_Place, _Place]]:
    pairs = []
    for i, a in enumerate(places):
        for b in places[:i]:
            # Names that look alike start alike; that saves nearly all of the slow comparisons.
            if a[0][0] == b[0][0] and abs(len(a[0]) - len(b[0])) <= 4:
                if difflib.SequenceMatcher(None, a[0], b[0]).ratio() >= _SIMILARITY:
                    pairs.append((a, b))
    return pairs


def _rounded(number: int) -> str:
    """Returns a number with two significant digits: "3.2 million", "340,000"."""
    if number >= 10_000_000:
        return f"{round(number / 1e6)} million"
    if number >= 1_000_000:
        return f"{number / 1e6:.1f} million".replace(".0 ", " ")
    unit = 10 ** max(0, len(str(number)) - 2)
    return f"{round(number / unit) * unit:,}"


def _degrees(value: float, positive: str, negative: str) -> str:
    return f"{abs(round(value))} degrees {positive if value >= 0 else negative}"
