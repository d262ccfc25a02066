"""Chooses the files of a folder that are a corpus.

The rule: all files below the folder that are of one kind, by their suffix. Links to folders are
followed, and each folder is read once. Hidden files and folders (with a name that begins with `.`
or `_`), texts called README, LICENSE, NOTICE, CITATION or CHANGELOG, and dataset_info.json, never
count. Other files without a known suffix are left out, with a warning that names them. Files of
several kinds are refused. If file or folder names tell splits
apart (`train-00000.parquet`, `test/a.jsonl`, `c4-train.00000-of-01024.json.gz`), one split is read,
by default "train".
"""

import collections
import os
import pathlib
import re
import warnings

# Kinds of files by suffix; `.gz` and `.zst` may follow.
SUFFIXES = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".txt": "texts",
}
_COMPRESSED = (".gz", ".zst")
_ABOUT = re.compile(
    # With the name of a language or of a licence, such as README_zh.md and LICENSE-APACHE-2.0.txt.
    r"(readme([-_.][a-z]{2}([-_][a-z]{2,4})?)?"
    r"|licen[cs]e([-_.](mit|apache|bsd|[al]?gpl|mpl|cc|odc|pddl|isc|third)([-_.][\w-]*)*)?"
    r"|notice|citation|changelog|copying(\.lesser)?)(\.(txt|md|rst|html?|cff|bib))?"
    r"|dataset_infos?\.json",
    re.I,
)
_SPLIT = re.compile(r"(train|validation|valid|val|dev|test)(ing)?([-_.\d].*)?", re.I)
# Shards of several splits in one folder: C4's `c4-validation.00000-of-00008.json.gz`.
_SHARD = re.compile(r".*[-_.](train|validation|valid|val|dev|test)[-_.]\d+-of-\d+.*", re.I)
_ALIASES = {"valid": "validation", "val": "validation", "dev": "validation"}


class CorpusError(ValueError):
    """A corpus cannot be read; the message names the file, the record or the field."""


def kind_of(name: str) -> str | None:
    """Returns the kind of a file by its suffix; None if no kind has it."""
    name = name.lower()
    for ending in _COMPRESSED:
        name = name.removesuffix(ending)
    return SUFFIXES.get(os.path.splitext(name)[1])


def list_corpus(folder: pathlib.Path, kind: str | None, split: str) -> tuple[str, list[str]]:
    """Returns the kind and the files of a folder's corpus, by the rule above.

    Args:
        folder: the folder.
        kind: the kind to read, if several are there.
        split: the split to read, if names tell splits apart.

    Raises:
        CorpusError: there is no file of a corpus, or files of several kinds, or no such split; the
            message lists what is there.
    """
    files: dict[str | None, list[pathlib.Path]] = collections.defaultdict(list)
    for path in _files_below(folder):
        if path.name in ("state.json", "dataset_dict.json"):
            raise CorpusError(
                f"{folder} holds directories of `datasets`, which are corpora of their own, such "
                f"as {path.parent}; name one of them"
            )
        if not _ABOUT.fullmatch(path.name):
            files[kind_of(path.name)].append(path)
    excluded = files.pop(None, [])
    kinds = {k: paths for k, paths in files.items() if kind in (None, k)}
    if len(kinds) != 1:
        reason = "files of several kinds" if kinds else "no file of a corpus that is known"
        raise CorpusError(
            f"{folder} holds {reason}: {_list(folder, files, excluded)}; name those of the corpus "
            f"by a pattern such as '{folder}/**/*.jsonl', or in Python by Corpus(folder, kind=)"
        )
    ((kind, paths),) = kinds.items()
    if excluded:
        warnings.warn(
            f"{folder}: left out of the corpus, {_list(folder, {}, excluded)}", stacklevel=2
        )
    return kind, [os.fspath(p) for p in _choose_split(folder, kind, paths, split)]


