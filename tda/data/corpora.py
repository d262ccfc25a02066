"""Reads corpora of many forms as a stream of documents, only a few of them in memory at a time.

The forms are JSON lines and arrays, CSV, Parquet, a Hugging Face `datasets` directory on disk, a
folder of text files, and a TFDS dataset by its name.
"""

import dataclasses
import functools
import glob
import heapq
import os
import pathlib
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

from tda.data import jsonl, readers
from tda.data.documents import Document
from tda.data.folders import CorpusError, kind_of, list_corpus, names_of
from tda.data.pieces import Piece
from tda.runtime.fingerprint import hash_64_bits
from tda.runtime.patterns import compile_pattern

KINDS = ("jsonl", "csv", "parquet", "datasets", "texts", "tfds")
_READERS = {
    "jsonl": readers.from_jsonl,
    "csv": readers.from_csv,
    "parquet": readers.from_parquet,
    "datasets": readers.from_arrow,
    "texts": readers.from_texts,
}
# Bytes of small files, and rows of a dataset, that are read as a piece.
_PIECE_BYTES = 64 << 20
_PIECE_ROWS = 1 << 16
# The names that `tfds.builder` takes: DATASET[/CONFIG][:VERSION].
_TFDS = re.compile(r"([a-zA-Z]\w*)(/[\w+.-]+)?(:(\d+|\*)(\.(\d+|\*)){2})?")


