"""The results files, notes, tables and plots that a viewer shows, cut into named pieces.

A page asks for pieces by name, such as `0/records-12`. The server makes each piece on request, and
an export writes them all, so that a page reads both in the same way.
"""

import contextlib
import os
import pathlib
import re
import threading
from collections.abc import Callable, Iterator
from typing import Protocol

from tda.methods import METHODS
from tda.results import ResultsError
from tda.viewer import results_file, run_figures
from tda.viewer.board import Board
from tda.viewer.notes import TYPES, Notes
from tda.viewer.results_file import ResultsFile

_PLOTS = (".png", ".svg")
_MOST_PLOTS = 200
# Characters of a table: a page lays it out as HTML, cell by cell.
_LONGEST_TABLE = 100_000


class Groups(Protocol):
    """Figures of passages by what they have in common.

    Attributes:
        keys: what they may have in common, such as "source".
    """

    keys: tuple[str, ...]

    def figures(self, file: ResultsFile, key: str, row: int | None = None) -> dict:
        """Returns the figures of one query, or the mean of all, as JSON values."""


class Collection:
    """The contents of a viewer.

    Args:
        workdir: the directory of the run whose tables, plots and board are shown, or None.
        notes: the notes on passages; None if notes cannot be taken.

    Raises:
        OSError, ResultsError: the workdir's board cannot be read.
    """

    def __init__(self, workdir=None, notes: Notes | None = None):
        self.workdir = None if workdir is None else pathlib.Path(workdir)
        self.notes = notes
        # Names and addresses of files beside an export that its overview links to.
        self.links: list[list[str]] = []
        # None where nothing is known of the passages' documents.
        self.groups: Groups | None = None
        self.board = self._open_board()
        self.files: list[ResultsFile] = []
        self._lock = threading.Lock()

    def add(
        self, path, label: str = "", title: str = "", on_bytes: Callable[[int], None] | None = None
    ) -> ResultsFile:
        """Opens a results file and adds it to those shown; arguments as for `ResultsFile`.

        The label is by default the file's name, and gets a number if another file has it; the title
        is by default that of the label in `tda.methods`.

        Raises:
            OSError, ResultsError: the file cannot be shown.
        """
        label = label or _stem(path)
        titles = {} if self.board is None else self.board.titles
        title = title or (METHODS[label].title if label in METHODS else titles.get(label, label))
        file = ResultsFile(path, label, title, on_bytes or (lambda n: None))
        # Uploads may add files from several threads at once.
        with self._lock:
            file.label = _unlike(label, [f.label for f in self.files])
            self.files.append(file)
        return file

    def _open_board(self) -> Board | None:
        path = None if self.workdir is None else self.workdir / "board.json"
        return Board(path) if path is not None and path.is_file() else None

    def refresh(self) -> None:
        """Reopens files that have changed; of a deleted or broken file the last state stays."""
        if self.board is None or self.board.stale():
            with contextlib.suppress(OSError, ResultsError):
                self.board = self._open_board() or self.board
        for i, file in enumerate(self.files):
            if file.stale():
                try:
                    new = ResultsFile(file.path, file.label, file.title)
                except (OSError, ResultsError):
                    continue
                # The old file is closed by the garbage collector once no request reads it.
                self.files[i] = new

    def digests(self) -> set[str]:
        """Returns the digests of the files and of the board."""
        boards = [] if self.board is None else [self.board]
        return {shown.digest for shown in (*self.files, *boards)}

    def index(self) -> dict:
        """Returns the piece that a page reads first, which lists the other pieces."""
        return {
            "files": [f.describe() for f in self.files],
            "summary_rows": results_file.SUMMARY_ROWS,
            "record_rows": results_file.RECORD_ROWS,
            "types": TYPES,
            "notes": self.notes is not None,
            "board": None if self.board is None else self.board.digest,
            "keys": [] if self.groups is None else self.groups.keys,
            "run": None if self.workdir is None else run_figures.read(self.workdir),
            "links": self.links,
            "tables": self._tables(),
            "plots": [{"name": n, "file": f"plot-{i}{p.suffix}"} for i, n, p in self._plots()],
        }

    def piece(self, name: str):
        """Returns a piece of the data as a JSON value.

        Args:
            name: "index", "notes", "board", "board-QUERY", "FILE/summaries-CHUNK",
                "FILE/records-CHUNK", "FILE/by-KEY", "FILE/by-KEY-ROW" or "overlap-FILE-FILE", each
                query, key and file by its number.

        Raises:
            KeyError: there is no such piece.
        """
        if name == "index":
            return self.index()
        if name == "notes":
            notes = self.notes
            return {
                "notes": [] if notes is None else notes.all(),
                "counts": {} if notes is None else notes.counts(self.files),
            }
        if self.board is not None and name == "board":
            return self.board.figures()
        if self.board is not None and (match := re.fullmatch(r"board-(\d{1,6})", name)):
            return self.board.changes(int(match[1]))
        if match := re.fullmatch(r"(\d{1,6})/(summaries|records)-(\d{1,9})", name):
            file = self._numbered(match[1], name)
            read_chunk = file.summaries if match[2] == "summaries" else file.records
            try:
                return read_chunk(int(match[3]))
            except IndexError as error:
                raise KeyError(name) from error
        if self.groups is not None and (
            match := re.fullmatch(r"(\d{1,6})/by-(\d{1,6})(?:-(\d{1,9}))?", name)
        ):
            file, key = self._numbered(match[1], name), int(match[2])
            row = None if match[3] is None else int(match[3])
            if key >= len(self.groups.keys) or (row is not None and row >= len(file)):
                raise KeyError(name)
            return self.groups.figures(file, self.groups.keys[key], row)
        if match := re.fullmatch(r"overlap-(\d{1,6})-(\d{1,6})", name):
            one, other = (self._numbered(n, name) for n in match.groups())
            return results_file.overlap(one, other)
        raise KeyError(name)

    def _numbered(self, number: str, name: str) -> ResultsFile:
        if int(number) >= len(self.files):
            raise KeyError(name)
        return self.files[int(number)]

    def pieces(self) -> Iterator[str]:
        """Yields the names of all pieces."""
        yield from ("index", "notes")
        if self.board is not None:
            yield "board"
            yield from (f"board-{i}" for i in range(len(self.board.queries)))
        for i, file in enumerate(self.files):
            for kind, size in (
                ("summaries", results_file.SUMMARY_ROWS),
                ("records", results_file.RECORD_ROWS),
            ):
                for chunk in range(results_file.chunks(len(file), size)):
                    yield f"{i}/{kind}-{chunk}"
            for key in range(0 if self.groups is None else len(self.groups.keys)):
                yield f"{i}/by-{key}"
                yield from (f"{i}/by-{key}-{row}" for row in range(len(file)))
            yield from (f"overlap-{i}-{j}" for j in range(len(self.files)) if j != i)

    def plot(self, file: str) -> pathlib.Path:
        """Returns the path of a plot by its name in the index.

        Raises:
            KeyError: the index has no such plot.
        """
        for i, _, path in self._plots():
            if file == f"plot-{i}{path.suffix}":
                return path
        raise KeyError(file)

    def _plots(self) -> list[tuple[int, str, pathlib.Path]]:
        """Returns (number, name, path) of the plots; links that leave the workdir are skipped."""
        if self.workdir is None:
            return []
        folders = [self.workdir, *(self.workdir / d for d in ("plots", "figures", "sweep"))]
        folders += sorted((self.workdir / "sweeps").glob("*"))
        # A link to a file elsewhere would publish that file.
        root = self.workdir.resolve()
        paths = [
            path
            for folder in folders
            for path in sorted(folder.glob("*"))
            if path.suffix in _PLOTS and path.is_file() and path.resolve().is_relative_to(root)
        ]
        names = (str(p.relative_to(self.workdir)) for p in paths)
        return list(zip(range(_MOST_PLOTS), names, paths, strict=False))

    def _tables(self) -> list[dict]:
        """Returns the workdir's tables as Markdown."""
        out = []
        for name in ("table1.md", "table2.md", "table.md"):
            path = None if self.workdir is None else self.workdir / name
            if path is not None and path.is_file():
                text = path.read_text("utf-8", "replace")[:_LONGEST_TABLE]
                out.append({"name": name, "text": text})
        return out


def _stem(path) -> str:
    name = os.path.basename(os.fspath(path))
    for ending in (".gz", ".jsonl", ".json"):
        name = name.removesuffix(ending)
    # The filter takes a label as one word.
    return re.sub(r"\W+", "_", name).strip("_") or "results"


def _unlike(label: str, labels: list[str]) -> str:
    """Returns the label, with a number if another file has it already."""
    number, out = 2, label
    while out in labels:
        out, number = f"{label}_{number}", number + 1
    return out
