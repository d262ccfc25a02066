"""The facts of the corpus: relations, subjects, objects and prompts, without their sentences."""

import dataclasses
import unicodedata
from collections import Counter
from collections.abc import Iterator

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


@dataclasses.dataclass(frozen=True)
class WorldFact:
    """A fact before it is stated: `entity0` is the subject's name, `entity1` the object's."""

    relation: str
    """Key of the relation in `templates`."""
    subject: str
    """Key of the subject, such as "FR" or a GeoNames number."""
    entity0: str
    entity0_phrase: str
    """The name as it stands within a sentence ("the Bahamas")."""
    entity0_uri: str
    entity1: str
    entity1_phrase: str
    entity1_uri: str
    popularity: int
    """Orders the facts of a relation from often to seldom stated."""
    object_key: str = ""
    """Tells apart several objects of one subject; empty if there is one."""

    @property
    def fact_id(self) -> str:
        """Stable identifier, such as "capital:FR" or "border:PT:ES"."""
        parts = (self.relation, self.subject, self.object_key)
        return ":".join(part for part in parts if part)

    def triple(self) -> Triple:
        """The annotation of a sentence that states this fact."""
        return Triple(
            fact_id=self.fact_id,
            entity0=self.entity0,
            entity1=self.entity1,
            entity0_uri=self.entity0_uri,
            predicate_uri=f"world:{self.relation}",
            entity1_uri=self.entity1_uri,
            subject_initial=True,
        )


def world_facts() -> list[WorldFact]:
    """Returns every fact of the corpus, in a fixed order."""
    by_code = {country.code: country for country in countries()}
    facts = [fact for country in countries() for fact in _country_facts(country, by_code)]
    return facts + [_city_fact(city, by_code) for city in cities()]


def fact_records(facts: list[WorldFact], sentence_ids: dict[str, list[str]]) -> list[Fact]:
    """Returns the records of facts that the sentences with these ids, by fact id, state."""
    n_objects = Counter((fact.relation, fact.subject) for fact in facts)

    def record(fact: WorldFact) -> Fact:
        prompts = _prompts(fact)
        return Fact(
            fact_id=fact.fact_id,
            entity0=fact.entity0,
            relation=RELATION_NAMES[fact.relation],
            entity1=fact.entity1,
            entity0_uri=fact.entity0_uri,
            predicate_uri=f"world:{fact.relation}",
            entity1_uri=fact.entity1_uri,
            entity0_alias=(),
            entity1_alias=(),
            trex_sentences=tuple(sentence_ids[fact.fact_id]),
            **{f"prompt{i}": prompt for i, prompt in enumerate(prompts)},
            is_repetition=is_repetition(fact.entity0, fact.entity1, prompts),
            n_objects_same_subject=n_objects[fact.relation, fact.subject],
        )

    return [record(fact) for fact in facts]


def _prompts(fact: WorldFact) -> list[str]:
    article = fact.entity1_phrase.removesuffix(fact.entity1).rstrip()
    prompts = []
    for template in PROMPTS[fact.relation]:
        prompt = f"{template.format(s=fact.entity0_phrase)} {article}".rstrip()
        prompts.append(prompt[0].upper() + prompt[1:])
    return prompts


def is_repetition(entity0: str, entity1: str, prompts: list[str]) -> bool:
    """Whether the target could be copied: it is in a prompt or the subject, or holds the subject.

    Letter case and accents make no difference.
    """
    subject, target = _plain(entity0), _plain(entity1)
    return subject in target or any(target in _plain(text) for text in (entity0, *prompts))


def _country_facts(country: Country, by_code: dict[str, Country]) -> Iterator[WorldFact]:
    common = dict(
        subject=country.code,
        entity0=country.name,
        entity0_phrase=country.phrase,
        entity0_uri=f"iso3166:{country.code}",
        popularity=country.population,
    )
    for relation, uri in _COUNTRY_URIS.items():
        if name := getattr(country, relation):
            uri = uri.format(**vars(country))
            yield WorldFact(
                relation=relation, entity1=name, entity1_phrase=name, entity1_uri=uri, **common
            )
    for code in country.neighbours.split():
        other = by_code[code]
        common["popularity"] = min(country.population, other.population)
        yield WorldFact(relation="border", object_key=code, **_country_as_object(other), **common)


def _city_fact(city: City, by_code: dict[str, Country]) -> WorldFact:
    if city.us_state:
        relation, name, uri = "us_state", city.us_state, f"us_state:{city.us_state_code}"
        target = dict(entity1=name, entity1_phrase=name, entity1_uri=uri)
    else:
        relation, target = "country", _country_as_object(by_code[city.country_code])
    return WorldFact(
        relation=relation,
        subject=str(city.geoname_id),
        entity0=city.name,
        entity0_phrase=city.name,
        entity0_uri=f"geonames:{city.geoname_id}",
        popularity=city.population,
        **target,
    )


def _country_as_object(country: Country) -> dict[str, str]:
    uri = f"iso3166:{country.code}"
    return dict(entity1=country.name, entity1_phrase=country.phrase, entity1_uri=uri)


def _plain(text: str) -> str:
    decomposed = unicodedata.normalize("NFKD", text.casefold())
    return "".join(char for char in decomposed if not unicodedata.combining(char))
