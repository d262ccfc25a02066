"""Notes on passages, made by hand: of what type is a proponent? Kept as JSON lines, appended to.

The types are those of the paper's analysis of proponents (Chang et al. 2024, section 6): does the
passage state the fact, a part of it, or only what is around it? A note is on a passage of a query,
whichever method retrieved it; so one reading counts for every method.
"""

import json
import os
import threading
import time

from tda.viewer.results_file import ResultsFile

TYPES = {
    "states": "states the fact",
    "part": "states part of it",
    "prior": "relation prior",
    "entity": "entity only",
    "name": "name only",
    "unrelated": "unrelated",
}
_LIMIT = 4000  # characters of an id or a comment


class NotesError(ValueError):
    """A note cannot be kept, or a file of notes cannot be read."""


class Notes:
    """The notes in a file; the last on a passage counts.

    Args:
        path: the file; it need not exist. A last line that a kill tore is cut off.

    Raises:
        NotesError: a line is no note; the message names file and line.
    """

    def __init__(self, path):
        self.path = os.fspath(path)
        self._lock = threading.Lock()
        self._notes: dict[tuple[str, str], dict] = {}
        whole = 0
        if not os.path.exists(self.path):
            return
        with open(self.path, "rb") as lines:
            for number, line in enumerate(lines, 1):
                if not line.endswith(b"\n"):
                    break
                self._take(_parsed(line, f"{self.path}, line {number}"))
                whole += len(line)
        if whole < os.path.getsize(self.path):
            with open(self.path, "r+b") as out:
                out.truncate(whole)

    def _take(self, note: dict) -> None:
        key = note["example_id"], note["passage_id"]
        self._notes.pop(key, None)
        if note["type"] or note["comment"]:
            self._notes[key] = note

    def add(self, example: str, passage: str, kind: str | None, comment: str, where: str) -> dict:
        """Keeps a note; without type and comment, the note on the passage is taken back.

        Args:
            example, passage: the query's and the passage's id.
            kind: one of `TYPES`, or None.
            comment: any text.
            where: label of the results that were looked at.

        Returns:
            The note, as in the file.

        Raises:
            NotesError: a value is not of these, or the file cannot be written.
        """
        note = {
            "example_id": example,
            "passage_id": passage,
            "type": kind or None,
            "comment": comment,
            "method": where,
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        check(note, "the note")
        with self._lock:
            try:
                with open(self.path, "a", encoding="utf-8") as out:
                    out.write(json.dumps(note) + "\n")
                    out.flush()
                    os.fsync(out.fileno())
            except OSError as error:
                raise NotesError(f"cannot write {self.path}: {error.strerror or error}") from error
            self._take(note)
        return note

    def all(self) -> list[dict]:
        """The notes that count, oldest first."""
        with self._lock:
            return list(self._notes.values())

    def counts(self, files: list[ResultsFile]) -> dict[str, dict[str, int]]:
        """For each file's label and each type, how many of its proponents are noted as that."""
        out = {f.label: dict.fromkeys(TYPES, 0) for f in files}
        for note in self.all():
            for file in files if note["type"] else ():
                row = file.row_of(note["example_id"])
                if row is not None and file.ranks_of(row, note["passage_id"]):
                    out[file.label][note["type"]] += 1
        return out


def check(note: dict, where: str) -> None:
    """Raises a NotesError, naming `where` and the field, unless `note` is a note."""
    for field in ("example_id", "passage_id", "comment", "method"):
        if not isinstance(note.get(field), str) or len(note[field]) > _LIMIT:
            raise NotesError(f"{where}: {field!r} must be a text of at most {_LIMIT} characters")
    if not note["example_id"] or not note["passage_id"]:
        raise NotesError(f"{where}: a note needs the ids of a query and a passage")
    if note.get("type") is not None and note["type"] not in TYPES:
        raise NotesError(f"{where}: unknown type {note['type']!r}; there are {', '.join(TYPES)}")


def _parsed(line: bytes, where: str) -> dict:
    try:
        note = json.loads(line)
    except ValueError as error:
        raise NotesError(f"{where}: not JSON ({error}); mend or remove the line") from error
    if not isinstance(note, dict):
        raise NotesError(f"{where}: a note must be an object, not {type(note).__name__}")
    check(note, where)
    return note
