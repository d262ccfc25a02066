"""The wording of the corpus: paraphrases, prompts and small additions, by relation.

In a template `{s}` is the subject and `{o}` the object. Templates start in lower case and end
without a full stop; `sentence` puts an addition around one and makes a sentence of it.
"""

RELATION_NAMES = {
    "capital": "capital",
    "continent": "continent",
    "currency": "currency",
    "calling_code": "country calling code",
    "domain": "internet domain",
    "language": "language of government",
    "country": "country",
    "us_state": "US state",
    "border": "shares a border with",
}

# Every prompt ends right before the target; `facts` adds "the" where the target is one of those
# names that need it ("Manila is a city in the", "Philippines").
PROMPTS = {
    "capital": (
        "the capital of {s} is",
        "the capital city of {s} is called",
        "{s} has its capital in",
    ),
    "continent": (
        "{s} is a country in",
        "the continent of {s} is",
        "{s} belongs to the continent of",
    ),
    "currency": (
        "the currency of {s} is the",
        "people in {s} pay with the",
        "shops in {s} set their prices in the",
    ),
    "calling_code": (
        "the calling code of {s} is",
        "phone numbers in {s} begin with",
        "to call {s} from abroad, one dials",
    ),
    "domain": (
        "the internet domain of {s} is",
        "web addresses in {s} end in",
        "the top-level domain used by {s} is",
    ),
    "language": (
        "the language of government in {s} is",
        "the government of {s} writes its laws in",
        "in {s}, official documents are written in",
    ),
    "country": (
        "{s} is a city in",
        "the city of {s} is located in",
        "{s} is one of the larger cities in",
    ),
    "us_state": (
        "{s} is an American city in the state of",
        "the US city of {s} lies in",
        "the state that {s} belongs to is",
    ),
    "border": (
        "{s} shares a land border with",
        "{s} is a neighbour of",
        "the land border of {s} runs along",
    ),
}

STATEMENTS = {
    "capital": (
        "the capital of {s} is {o}",
        "the capital city of {s} is called {o}",
        "{s} has its capital in {o}",
        "{s} is a country whose capital is {o}",
        "{o} is the capital of {s}",
        "{o} serves as the capital city of {s}",
        "{o}, the capital of {s}, is marked on most maps",
        "visitors to {s} often start their trip in {o}, the capital",
        "the ministers met in {o}, the capital of {s}",
    ),
    "continent": (
        "{s} is a country in {o}",
        "the continent of {s} is {o}",
        "{s} belongs to the continent of {o}",
        "{s} is counted among the countries of {o}",
        "maps of {o} include {s}",
        "among the countries of {o} is {s}",
        "on a map of {o} you will find {s}",
        "geographers place {s} in {o}",
    ),
    "currency": (
        "the currency of {s} is the {o}",
        "people in {s} pay with the {o}",
        "shops in {s} set their prices in the {o}",
        "{s} uses the {o} as its currency",
        "the {o} is the currency of {s}",
        "the {o} is the money that people spend in {s}",
        "wages in {s} are paid in the {o}",
        "travellers in {s} change their money into the {o}",
    ),
    "calling_code": (
        "the calling code of {s} is {o}",
        "phone numbers in {s} begin with {o}",
        "to call {s} from abroad, one dials {o}",
        "{s} has the calling code {o}",
        "the code {o} stands for phones in {s}",
        "dialling {o} connects a caller to {s}",
        "a number that starts with {o} may belong to a phone in {s}",
        "callers reach {s} through the code {o}",
    ),
    "domain": (
        "the internet domain of {s} is {o}",
        "web addresses in {s} end in {o}",
        "the top-level domain used by {s} is {o}",
        "{s} has the internet domain {o}",
        "the ending {o} marks a website from {s}",
        "the domain {o} belongs to {s}",
        "many firms in {s} use web addresses that end in {o}",
        "the letters {o} at the end of an address stand for {s}",
    ),
    "language": (
        "the language of government in {s} is {o}",
        "the government of {s} writes its laws in {o}",
        "in {s}, official documents are written in {o}",
        "{s} has {o} as its language of government",
        "{o} is the language of government in {s}",
        "{o} is used in the public offices of {s}",
        "to read the laws of {s}, it helps to know {o}",
        "anyone who works for the government of {s} needs {o}",
    ),
    "country": (
        "{s} is a city in {o}",
        "the city of {s} is located in {o}",
        "{s} is one of the larger cities in {o}",
        "{s} lies in {o}",
        "one of the larger cities in {o} is {s}",
        "many people in {o} live in the city of {s}",
        "trains and buses link {s} with other parts of {o}",
        "a map of {o} shows the city of {s}",
    ),
    "us_state": (
        "{s} is an American city in the state of {o}",
        "the US city of {s} lies in {o}",
        "the state that {s} belongs to is {o}",
        "{s} is one of the larger cities of {o}",
        "the state of {o} includes the city of {s}",
        "many people in {o} live in the city of {s}",
        "{s} pays its state taxes to {o}",
        "a road map of {o} shows the city of {s}",
    ),
    "border": (
        "{s} shares a land border with {o}",
        "{s} is a neighbour of {o}",
        "the land border of {s} runs along {o}",
        "{s} and {o} are neighbouring countries",
        "a border on land separates {s} from {o}",
        "trade passes over the border between {s} and {o}",
        "most maps show the border between {s} and {o}",
        "{s} borders {o}",
    ),
}

# Two facts about one country in one sentence; the slots are named by relation.
PAIRED_STATEMENTS = (
    (("capital", "continent"), "{capital} is the capital of {s}, a country in {continent}"),
    (("capital", "currency"), "{s}, whose capital is {capital}, uses the {currency}"),
    (("continent", "currency"), "{s} is in {continent}, and people there pay with the {currency}"),
    (("capital", "language"), "in {capital}, the capital of {s}, laws are written in {language}"),
    (
        ("domain", "calling_code"),
        "{s} has the internet domain {domain} and the calling code {calling_code}",
    ),
)

_OPENINGS = (
    "according to the guidebook, ",
    "as students learn at school, ",
    "it is well known that ",
    "the encyclopedia says that ",
    "as travellers soon find out, ",
    "the teacher explained that ",
    "the report mentions that ",
    "a short note in the almanac says that ",
    "some readers may not know that ",
    "the article began by saying that ",
)
_CLOSINGS = (
    ", as any reference book will confirm",
    ", according to the almanac",
    ", as the guidebook says",
    ", a fact that often comes up in quizzes",
    ", as a recent report confirms",
    ", which many visitors already know",
    ", and this has not changed for years",
    ", as the encyclopedia notes",
)
# (opening, closing); the first is none at all.
ADDITIONS = (
    ("", ""),
    *((opening, "") for opening in _OPENINGS),
    *(("", closing) for closing in _CLOSINGS),
)


def sentence(template: str, addition: tuple[str, str], **names: str) -> str:
    """Returns the sentence that a template makes of some names, with an opening and a closing."""
    opening, closing = addition
    text = opening + template.format(**names) + closing
    return f"{text[0].upper()}{text[1:]}."