@dataclasses.dataclass
class Corpus:
    """A corpus by its name: an iterable of its documents, in its own order.

    `tda.data.folders` has the rule by which the corpus's files in a folder are chosen.

    Attributes:
        source: a file, a glob pattern, a list of files, a folder, or the name of a TFDS dataset
            such as "c4/en" or "c4/en:3.0.1".
        kind: "jsonl" (JSON lines, or a JSON array), "csv" (with a header; tabs in .tsv files),
            "parquet", "datasets" (the output of `Dataset.save_to_disk`), "texts" (every .txt file
            is a document) or "tfds"; by default the names of the files decide. Text files may be
            compressed (.gz, .zst).
        text_field: the field or column of the text; a null text is blank.
        id_field: the field or column of the id; by default "id", "sentence_id", "doc_id", "docid"
            or "_id" if there is one, else documents are named by their file's path in the folder
            and their number, from 0.
        split: the split of a TFDS dataset, or of a folder with several.
        data_dir: the directory of TFDS datasets; TFDS's default if None.
        undecodable: "refuse" records that are not UTF-8, or "skip" and count them.
        share: the share of the documents to read, drawn by a hash of their ids, from 0 to 1.
        duplicate_ids: "refuse" them, or "number": the second document of the id X becomes X~2
            (which keeps a number for every id in memory).
        skipped: how many records the last iteration skipped.

    Raises:
        FileNotFoundError: no file or directory has that name.
        CorpusError: the kind or an option is unknown, or an option has no effect; in an
            iteration, a field is missing or not Unicode, or a package is not installed.
        tda.data.jsonl.RecordError: in an iteration, a line is not JSON.
    """

    source: str | os.PathLike | Sequence[str | os.PathLike]
    kind: str | None = None
    text_field: str = "text"
    id_field: str | None = None
    split: str = "train"
    data_dir: str | os.PathLike | None = None
    undecodable: str = "refuse"
    duplicate_ids: str = "refuse"
    share: float = 1.0
    skipped: int = dataclasses.field(default=0, init=False, compare=False)

    def __post_init__(self):
        if self.kind not in (None, *KINDS):
            raise CorpusError(f"unknown kind of corpus {self.kind!r}; use {', '.join(KINDS)}")
        for name, choices in (
            ("undecodable", ("refuse", "skip")),
            ("duplicate_ids", ("refuse", "number")),
        ):
            if getattr(self, name) not in choices:
                raise CorpusError(f"{name}={getattr(self, name)!r}; use {' or '.join(choices)}")
        if not 0 < self.share <= 1:
            raise CorpusError(f"share={self.share!r} of the documents; give one above 0, at most 1")
        if isinstance(self.source, bytes) or (isinstance(self.source, str) and not self.source):
            raise CorpusError(f"{self.source!r} is no corpus; give a path, a pattern or a list")
        self._kind, self._files = self._find()
        self._check_options()

    def __iter__(self) -> Iterator[Document]:
        skipped = 0
        count = len(self._ranges if self._kind == "tfds" else self.pieces)
        for piece in range(count):
            yield from self.read(piece)
            skipped += self.skipped
        self.skipped = skipped
        if skipped:
            warnings.warn(f"{self.source}: {skipped} records are not UTF-8", stacklevel=2)

    def describe(self) -> dict:
        """Returns JSON values that tell this corpus from others, apart from its files."""
        fields = self.as_json() | {"kind": self._kind}
        return {k: v for k, v in fields.items() if k not in ("source", "data_dir")}

    def as_json(self) -> dict:
        """Returns the arguments that make this corpus in another process, as JSON values."""
        options = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.init}
        is_path = isinstance(self.source, str | os.PathLike)
        options["source"] = os.fspath(self.source) if is_path else list(map(os.fspath, self.source))
        if self.data_dir is not None:
            options["data_dir"] = os.fspath(self.data_dir)
        return options

    def labels(self, field: str) -> dict[str, str]:
        """Reads a field of every document, such as its source or year, in two passes.

        `tda.answers.TraceResult.by` sums scores by such labels.

        Args:
            field: the field or column; numbers become strings.

        Returns:
            The labels by the documents' ids, of a share of the documents too for all of them.

        Raises:
            CorpusError: a document lacks the field, or has neither a string nor a number there, or
                two have one id.
        """
        documents = dataclasses.replace(self, share=1.0)
        # A document's id may be a number too, and its text may not.
        labelled = dataclasses.replace(documents, id_field=field, duplicate_ids="refuse")
        labels: dict[str, str] = {}
        for document, label in zip(documents, labelled, strict=True):
            if document.id in labels:
                raise CorpusError(
                    f"two documents have the id {document.id!r}, so it has no one label; give them "
                    "other ids, or use duplicate_ids='number'"
                )
            labels[document.id] = label.id
        return labels

    @functools.cached_property
    def pieces(self) -> list[Piece]:
        """The pieces of the corpus that are read independently: files, or ranges of rows."""
        if self._kind == "tfds":
            # All files belong to the first piece, so that each is checked once.
            return [
                Piece(() if rows.start else tuple(self.files), len(rows)) for rows in self._ranges
            ]
        sizes_by_name = {name: os.path.getsize(path) for name, path in self.files.items()}
        groups: list[list[str]] = []
        left = 0
        for name, size in sizes_by_name.items():
            # Numbered ids depend on all documents before, so then all files are one piece. Small
            # files, such as those of one document each, share a piece.
            if not groups or (self.duplicate_ids == "refuse" and size > left):
                groups.append([])
                left = _PIECE_BYTES
            groups[-1].append(name)
            left -= size
        return [Piece(tuple(g), sum(sizes_by_name[n] for n in g)) for g in groups]

    @functools.cached_property
    def files(self) -> dict[str, str]:
        """The path of every file, by a name that does not depend on where the corpus lies."""
        if self._kind == "datasets":
            path = pathlib.Path(os.path.expanduser(os.fspath(cast(str, self.source))))
            files = readers.datasets_files(path, self.split)
        elif self._kind == "tfds":
            files = readers.list_tfds_files(cast(str, self.source), self.split, self.data_dir)
        else:
            return {name: path for path, name in self._files.items()}
        return {os.path.basename(file): file for file in files}

    @property
    def unit(self) -> str:
        """What a piece's size counts: "B", or "document"."""
        return "document" if self._kind == "tfds" else "B"

    def read(self, piece: int) -> Iterator[Document]:
        """Yields the documents of a piece."""
        self.skipped = 0
        documents = self._read(piece)
        if self.share < 1:
            # The sample does not depend on which process reads which piece.
            most = self.share * 2**64
            documents = (d for d in documents if hash_64_bits(f"share {d.id}") < most)
        return _number(documents) if self.duplicate_ids == "number" else documents

    def _check_options(self) -> None:
        """Checks that the given options have an effect on this kind of corpus."""
        is_folder = isinstance(self.source, str | os.PathLike) and os.path.isdir(
            os.path.expanduser(self.source)
        )
        for name, default, has_effect, condition in (
            ("text_field", "text", self._kind != "texts", "the text of a text file is all of it"),
            ("id_field", None, self._kind != "texts", "text files are named by their paths"),
            ("split", "train", self._kind == "tfds" or is_folder, "files have no splits"),
            ("data_dir", None, self._kind == "tfds", "it is for TFDS datasets"),
            ("undecodable", "refuse", self._kind != "tfds", "TFDS decodes texts itself"),
        ):
            value = getattr(self, name)
            if value != default and not has_effect:
                raise CorpusError(
                    f"{name}={os.fspath(value)!r} has no effect on {self.source}: {condition}; "
                    "leave it out"
                )

    def _find(self) -> tuple[str, dict[str, str]]:
        """Returns the kind, and the corpus's files with their names in ids."""
        if not isinstance(self.source, str | os.PathLike):
            if not isinstance(self.source, Iterable):
                raise CorpusError(f"{self.source!r} is no corpus; give a path, a pattern or a list")
            files = jsonl.expand(self.source)
            return self.kind or _kind_of_all(files), names_of(files, None)
        path = pathlib.Path(os.path.expanduser(os.fspath(self.source)))
        if path.is_dir() and self.kind != "tfds":
            is_dataset = any((path / n).exists() for n in ("state.json", "dataset_dict.json"))
            if self.kind == "datasets" or (self.kind is None and is_dataset):
                return "datasets", {}
            kind, files = list_corpus(path, self.kind, self.split)
            return kind, names_of(files, path)
        kind = self.kind or _guess_kind(self.source)
        if kind in ("tfds", "datasets"):
            return kind, {}
        files = jsonl.expand(path)
        return self.kind or _kind_of_all(files), names_of(files, None)

    @functools.cached_property
    def _rows(self) -> Any:
        return readers.open_tfds(os.fspath(cast(str, self.source)), self.split, self.data_dir)

    @property
    def _ranges(self) -> list[range]:
        """The rows of each piece of a dataset."""
        count = len(self._rows)
        step = _PIECE_ROWS if self.duplicate_ids == "refuse" else max(1, count)
        return [range(start, min(count, start + step)) for start in range(0, count, step)]

    def _read(self, piece: int) -> Iterator[Document]:
        fields = self.text_field, self.id_field
        on_undecodable = None if self.undecodable == "refuse" else self._skip
        if self._kind == "tfds":
            name = f"{os.fspath(cast(str, self.source))}/{self.split}"
            yield from readers.from_rows(self._rows, name, self._ranges[piece], *fields)
            return
        read = _READERS[self._kind]
        for name in self.pieces[piece].files:
            yield from read(self.files[name], name, *fields, on_undecodable)

    def _skip(self, message: str) -> None:
        self.skipped += 1


