"""The facts of the corpus: relations, subjects, objects and prompts, without their sentences."""

import dataclasses
import unicodedata
from collections import Counter
from collections.abc import Iterator

from tda.facts.records import Fact, Triple
from tda.facts.world_facts.places import City, Country, cities, countries
from tda.facts.world_facts.templates import PROMPTS, RELATION_NAMES


@dataclasses.dataclass(frozen=True)
class WorldFact:
    """A fact before it is stated.

    Attributes:
        relation: Key of the relation in `templates`.
        subject: Key of the subject, such as "FR" or a GeoNames number.
        entity0: Name of the subject.
        entity0_phrase: Its name as it stands within a sentence ("the Bahamas").
        entity0_uri: Its URI.
        entity1: Name of the object.
        entity1_phrase: The object's name within a sentence.
        entity1_uri: Its URI.
        popularity: Orders the facts of a relation from often to seldom stated.
        object_key: Tells apart several objects of one subject; empty if there is one.
    """

    relation: str
    subject: str
    entity0: str
    entity0_phrase: str
    entity0_uri: str
    entity1: str
    entity1_phrase: str
    entity1_uri: str
    popularity: int
    object_key: str = ""

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
    """Makes the records of facts that have been stated.

    Args:
        facts: The facts.
        sentence_ids: For each fact id, the sentences that state it.

    Returns:
        One record for each fact, in the same order.
    """
    n_objects = Counter((fact.relation, fact.subject) for fact in facts)
    records = []
    for fact in facts:
        prompts = _prompts(fact)
        records.append(
            Fact(
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
                prompt0=prompts[0],
                prompt1=prompts[1],
                prompt2=prompts[2],
                is_repetition=is_repetition(fact.entity0, fact.entity1, prompts),
                n_objects_same_subject=n_objects[fact.relation, fact.subject],
            )
        )
    return records


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
    single = {
        "capital": (country.capital, f"iso3166:{country.code}#capital"),
        "continent": (country.continent, f"continent:{country.continent_code}"),
        "currency": (country.currency, f"iso4217:{country.currency_code}"),
        "calling_code": (country.calling_code, f"calling_code:{country.calling_code}"),
        "domain": (country.domain, f"domain:{country.domain}"),
        "language": (country.language, f"iso639:{country.language_code}"),
    }
    common = dict(
        subject=country.code,
        entity0=country.name,
        entity0_phrase=country.phrase,
        entity0_uri=f"iso3166:{country.code}",
        popularity=country.population,
    )
    for relation, (name, uri) in single.items():
        if name:
            yield WorldFact(
                relation=relation, entity1=name, entity1_phrase=name, entity1_uri=uri, **common
            )
    for code in country.neighbours:
        other = by_code[code]
        common["popularity"] = min(country.population, other.population)
        yield WorldFact(
            relation="border",
            entity1=other.name,
            entity1_phrase=other.phrase,
            entity1_uri=f"iso3166:{code}",
            object_key=code,
            **common,
        )


def _city_fact(city: City, by_code: dict[str, Country]) -> WorldFact:
    common = dict(
        subject=str(city.geoname_id),
        entity0=city.name,
        entity0_phrase=city.name,
        entity0_uri=f"geonames:{city.geoname_id}",
        popularity=city.population,
    )
    if city.us_state:
        return WorldFact(
            relation="us_state",
            entity1=city.us_state,
            entity1_phrase=city.us_state,
            entity1_uri=f"us_state:{city.us_state_code}",
            **common,
        )
    country = by_code[city.country_code]
    return WorldFact(
        relation="country",
        entity1=country.name,
        entity1_phrase=country.phrase,
        entity1_uri=f"iso3166:{country.code}",
        **common,
    )


def _plain(text: str) -> str:
    decomposed = unicodedata.normalize("NFKD", text.casefold())
    return "".join(char for char in decomposed if not unicodedata.combining(char))
