"""A small corpus in the release's form, with every optional field both present and absent."""

import dataclasses
import json

from tda.facts.records import Fact, Sentence, Triple

_URIS = ("u:France", "u:P36", "u:Paris")
_TRIPLE = Triple("f2", "France", "Paris", *_URIS, True)

SENTENCES = [
    Sentence("s9", "Paris is the capital of France.", "u:page", 0, (_TRIPLE,)),
    Sentence("s1", "Ångström wrote “nothing”."),
    Sentence(
        "s5",
        "France is large, and Paris is its capital.",
        None,
        7,
        (
            dataclasses.replace(_TRIPLE, subject_initial=False),
            Triple(None, None, None, "u:a", "u:b", "u:c", None),
        ),
    ),
    Sentence("s2", "A line\nbreak.", "u:page", 12345678901, ()),
]
FACTS = [
    Fact(
        "f2",
        "France",
        "capital",
        "Paris",
        *_URIS,
        ("French Republic", "République française"),
        ("City of Light",),
        ("s9", "s5"),
        "The capital of France is",
        "France has its capital in",
        None,
        0,
        False,
        1,
        "kilt-1",
    ),
    Fact("f1", "a", "b", "c", "u:a", "u:b", "u:c", (), (), (), "prompt", is_repetition=True),
]


def write(folder, shards=2):
    """Writes the corpus and returns the builder arguments that name its files."""
    for name, records in (("facts", FACTS), ("sentences", SENTENCES)):
        n = shards if name == "sentences" else 1
        for i in range(n):
            size = -(-len(records) // n)
            lines = [
                json.dumps(dataclasses.asdict(record)) + "\n"
                for record in records[i * size : (i + 1) * size]
            ]
            (folder / f"{name}.jsonl-{i}").write_text("".join(lines))
    return {"sentences": str(folder / "sentences.jsonl-*"), "facts": str(folder / "facts.jsonl-0")}
