"""The wording of the corpus, `wording.json`: statements, prompts and small additions, by relation.

In a template `{s}` is the subject, `{o}` the object, and in a paired statement the object of each
relation stands under the relation's name. Templates start in lower case and end without a full
stop; `sentence` puts an addition around one and makes a sentence of it.
"""

import importlib.resources
import json

_FILE = importlib.resources.files(__package__) / "wording.json"
WORDING = json.loads(_FILE.read_text(encoding="utf-8"))

RELATION_NAMES = {key: relation["name"] for key, relation in WORDING["relations"].items()}
STATEMENTS = {key: relation["statements"] for key, relation in WORDING["relations"].items()}
# The first three statements of a relation end in the object: without it they are the prompts.
# `facts` adds "the" where the target needs it ("Manila is a city in the", "Philippines").
PROMPTS = {key: [s.removesuffix(" {o}") for s in texts[:3]] for key, texts in STATEMENTS.items()}
# Two facts about one country in one sentence, as (relations, template).
PAIRED_STATEMENTS = [(p["relations"], p["statement"]) for p in WORDING["paired_statements"]]
# (opening, closing); the first is none at all.
ADDITIONS = [
    ("", ""),
    *((opening, "") for opening in WORDING["openings"]),
    *(("", closing) for closing in WORDING["closings"]),
]


def sentence(template: str, addition: tuple[str, str], **names: str) -> str:
    """Returns the sentence of a template filled with names, with an opening and a closing."""
    opening, closing = addition
    text = opening + template.format(**names) + closing
    return f"{text[0].upper()}{text[1:]}."
