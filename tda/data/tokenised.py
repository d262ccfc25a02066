"""A corpus of any size as a token table: tokenised in parts, which are read in place.

    DIR/corpus.json        the table's provenance, counts, and an entry for each part; written last
    DIR/parts/             the parts (`tda.data.part_files`), and a file for each finished piece

The corpus is cut into pieces, such as files, and these into parts, which several processes tokenise
(`tda.data.tokenising`). The bytes of a part depend on its documents alone, not on the process that
makes it. A kill loses the parts in progress, and a damaged part is made again when it is read
(`tda.data.mapped`). A passage's id leads back to its place: it is the document's id if the passage
is the whole document, else `ID#START-END` for its characters START to END.

A table serves every call with the same tokenizer, options and files (`tda.data.file_states`); a
copied corpus is the same corpus.
"""

import collections
import contextlib
import dataclasses
import itertools
import pathlib
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence

import jax
import numpy as np

from tda.data import part_files, pieces, tokenising
from tda.data.documents import Document
from tda.data.file_states import FileState, check_same, read_states
from tda.data.folders import CorpusError
from tda.data.mapped import MappedTable
from tda.data.names import DocumentNames, PassageNames, Strings, check_unique
from tda.data.part_files import info_from_json, map_arrays
from tda.data.parts import ARRAYS, Counts, Part
from tda.data.pieces import Job, Source, Turn, read_end
from tda.data.tokens import TokenTable
from tda.runtime import atomic_file, processes, progress
from tda.runtime.engine import PROCESSES, Engine, Work
from tda.runtime.fingerprint import fingerprint, plain

# The format of a directory of tokens; a directory of another format is refused.
_FORMAT = 4
_SPAN = re.compile(r"(.*)#(\d+)-(\d+)", re.DOTALL)
_NO_TEXT = "the corpus has no text: it has no document, or only blank ones, or of a single token"


def place_of(passage: str) -> tuple[str, slice | None]:
    """Returns the document and its characters that a passage's id names; None for all of it."""
    match = _SPAN.fullmatch(passage)
    return (match[1], slice(int(match[2]), int(match[3]))) if match else (passage, None)


def tokenise_in_memory(
    documents: Iterable[Document], tokenizer, context: int
) -> tuple[TokenTable, Counts]:
    """Tokenises a corpus that fits in memory; see `tokenise_on_disk`."""
    parts, counts = [], []
    hashes: list[np.ndarray] = []
    part = Part(tokenizer, context)

    def finish() -> None:
        parts.append(part.arrays())
        counts.append(part.counts())
        hashes.append(parts[-1]["name_hashes"][: -1 if part.is_open else None])
        part.clear()

    with progress.bar(None, "tokenise", "document") as bar:
        batches = pieces.part_batches(documents)
        for _, group in itertools.groupby(batches, key=lambda x: x[0]):
            for _, batch in group:
                for _ in part.add(batch):
                    finish()
                bar.update(len(batch))
            finish()
    if not sum(len(x["ends"]) for x in parts):
        raise CorpusError(_NO_TEXT)

    def name_of(number: int, i: int) -> str:
        return Strings(parts[number]["names"], parts[number]["name_ends"])[i]

    check_unique([len(x) for x in hashes], hashes.__getitem__, name_of)
    return _table(_joined(parts)), _sum(counts)


def tokenise_on_disk(
    directory,
    source: Source,
    tokenizer,
    context: int,
    engine: Engine = PROCESSES,
) -> tuple[MappedTable, Counts]:
    """Tokenises a corpus into `directory`, or opens the table that is there already.

    Worker processes share the work, one for each processor. Every process of a run calls it and
    takes a share of the corpus; all of them must see the directory.

    Args:
        directory: the directory of the files.
        source: the corpus, the same documents in the same order in every call.
        tokenizer: the model's tokenizer.
        context: the most positions that a passage may have.
        engine: assigns the parts to processes.

    Returns:
        The passages, read from disk on demand, and counts of documents.

    Raises:
        CorpusError: two documents have the same id, a text or an id is not Unicode, there is no
            text at all, or the directory was made from another corpus.
    """
    directory = pathlib.Path(directory)
    provenance = plain(source.describe() | {"tokenizer": tokenizer.fingerprint()})
    provenance |= {"context": context, "format": _FORMAT}
    if getattr(tokenizer, "chat", None) is not None:
        provenance["chat template"] = fingerprint(dataclasses.astuple(tokenizer.chat))
    index = directory / "corpus.json"
    job = Job(source, tokenizer, context, directory / "parts", read_states(source.files))
    with engine.alone():
        is_finished = processes.on_first_process(
            "look for tokens", lambda: _begin(directory, provenance, source)
        )
    if not is_finished:
        engine.compute(_work(job, f"tokens {fingerprint(provenance)}", engine))
        with engine.alone():
            processes.on_first_process("index the tokens", lambda: _finish(job, provenance, index))
    return open_tokens(directory, job)