def _number(documents: Iterable[Document]) -> Iterator[Document]:
    """Adds a number to the id of each document whose id came before."""
    counts: dict[int, int] = {}
    for document in documents:
        name, first = document.id, hash_64_bits(document.id)
        while (key := hash_64_bits(name)) in counts:
            counts[first] += 1
            name = f"{document.id}~{counts[first]}"
        counts[key] = 1
        yield dataclasses.replace(document, id=name)


def sample(
    documents: Iterable[Document], count: int, keep: str | None = None, seed: int = 0
) -> list[Document]:
    """Draws documents uniformly from a corpus; returns them in its order.

    Args:
        documents: the documents, read once.
        count: the number of documents to draw (all if there are fewer).
        keep: a regular expression; every document whose text matches it is in the sample, even if
            these are more than `count`.
        seed: the seed of the draw, which depends on the documents' ids and nothing else.

    Raises:
        ValueError: `keep` is not a regular expression.
    """
    pattern = compile_pattern("keep", keep) if keep else None
    matching, drawn = [], []
    for i, document in enumerate(documents):
        if pattern is not None and pattern.search(document.text):
            matching.append((i, document))
            continue
        # The documents with the smallest hashes stay. Python's heap has its smallest item on top,
        # so hashes are negated: the top is the largest hash that stays.
        item = (-hash_64_bits(f"{seed} {document.id}", "big"), i, document)
        if len(drawn) < count:
            heapq.heappush(drawn, item)
        elif drawn and item > drawn[0]:
            heapq.heapreplace(drawn, item)
    rest = sorted(drawn, reverse=True)[: max(0, count - len(matching))]
    return [d for _, d in sorted([*matching, *((i, d) for _, i, d in rest)], key=lambda x: x[0])]


