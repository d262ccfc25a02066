"""A reader's notes on passages, appended to a file of JSON lines.

A note gives a proponent one of the types of the paper's analysis (Chang et al. 2024, section 6):
does the passage state the fact, a part of it, or only something similar? It belongs to a pair of
query and passage, so it counts for every method that retrieved the passage.
"""

import json
import os
import threading
import time

from tda.reports import formats
from tda.viewer.results_file import ResultsFile
from tda.viewer.summary import query_key

TYPES = {
    "states": "states the fact",
    "part": "states part of it",
    "prior": "relation prior",
    "entity": "entity only",
    "name": "name only",
    "form": "same form",
    "unrelated": "unrelated",
}
# The fields of a note that are texts: the query's, of any length, and short ones.
_QUERY = ("prompt", "target")
_SHORT = ("example_id", "passage_id", "comment", "method")
_LIMIT = 4000  # characters of a short one


class NotesError(ValueError):
    """A note cannot be saved, or a file of notes cannot be read."""


class Notes:
    """The notes in a file; the last one on a passage counts.

    Args:
        path: the file, which need not exist. An incomplete last line, left by a kill, is removed.

    Raises:
        NotesError: a line is not a note; the message names file and line.
    """

    def __init__(self, path):
        self.path = os.fspath(path)
        self._lock = threading.Lock()
        self._notes: dict[tuple[str, str], dict] = {}
        complete_bytes = 0
        if not os.path.exists(self.path):
            return
        with open(self.path, "rb") as lines:
            for number, line in enumerate(lines, 1):
                if not line.endswith(b"\n"):
                    break
                where = f"{self.path}, line {number}"
                try:
                    note = json.loads(line)
                except ValueError as error:
                    advice = "correct or remove the line"
                    raise NotesError(f"{where}: not JSON ({error}); {advice}") from error
                check(note, where)
                self._take(note)
                complete_bytes += len(line)
        if complete_bytes < os.path.getsize(self.path):
            with open(self.path, "r+b") as out:
                out.truncate(complete_bytes)

    def _take(self, note: dict) -> None:
        query = query_key(note["example_id"], note["prompt"], note["target"])
        key = query, note["passage_id"]
        self._notes.pop(key, None)
        if note["type"] or note["comment"]:
            self._notes[key] = note

    def add(self, note: dict) -> None:
        """Saves a note; one without type and comment withdraws the note on the passage.

        Args:
            note: "example_id", "prompt" and "target" of the query; "passage_id"; "type", one of
                `TYPES` or None; "comment", any text; "method", the label of the results file that
                showed the passage.

        Raises:
            NotesError: a value is invalid, or the file cannot be written.
        """
        check(note, "the note")
        note = {field: note[field] for field in (*_QUERY, *_SHORT)} | {
            "type": note.get("type") or None,
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        with self._lock:
            try:
                with open(self.path, "a", encoding="utf-8") as out:
                    out.write(json.dumps(note) + "\n")
                    out.flush()
                    # The page says "saved" only when a power cut cannot lose the note.
                    os.fsync(out.fileno())
            except OSError as error:
                raise NotesError(f"cannot write {self.path}: {error.strerror or error}") from error
            self._take(note)

    def all(self) -> list[dict]:
        """Returns the current notes, oldest first, each with the key of its query as "query"."""
        with self._lock:
            return [note | {"query": query} for (query, _), note in self._notes.items()]

    def counts(self, files: list[ResultsFile]) -> dict[str, dict[str, int]]:
        """Counts each file's proponents by the type of their note: {label: {type: count}}."""
        out = {f.label: dict.fromkeys(TYPES, 0) for f in files}
        for note in self.all():
            for file in files if note["type"] else ():
                row = file.row_of(note["query"])
                if row is not None and file.ranks_of(row, note["passage_id"]):
                    out[file.label][note["type"]] += 1
        return out

    def agreement(self, files: list[ResultsFile]) -> dict[str, tuple[int, int]]:
        """Compares the types of notes with those in results (`proponent_kinds`).

        Returns:
            For each type, the number of noted passages that have it in the results, and of those
            whose note says the same. A passage of a query counts once, however many files show it.
        """
        out = dict.fromkeys(TYPES, (0, 0))
        for note in self.all():
            kinds = (_kind_in(file, note) for file in files if note["type"])
            if kind := next(filter(None, kinds), None):
                noted, agreed = out[kind]
                out[kind] = noted + 1, agreed + (kind == note["type"])
        return out


def _kind_in(file: ResultsFile, note: dict) -> str | None:
    """Returns the type that a results file gives the passage of a note, if it has one."""
    row = file.row_of(note["query"])
    rank = 0 if row is None else file.ranks_of(row, note["passage_id"])
    kinds = file.record(row).get("proponent_kinds") if rank else None
    return kinds[rank - 1] if kinds else None


def describe_agreement(agreement: dict[str, tuple[int, int]]) -> str:
    """Formats what `Notes.agreement` returns as a table: the precision of each type."""
    rows = [
        [TYPES[kind], str(noted), f"{agreed / noted:.0%}" if noted else "–"]
        for kind, (noted, agreed) in agreement.items()
    ]
    total, agreed = (sum(counts) for counts in zip(*agreement.values(), strict=True))
    rows.append(["all", str(total), f"{agreed / total:.0%}" if total else "–"])
    return formats.aligned([["by judge and rule", "notes", "agree"], *rows], "lrr")


def check(note: dict, where: str) -> None:
    """Checks a note; a NotesError names `where` and the field."""
    if not isinstance(note, dict):
        raise NotesError(f"{where}: a note must be an object, not {type(note).__name__}")
    for field in (*_QUERY, *_SHORT):
        if not isinstance(note.get(field), str):
            raise NotesError(f"{where}: {field!r} must be a text")
    for field in _SHORT:
        if len(note[field]) > _LIMIT:
            raise NotesError(f"{where}: {field!r} must be a text of at most {_LIMIT} characters")
    if not note["example_id"] or not note["passage_id"]:
        raise NotesError(f"{where}: a note needs the ids of a query and a passage")
    if note.get("type") is not None and note["type"] not in TYPES:
        raise NotesError(f"{where}: unknown type {note['type']!r}; there are {', '.join(TYPES)}")