def is_finished(directory: pathlib.Path) -> bool:
    """Returns whether a directory holds a completely tokenised corpus."""
    return (directory / "corpus.json").exists()


def open_tokens(directory: pathlib.Path, job: Job | None = None) -> tuple[MappedTable, Counts]:
    """Opens a corpus that `tokenise_on_disk` has tokenised; the corpus itself may be gone.

    Args:
        directory: the directory of the files.
        job: how damaged parts are made again; None refuses them.
    """
    stored = _read_json(directory / "corpus.json")
    infos = [info_from_json(fields) for fields in stored["parts"]]
    if stored["skipped"]:
        warnings.warn(f"{stored['skipped']} records are not UTF-8 and are left out", stacklevel=2)

    def make_again(part: int) -> None:
        name = infos[part].name
        warnings.warn(f"{name} is missing or damaged, and made again", stacklevel=2)
        pieces.make_part(job, name)
        if part_files.read_info(directory / "parts" / name) != infos[part]:
            raise CorpusError(
                f"{name} of {directory} is damaged, and the corpus that it was made from has "
                "changed; remove that directory, and tokenise it again"
            )

    table = MappedTable(directory / "parts", infos, make_again if job else None)
    return table, Counts(*stored["counts"])


def _begin(directory: pathlib.Path, provenance: dict, source: Source) -> bool:
    """Checks that a directory belongs to this corpus; returns whether it is finished.

    Raises:
        CorpusError: it belongs to another.
    """
    index, folder = directory / "corpus.json", directory / "parts"
    folder.mkdir(parents=True, exist_ok=True)
    begun = folder / "made_from.json"
    stored = _read_json(index) or _read_json(begun)
    states = read_states(source.files) if stored is None else None
    if stored is not None:
        before = stored["made_from"]
        if differing := sorted(
            k for k in before.keys() | provenance.keys() if before.get(k) != provenance.get(k)
        ):
            raise CorpusError(
                f"{directory} was made from another corpus; it differs in {', '.join(differing)}; "
                "remove it, or use another directory"
            )
    if index.exists():
        before = {name: FileState(*state) for name, state in stored["files"].items()}
        states = check_same(before, source.files, str(directory))
        if states != before:
            # A copied corpus: its times are stored, so that the next start need not read the files.
            atomic_file.write_json(index, stored | {"files": _as_json(states)})
        return True
    if stored is not None:
        states = _forget_changed(stored, source, folder)
    begun_with = {"made_from": provenance, "files": _as_json(states), "pieces": _names(source)}
    atomic_file.write_json(begun, begun_with)
    return False


def _forget_changed(stored: dict, source: Source, folder: pathlib.Path) -> dict[str, FileState]:
    """Removes the parts of files that have changed since their tokenisation began.

    Pieces are files up to some size, so a file that changed may have moved others to other pieces.
    """
    before = {name: FileState(*state) for name, state in stored["files"].items()}
    states = read_states(source.files)
    if before.keys() != states.keys():
        differing = ", ".join(sorted(before.keys() ^ states.keys())[:3])
        raise CorpusError(
            f"{folder.parent} was made from another corpus; it differs in its files: {differing}; "
            "remove it, or use another directory"
        )
    pieces_then_and_now = itertools.zip_longest(stored["pieces"], _names(source))
    for number, (then, now) in enumerate(pieces_then_and_now):
        if now is not None and then == now:
            end = read_end(folder, number)
            if all(states[name] == before[name] for name in now):
                continue
            with contextlib.suppress(CorpusError):
                if end is not None:
                    check_same(end.states, {n: source.files[n] for n in now}, str(folder))
                    continue
        for path in folder.glob(f"{number:06d}[-.]*"):
            path.unlink()
    return states


def _names(source: Source) -> list[list[str]]:
    return [list(piece.files) for piece in source.pieces]