def describe_files(source: str | os.PathLike) -> list:
    """Returns names, sizes and times of change of the files of a path or pattern.

    A directory stands for all files below it. Returns the name itself if it names no file.
    """
    name = os.path.expanduser(os.fspath(source))
    if os.path.isdir(name):
        files = sorted(str(p) for p in pathlib.Path(name).rglob("*") if p.is_file())
    else:
        files = sorted(glob.glob(name, recursive=True)) or [name]
    states = {f: os.stat(f) for f in files if os.path.exists(f)}
    names = names_of(list(states), None)
    return [[names[f], s.st_size, s.st_mtime_ns] for f, s in states.items()] or [os.fspath(source)]


def _kind_of_all(files: Sequence[str]) -> str:
    """Returns the kind that all files have.

    Raises:
        CorpusError: they have several.
    """
    kinds = {file: _guess_kind(file) for file in files}
    examples = {kind: os.path.basename(file) for file, kind in reversed(kinds.items())}
    if len(examples) > 1:
        shown = ", ".join(f"{kind} ({name})" for kind, name in examples.items())
        raise CorpusError(
            f"the files are of several kinds, {shown}; give files of one kind, or in Python "
            "Corpus(…, kind=) if they are all of one"
        )
    return next(iter(examples))


def _guess_kind(source: str | os.PathLike) -> str:
    name = os.path.expanduser(os.fspath(source))
    path = pathlib.Path(name)
    # `x.jsonl-00003-of-00020` has the kind of `x.jsonl`, and `c4/*` that of its first file.
    files = sorted(f for f in glob.glob(name, recursive=True) if os.path.isfile(f))
    first = re.sub(r"-\d+-of-\d+$", "", files[0] if files else path.name)
    if kind := kind_of(first):
        return kind
    if files:
        raise CorpusError(
            f"{source}: no kind of corpus has that suffix; rename the file, or give "
            f"in Python Corpus(path, kind=) with one of {', '.join(KINDS)}"
        )
    if path.is_absolute() or name.startswith(".") or (path.suffix and not _names_tfds(name)):
        raise FileNotFoundError(f"{source}: no such corpus")
    return "tfds"


def _names_tfds(name: str) -> bool:
    """Returns whether a name with a dot names a TFDS dataset rather than a missing file."""
    match = _TFDS.fullmatch(name)
    if match is None:
        return False
    dataset, config, version = match[1], match[2], match[3]
    # A config may have a dot ("wikipedia/20220301.en"); so may a file in a directory.
    return version is not None or (config is not None and not os.path.isdir(dataset))
