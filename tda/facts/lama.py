"""Reads facts and sentences from LAMA's own T-REx files (Petroni et al. 2019, arXiv 1909.01066).

LAMA's folder `data` has `relations.jsonl`, with a template such as "[X] was born in [Y] ." for each
relation, and `TREx/P19.jsonl` and its like, with a fact and its evidence sentences on each line.
"""

import os
import pathlib
import warnings
from collections import defaultdict
from typing import Any

from tda.data.jsonl import RecordError, iter_records
from tda.facts.records import Fact, Sentence, fact_from_dict, sentence_from_dict

_MASK = "[MASK]"


def read(folder: str | os.PathLike) -> tuple[list[Sentence], list[Fact]]:
    """Returns LAMA's sentences and facts, in the order of its files.

    A fact's id is its `uuid`. Each sentence comes once, with all facts that it is evidence of; its
    id is "lama-" and its number. Relations whose template continues after the object ("[X] and [Y]
    are twin cities .") make no query, and are left out with their sentences; a warning names them.

    Args:
        folder: the folder that has `relations.jsonl` and `TREx`.

    Raises:
        FileNotFoundError: it lacks one of the two.
        RecordError: a record lacks a field, or a field has another type; the message names both.
    """
    of_relations, *files = list_files(folder)
    relations = _relations(of_relations)
    facts: list[Fact] = []
    ids: dict[str, str] = {}
    triples: dict[str, list[dict]] = defaultdict(list)
    for file in files:
        for where, record in iter_records(file):
            relation = _text(record, "predicate_id", where)
            if relation not in relations:
                continue
            name, prompt = relations[relation]
            subject, target = _text(record, "sub_label", where), _text(record, "obj_label", where)
            fact = {
                "fact_id": _text(record, "uuid", where),
                "entity0_uri": _text(record, "sub_uri", where),
                "predicate_uri": relation,
                "entity1_uri": _text(record, "obj_uri", where),
                "entity0": subject,
                "entity1": target,
            }
            aliases: dict[str, dict] = {"entity0_alias": {}, "entity1_alias": {}}
            evidence_ids = {}
            for evidence in record.get("evidences") or ():
                of_subject = _text(evidence, "sub_surface", where)
                of_target = _text(evidence, "obj_surface", where)
                text = _text(evidence, "masked_sentence", where).replace(_MASK, of_target)
                sentence_id = ids.setdefault(text, f"lama-{len(ids):06d}")
                if sentence_id not in evidence_ids:
                    evidence_ids[sentence_id] = None
                    is_initial = text.startswith(of_subject)
                    triples[text].append(fact | {"subject_initial": is_initial})
                aliases["entity0_alias"] |= {of_subject: None} if of_subject != subject else {}
                aliases["entity1_alias"] |= {of_target: None} if of_target != target else {}
            fact |= {"relation": name, "prompt0": prompt.replace("[X]", subject)}
            fact |= {field: list(names) for field, names in aliases.items()}
            facts.append(fact_from_dict(fact | {"trex_sentences": list(evidence_ids)}, where))
    sentences = [
        sentence_from_dict({"sentence_id": i, "text": text, "fact_triples": triples[text]}, i)
        for text, i in ids.items()
    ]
    return sentences, facts


def list_files(folder: str | os.PathLike) -> list[pathlib.Path]:
    """Returns the files that `read` reads, that of the relations first.

    Raises:
        FileNotFoundError: one is missing.
    """
    folder = pathlib.Path(folder).expanduser()
    relations, files = folder / "relations.jsonl", sorted((folder / "TREx").glob("P*.jsonl"))
    if not files or not relations.exists():
        raise FileNotFoundError(
            f"{folder} has no relations.jsonl, or no TREx/P*.jsonl; give the folder `data` that "
            "LAMA's data.zip unpacks to"
        )
    return [relations, *files]


def _relations(path: pathlib.Path) -> dict[str, tuple[str, str]]:
    """Returns the name, and the template before "[Y]", of each relation that ends in its object."""
    relations, left_out = {}, []
    for where, record in iter_records(path):
        prompt, _, rest = _text(record, "template", where).partition("[Y]")
        relation = _text(record, "relation", where)
        if "[X]" in prompt and rest.strip() in ("", "."):
            relations[relation] = (record.get("label") or relation, prompt.rstrip())
        else:
            left_out.append(relation)
    if left_out:
        warnings.warn(
            f"{path}: the templates of {', '.join(left_out)} do not end in the object [Y], so they "
            "make no prompt; their facts and sentences are left out",
            stacklevel=3,
        )
    return relations


def _text(record: Any, field: str, where: str) -> str:
    value = record.get(field) if isinstance(record, dict) else None
    if not isinstance(value, str) or not value.strip():
        raise RecordError(
            f"{where}: field '{field}' is {value!r}; LAMA's T-REx files have a text there, so give "
            "its files as they are"
        )
    return value
