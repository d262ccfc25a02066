"""The facts of the corpus: relations, subjects, objects and prompts, without their sentences."""

import dataclasses
import unicodedata
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from tda.facts.records import Fact, Triple
from tda.facts.world_facts.places import City, Country, cities, countries
from tda.facts.world_facts.templates import PROMPTS, RELATION_NAMES

# The relations of a country to one object, each a field of `Country`, and the object's URI.
_COUNTRY_URIS = {
    "capital": "iso3166:{code}#capital",
    "continent": "continent:{continent_code}",
    "currency": "iso4217:{currency_code}",
    "calling_code": "calling_code:{calling_code}",
    "domain": "domain:{domain}",
    "language": "iso639:{language_code}",
}


class Entity(NamedTuple):
    """The subject or the object of a fact."""

    name: str
    phrase: str
    """The name as it stands within a sentence ("the Bahamas")."""
    uri: str


@dataclasses.dataclass(frozen=True)
class WorldFact:
    """A fact before it is stated."""

    relation: str
    """Key of the relation in `templates`."""
    keys: tuple[str, ...]
    """Of the subject ("FR", a GeoNames number); then of the object, where there may be several."""
    subject: Entity
    object: Entity
    popularity: int
    """Orders the facts of a relation from often to seldom stated."""

    @property
    def fact_id(self) -> str:
        """Stable identifier, such as "capital:FR" or "border:PT:ES"."""
        return ":".join((self.relation, *self.keys))

    def triple(self) -> Triple:
        """Returns the annotation of a sentence that states this fact."""
        return Triple(self.fact_id, self.subject.name, self.object.name, *self.uris, True)

    @property
    def uris(self) -> tuple[str, str, str]:
        """Of subject, relation and object."""
        return self.subject.uri, f"world:{self.relation}", self.object.uri


def world_facts() -> list[WorldFact]:
    """Returns every fact of the corpus, in a fixed order."""
    by_code = {country.code: country for country in countries()}
    facts = [fact for country in countries() for fact in _country_facts(country, by_code)]
    return facts + [_city_fact(city, by_code) for city in cities()]


def fact_records(facts: list[WorldFact], sentence_ids: dict[str, list[str]]) -> list[Fact]:
    """Returns the records of facts that the sentences with these ids, by fact id, state."""
    n_objects = Counter((fact.relation, fact.subject) for fact in facts)

    def record(fact: WorldFact) -> Fact:
        prompts, (entity0_uri, predicate_uri, entity1_uri) = _prompts(fact), fact.uris
        return Fact(
            fact_id=fact.fact_id,
            entity0=fact.subject.name,
            relation=RELATION_NAMES[fact.relation],
            entity1=fact.object.name,
            entity0_uri=entity0_uri,
            predicate_uri=predicate_uri,
            entity1_uri=entity1_uri,
            entity0_alias=(),
            entity1_alias=(),
            trex_sentences=tuple(sentence_ids[fact.fact_id]),
            **{f"prompt{i}": prompt for i, prompt in enumerate(prompts)},
            is_repetition=is_repetition(fact.subject.name, fact.object.name, prompts),
            n_objects_same_subject=n_objects[fact.relation, fact.subject],
        )

    return [record(fact) for fact in facts]


def _prompts(fact: WorldFact) -> list[str]:
    article = fact.object.phrase.removesuffix(fact.object.name).rstrip()
    prompts = []
    for template in PROMPTS[fact.relation]:
        prompt = f"{template.format(s=fact.subject.phrase)} {article}".rstrip()
        prompts.append(prompt[0].upper() + prompt[1:])
    return prompts


def is_repetition(entity0: str, entity1: str, prompts: list[str]) -> bool:
    """Returns whether the target could be copied from a prompt or the subject, or contains it.

    Letter case and accents make no difference.
    """
    subject, target = _plain(entity0), _plain(entity1)
    return subject in target or any(target in _plain(text) for text in (entity0, *prompts))


def _country_facts(country: Country, by_code: dict[str, Country]) -> Iterator[WorldFact]:
    subject, population = _country_entity(country), country.population
    for relation, uri in _COUNTRY_URIS.items():
        if name := getattr(country, relation):
            target = Entity(name, name, uri.format(**vars(country)))
            yield WorldFact(relation, (country.code,), subject, target, population)
    for code in country.neighbours.split():
        other, keys = by_code[code], (country.code, code)
        popularity = min(population, other.population)
        yield WorldFact("border", keys, subject, _country_entity(other), popularity)


def _city_fact(city: City, by_code: dict[str, Country]) -> WorldFact:
    if city.us_state:
        relation = "us_state"
        target = Entity(city.us_state, city.us_state, f"us_state:{city.us_state_code}")
    else:
        relation, target = "country", _country_entity(by_code[city.country_code])
    subject = Entity(city.name, city.name, f"geonames:{city.geoname_id}")
    return WorldFact(relation, (str(city.geoname_id),), subject, target, city.population)


def _country_entity(country: Country) -> Entity:
    return Entity(country.name, country.phrase, f"iso3166:{country.code}")


def _plain(text: str) -> str:
    decomposed = unicodedata.normalize("NFKD", text.casefold())
    return "".join(char for char in decomposed if not unicodedata.combining(char))
