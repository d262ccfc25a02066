"""A corpus in pieces that are read independently, and the share of its tokens that a process makes.

The unit of work is a turn at a piece: every `stride`-th of its parts, from number `turn` on. A
corpus with fewer pieces than processors has several turns for each piece; each of them reads the
whole piece, which costs little compared with tokenising a share of it.
"""

import dataclasses
import itertools
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from tda.data import part_files
from tda.data.documents import Document
from tda.data.file_states import FileState, read_states
from tda.data.parts import Part, count_characters
from tda.data.tokens import by_characters
from tda.runtime import atomic_file, processes

# Documents in one call of the tokenizer (which spreads them over threads), and calls for a part: a
# kill loses a part at most. Long documents end a part earlier, so that memory does not grow with
# their length: a part of PART_CHARACTERS has about 50 MB of arrays.
BATCH = 256
BATCHES_A_PART = 64
PART_CHARACTERS = 1 << 25


@dataclasses.dataclass(frozen=True)
class Piece:
    """A piece of a corpus."""

    files: tuple[str, ...]
    """The names of the files that it is read from."""
    size: int
    """Its size, for progress: bytes, or documents."""


class Source(Protocol):
    """A corpus in pieces."""

    pieces: Sequence[Piece]
    files: Mapping[str, str]
    """The path of every file, by a name that does not depend on where the corpus lies."""
    unit: str
    """What `Piece.size` counts: "B" or "document"."""

    def describe(self) -> dict:
        """Returns JSON values that tell this corpus from others, apart from its files."""

    def read(self, piece: int) -> Iterator[Document]:
        """Yields the documents of a piece, the same in every call."""

    skipped: int
    """How many records the last reading left out."""


@dataclasses.dataclass(frozen=True)
class Turn:
    """A share of a piece's parts: those whose number modulo `stride` is `turn`."""

    piece: int
    turn: int
    stride: int


@dataclasses.dataclass(frozen=True)
class Job:
    """The inputs that all turns of a corpus share."""

    source: Source
    tokenizer: Any
    context: int
    folder: pathlib.Path
    states: Mapping[str, FileState]
    """The states of the corpus's files when the work began, by name; all turns must find these."""


def part_batches(documents: Iterable[Document]) -> Iterator[tuple[int, list[Document]]]:
    """Yields the calls of the tokenizer, each with the number of its part.

    Where parts end depends on the documents alone, so that a part can be made without the others.
    """
    number = batches = characters = 0
    for batch in by_characters(documents, count_characters, BATCH):
        yield number, batch
        batches += 1
        characters += sum(count_characters(d) + 4 * len(d.tokens or ()) for d in batch)
        if batches == BATCHES_A_PART or characters >= PART_CHARACTERS:
            number, batches, characters = number + 1, 0, 0


def make_parts(job: Job, turn: Turn, on_part: Callable[[int, int], None]) -> None:
    """Makes the missing parts of a turn, each atomically.

    Args:
        job: the corpus.
        turn: the share of a piece's parts.
        on_part: called after each part with the numbers of its documents and characters.

    Raises:
        CorpusError: a document cannot be used, or a file has changed since the work began.
    """
    finished = list_parts(job.folder).get(turn.piece, set())
    files = job.source.pieces[turn.piece].files
    paths = {name: job.source.files[name] for name in files}
    states = read_states(paths, with_digests=turn.turn == 0)
    count = 0
    batches = part_batches(job.source.read(turn.piece))
    for number, group in itertools.groupby(batches, key=lambda x: x[0]):
        count = number + 1
        if number % turn.stride == turn.turn and number not in finished:
            on_part(*_make_part(job, turn.piece, number, (batch for _, batch in group)))
    for name, state in read_states(paths).items():
        state.check_unchanged(job.states[name], paths[name])
    if turn.turn:
        return
    end = PieceEnd(count, job.source.skipped, states)
    atomic_file.write_json(job.folder / f"{turn.piece:06d}.json", end.as_json())


def make_part(job: Job, name: str) -> None:
    """Makes a part again, by the name of one of its files."""
    piece, number = map(int, name.partition(".")[0].split("-"))
    batches = part_batches(job.source.read(piece))
    for part, group in itertools.groupby(batches, key=lambda x: x[0]):
        if part == number:
            _make_part(job, piece, number, (batch for _, batch in group))
            return


def _make_part(
    job: Job, piece: int, number: int, batches: Iterable[list[Document]]
) -> tuple[int, int]:
    """Writes the files of a part; returns the numbers of its documents and characters."""
    part = Part(job.tokenizer, job.context)
    files = documents = characters = 0
    lead = len(job.tokenizer.begin)

    def write(name: str) -> None:
        counts = dataclasses.astuple(part.counts())
        part_files.write(job.folder / name, part.arrays(), lead, counts, part.is_open, files)

    for batch in batches:
        # A part may take longer than the time between a notice and the kill.
        processes.check_preemption()
        for _ in part.add(batch):
            write(file_name(piece, number, files))
            files += 1
            part.clear()
        documents += len(batch)
        characters += sum(map(count_characters, batch))
    write(file_name(piece, number))
    return documents, characters


@dataclasses.dataclass(frozen=True)
class PieceEnd:
    """Counts and file states of a piece, known once it is read to its end."""

    parts: int
    """Its number of parts."""
    skipped: int
    """How many records were left out."""
    states: dict[str, FileState]
    """The state of its files, by name."""

    def as_json(self) -> dict:
        """Returns JSON values."""
        states = {name: dataclasses.astuple(state) for name, state in self.states.items()}
        return {"parts": self.parts, "skipped": self.skipped, "files": states}


def read_end(folder: pathlib.Path, piece: int) -> PieceEnd | None:
    """Returns a piece's counts and file states; None if it was not yet read to its end."""
    try:
        end = atomic_file.read_json(folder / f"{piece:06d}.json")
    except FileNotFoundError:
        return None
    states = {name: FileState(*state) for name, state in end["files"].items()}
    return PieceEnd(end["parts"], end["skipped"], states)


_NAME = re.compile(r"(\d{6})-(\d{5})\.safetensors")


def file_name(piece: int, number: int, file: int | None = None) -> str:
    """Returns the name of a part's file; for None, of its last one, which makes it complete."""
    label = "" if file is None else f".{file:03d}"
    return f"{piece:06d}-{number:05d}{label}.safetensors"


def list_parts(folder: pathlib.Path) -> dict[int, set[int]]:
    """Returns the numbers of the complete parts of each piece, by their files' names."""
    parts: dict[int, set[int]] = {}
    for match in filter(None, map(_NAME.fullmatch, os.listdir(folder))):
        parts.setdefault(int(match[1]), set()).add(int(match[2]))
    return parts


def read_part(folder: pathlib.Path, piece: int, number: int) -> list[part_files.PartInfo] | None:
    """Returns the index entries of a complete part's files; None if one is damaged."""
    last = part_files.read_info(folder / file_name(piece, number))
    if last is None:
        return None
    before = [
        part_files.read_info(folder / file_name(piece, number, i)) for i in range(last.files_before)
    ]
    infos = [info for info in [*before, last] if info is not None]
    return infos if len(infos) == len(before) + 1 else None


def remove_part(folder: pathlib.Path, piece: int, number: int) -> None:
    """Removes the files of a part, the one that makes it complete first."""
    (folder / file_name(piece, number)).unlink(missing_ok=True)
    for path in folder.glob(f"{piece:06d}-{number:05d}.*"):
        path.unlink(missing_ok=True)