def _work(job: Job, name: str, engine: Engine) -> Work:
    """Describes the turns at a corpus as groups of an engine's work."""
    workers, count = tokenising.count_workers(job.source), len(job.source.pieces)
    # Enough turns for all workers of all programs, and the same in all, whose hosts may differ.
    programs = engine.programs or workers * jax.process_count()
    stride = processes.on_first_process("cut the corpus", lambda: -(-programs // max(1, count)))
    turns = [Turn(piece, turn, stride) for piece in range(count) for turn in range(stride)]
    ends: dict[int, pieces.PieceEnd | None] = {}

    def list_missing() -> list[int]:
        parts = pieces.list_parts(job.folder)
        for piece in range(count):
            if ends.get(piece) is None:
                ends[piece] = read_end(job.folder, piece)
        return [
            i
            for i, turn in enumerate(turns)
            if (end := ends[turn.piece]) is None
            or not parts.get(turn.piece, set()).issuperset(range(turn.turn, end.parts, stride))
        ]

    def find_missing() -> list[int]:
        for piece, numbers in pieces.list_parts(job.folder).items():
            for number in numbers:
                if pieces.read_part(job.folder, piece, number) is None:
                    pieces.remove_part(job.folder, piece, number)
        return list_missing()

    def compute(numbers: Sequence[int]) -> None:
        tokenising.make_all(job, [turns[i] for i in numbers], workers)

    return Work(name, compute, find_missing, list_missing, precedes_training=True)


def _finish(job: Job, provenance: dict, index: pathlib.Path) -> None:
    """Checks the documents' names and writes the index, which makes the table complete."""
    if index.exists():  # another task of an array wrote it
        return
    infos, files, skipped = [], {}, 0
    for piece in range(len(job.source.pieces)):
        end = read_end(job.folder, piece)
        for number in range(end.parts):
            infos += pieces.read_part(job.folder, piece, number)
        files |= end.states
        skipped += end.skipped
    if not sum(info.rows for info in infos):
        raise CorpusError(_NO_TEXT)

    def hashes_of(number: int) -> np.ndarray:
        arrays = map_arrays(job.folder / infos[number].name)
        return arrays["name_hashes"][: -1 if infos[number].is_open else None]

    def name_of(number: int, i: int) -> str:
        arrays = map_arrays(job.folder / infos[number].name)
        return Strings(arrays["names"], arrays["name_ends"])[i]

    check_unique([x.names - x.is_open for x in infos], hashes_of, name_of)
    stored = {
        "made_from": provenance,
        "files": _as_json(files),
        "skipped": skipped,
        "counts": np.sum([info.counts for info in infos], axis=0).tolist(),
        "parts": [dataclasses.asdict(info) for info in infos],
    }
    atomic_file.write_json(index, stored)


def _as_json(states: Mapping[str, FileState]) -> dict[str, list]:
    return {name: list(dataclasses.astuple(state)) for name, state in states.items()}


def _joined(parts: list[dict]) -> dict[str, np.ndarray]:
    """Joins the arrays of all parts in memory."""
    out: dict[str, list] = {k: [] for k in ARRAYS}
    shift: collections.Counter = collections.Counter()
    for part in parts:
        for k, x in part.items():
            out[k].append(x + shift[k] if k in _SHIFTED else x)
        shift.update({k: len(part[target]) for k, target in _SHIFTED.items()})
    return {k: np.concatenate(x) for k, x in out.items()}


# Arrays of offsets, which are shifted when parts are joined, and the arrays that they point into.
_SHIFTED = {"ends": "tokens", "owners": "name_ends", "name_ends": "names"}


def _table(arrays: dict[str, np.ndarray]) -> TokenTable:
    names = Strings(arrays["names"], arrays["name_ends"])
    ids = PassageNames(names, arrays["owners"], arrays["spans"])
    starts = np.concatenate([[0], arrays["ends"]]).astype(np.int64)
    scored = np.array(arrays["scored"])
    scored[starts[:-1]] = False  # nothing predicts the first token
    documents = DocumentNames(names, arrays["owners"])
    return TokenTable(ids, documents, arrays["tokens"], starts, scored)


def _sum(counts: Iterable[Counts]) -> Counts:
    return Counts(*map(sum, zip(*map(dataclasses.astuple, counts), strict=True)))


def _read_json(path: pathlib.Path):
    return atomic_file.read_json(path) if path.exists() else None