def _files_below(folder: pathlib.Path) -> list[pathlib.Path]:
    """Returns the files below a folder that are not hidden, in order.

    `rglob` would pass over links to folders, and folders that cannot be read, without a word.

    Raises:
        CorpusError: a folder cannot be read, or a link leads nowhere.
    """

    def refuse(error: OSError):
        raise CorpusError(f"{error.filename} cannot be read ({error.strerror})") from error

    files: list[pathlib.Path] = []
    seen: set[str] = set()
    tops = [os.fspath(folder)]
    for top in tops:  # which grows: links come after what does not lie behind one
        if os.path.realpath(top) in seen:
            continue
        for directory, folders, leaves in os.walk(top, onerror=refuse):
            seen.add(os.path.realpath(directory))
            paths = {n: os.path.join(directory, n) for n in folders if not _is_hidden(n)}
            tops += sorted(p for p in paths.values() if os.path.islink(p))
            folders[:] = [n for n, p in paths.items() if os.path.realpath(p) not in seen]
            files += [pathlib.Path(directory, n) for n in leaves if not _is_hidden(n)]
    for path in files:
        check_link(path)
    return sorted(path for path in files if path.is_file())


def check_link(path: str | os.PathLike) -> None:
    """Checks that a path is no link to a file that is not there.

    Raises:
        CorpusError: it is one, such as a download that was cut off leaves behind.
    """
    if os.path.islink(path) and not os.path.exists(path):
        raise CorpusError(
            f"{os.fspath(path)} is a link to {os.readlink(path)}, which is not there; fetch the "
            "file again, or remove the link"
        )


def _is_hidden(name: str) -> bool:
    return name.startswith((".", "_"))


def _choose_split(folder, kind: str, paths: list[pathlib.Path], split: str) -> list[pathlib.Path]:
    splits: dict[str | None, list[pathlib.Path]] = collections.defaultdict(list)
    for path in paths:
        *parents, name = path.relative_to(folder).parts
        # A text file is a document, whatever it is called; its folder may be a split.
        names = parents if kind == "texts" else [*parents, name]
        matches = [m for n in names if (m := _SPLIT.fullmatch(n) or _SHARD.fullmatch(n))]
        label = matches[0][1].lower() if matches else None
        splits[_ALIASES.get(label, label) if label else None].append(path)
    if set(splits) == {None}:
        if split != "train":
            raise CorpusError(
                f"{folder}: no file or folder name tells a split, so split={split!r} has no "
                "effect; leave it out, or name the files by a pattern"
            )
        return paths
    counts = ", ".join(f"{k or 'of no split'}: {len(v)}" for k, v in splits.items())
    if None in splits or split not in splits:
        reason = f"has no split {split!r}"
        if None in splits:
            reason = "mixes files of splits with others"
        raise CorpusError(
            f"{folder} {reason} ({counts}); name the files of the corpus by a pattern, or a split "
            "in Python by Corpus(folder, split=)"
        )
    if len(splits) > 1:
        warnings.warn(f"{folder}: the split {split!r} is read ({counts})", stacklevel=2)
    return splits[split]


def _list(folder: pathlib.Path, files: dict, excluded: list[pathlib.Path]) -> str:
    """Lists the suffixes of files with their number and an example."""
    by_suffix = collections.defaultdict(list)
    for path in [p for paths in files.values() for p in paths] + excluded:
        by_suffix[path.suffix or "no suffix"].append(path.relative_to(folder).as_posix())
    parts = [f"{len(n)} of {s} ({n[0]}{', …' if n[1:] else ''})" for s, n in by_suffix.items()]
    return ", ".join(parts) or "nothing"


def names_of(files: list[str], root: str | os.PathLike | None) -> dict[str, str]:
    """Returns each file's name in ids: its path from the folder, or from their common folder.

    Files of one name in two folders keep different names.
    """
    if root is None:
        folders = [os.path.dirname(os.path.abspath(f)) for f in files]
        root = os.path.commonpath(folders) if folders else "."
    return {f: pathlib.Path(os.path.relpath(f, root)).as_posix() for f in files}
