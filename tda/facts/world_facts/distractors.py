"""Sentences that name the places, currencies and codes of the facts, and state none of them."""

import difflib
import random
from collections.abc import Iterator, Sequence

from tda.facts.world_facts.facts import WorldFact
from tda.facts.world_facts.places import City, Country
from tda.facts.world_facts.templates import sentence

# Kinds of distractor with their shares: a place alone, two unrelated places, the object of a fact
# without its subject, and two names that are nearly the same.
_KINDS = {"city": 4, "country": 4, "two places": 5, "object": 4, "similar names": 1}

_CITY = (
    "{c} has a population of about {n}",
    "about {n} people live in the city of {c}",
    "{c} lies at about {lat} and {lon}",
    "the weather in {c} was {weather} on {day}",
    "a concert in {c} drew a large crowd on {day}",
    "the old market in {c} opens at {hour} on {day}",
)
_COUNTRY = (
    "{x} has a population of about {n}",
    "the area of {x} is about {area} square kilometres",
    "{x} sent a team of {k} athletes to the games",
    "the weather in much of {x} was {weather} on {day}",
    "a film about {x} was shown at {hour} on {day}",
    "the library has {k} books about the history of {x}",
)
_TWO_PLACES = (
    "the plane from {a} to {b} left at {hour} on {day}",
    "she moved from {a} to {b} in {month} after her studies",
    "a letter from {a} took {k} days to reach {b}",
    "the team from {a} beat the team from {b} on {day}",
    "he wrote one book about {a} and another about {b}",
    "the guide compares life in {a} with life in {b}",
)
_OBJECT = {
    "continent": (
        "the birds fly across {o} in {month} each year",
        "the museum shows {k} old maps of {o}",
        "the film crew spent {k} weeks in {o} in {month}",
    ),
    "currency": (
        "traders sold the {o} on {day} before its price fell",
        "the {o} gained a little against other currencies on {day}",
        "the bank bought the {o} at {hour} on {day}",
    ),
    "calling_code": (
        "the missed call at {hour} on {day} came from a number that began with {o}",
        "{k} calls with the code {o} were made in {month}",
    ),
    "domain": (
        "registering an address that ends in {o} takes about {k} days",
        "{k} new websites that end in {o} were listed in {month}",
    ),
    "language": (
        "a new course in {o} starts at {hour} on {day}",
        "the novel was translated into {o} in {month}",
        "he learned {k} songs in {o} last {month}",
    ),
}
_SIMILAR = (
    "{a} is easily confused with {b}, although they are different places",
    "on {day} a parcel meant for {a} was sent to {b} by mistake",
    "the names {a} and {b} look alike, but they are different places",
)
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)
_WEATHER = ("warm and dry", "cold and wet", "cloudy", "windy", "mild", "hot", "rainy", "sunny")
_HOURS = ("noon", "six", "seven", "eight", "nine", "ten", "eleven")
_SIMILARITY = 0.75


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
    joined = {frozenset((fact.entity0, fact.entity1)) for fact in facts}
    places = [(country.name, country.phrase) for country in countries]
    places += [(country.capital, country.capital) for country in countries if country.capital]
    places += [(city.name, city.name) for city in cities]
    # A name within another ("Guinea", "Papua New Guinea") would join what a fact joins as well.
    similar = [pair for pair in _similar(places) if _unjoined(*pair, joined)]
    objects = {
        relation: sorted({fact.entity1 for fact in facts if fact.relation == relation})
        for relation in _OBJECT
    }
    while True:
        kind = rng.choices(list(_KINDS), _KINDS.values())[0]
        names = {
            "day": rng.choice(_DAYS),
            "month": rng.choice(_MONTHS),
            "weather": rng.choice(_WEATHER),
            "hour": rng.choice(_HOURS),
            "k": str(rng.randint(3, 30)),
        }
        if kind == "city":
            city = rng.choice(cities)
            template = rng.choice(_CITY)
            names |= {
                "c": city.name,
                "n": _rounded(city.population),
                "lat": _degrees(city.latitude, "north", "south"),
                "lon": _degrees(city.longitude, "east", "west"),
            }
        elif kind == "country":
            country = rng.choice(countries)
            template = rng.choice(_COUNTRY)
            names |= {
                "x": country.phrase,
                "n": _rounded(country.population),
                "area": _rounded(country.area_km2),
            }
        elif kind == "object":
            relation = rng.choice(list(_OBJECT))
            template = rng.choice(_OBJECT[relation])
            names["o"] = rng.choice(objects[relation])
        else:
            pair = rng.choice(similar) if kind == "similar names" else rng.sample(places, 2)
            if not _unjoined(*pair, joined):
                continue
            template = rng.choice(_SIMILAR if kind == "similar names" else _TWO_PLACES)
            names |= {"a": pair[0][1], "b": pair[1][1]}
        yield sentence(template, ("", ""), **names)


def _unjoined(a: tuple[str, str], b: tuple[str, str], joined: set[frozenset[str]]) -> bool:
    return frozenset((a[0], b[0])) not in joined and a[0] not in b[0] and b[0] not in a[0]


def _similar(places: Sequence[tuple[str, str]]) -> list[tuple[tuple[str, str], tuple[str, str]]]:
    pairs = []
    for i, a in enumerate(places):
        for b in places[:i]:
            # Names that look alike start alike; that saves nearly all of the slow comparisons.
            if a[0][0] == b[0][0] and abs(len(a[0]) - len(b[0])) <= 4:
                if difflib.SequenceMatcher(None, a[0], b[0]).ratio() >= _SIMILARITY:
                    pairs.append((a, b))
    return pairs


def _rounded(number: int) -> str:
    """Two significant digits: "3.2 million", "340,000"."""
    if number >= 10_000_000:
        return f"{round(number / 1e6)} million"
    if number >= 1_000_000:
        return f"{number / 1e6:.1f} million".replace(".0 ", " ")
    unit = 10 ** max(0, len(str(number)) - 2)
    return f"{round(number / unit) * unit:,}"


def _degrees(value: float, positive: str, negative: str) -> str:
    return f"{abs(round(value))} degrees {positive if value >= 0 else negative}"
