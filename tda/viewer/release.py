"""Writes a finished run as a folder to publish on any web server or on GitHub Pages.

    OUT/index.html, …            the viewer of static files (`tda.viewer.export`)
    OUT/queries.jsonl            prompts and targets, and what the model says
    OUT/results/METHOD.jsonl.gz  each method's retrievals, in the format of `tda.results`
    OUT/metrics.json             all figures
    OUT/config.json              the run's settings
    OUT/README.md                the data card (`tda.viewer.data_card`)

Paths of files that the run read are shortened to their names.
"""

import gzip
import json
import os
import pathlib
import re
import shutil

from tda.runtime.atomic_file import open_atomic
from tda.viewer import data_card, opening
from tda.viewer.export import export
from tda.viewer.results_file import ResultsFile

# Fields of a method's retrieval, in contrast to those of the query.
_OF_RETRIEVAL = re.compile(r"(proponent|opponent|first_)")
# Keys of a config that name files, and those that name files or else a data set or a model.
_FILES = ("data.sentences", "data.facts", "data.queries", "data.dir", "store.root")
_LISTS = ("data.corpus", "data.also_train_on")  # several with commas
_FILES_OR_NAMES = (*_LISTS, "model.pretrained", "dense.model", "judge.model")
_LICENCE = re.compile(r"^license:.*$", re.MULTILINE)


def release(workdir: str, out: str) -> int:
    """Writes the release of a finished run; returns its size in bytes.

    Args:
        workdir: the run's directory.
        out: the folder. An earlier release there is replaced, except for the licence in its card.

    Raises:
        ValueError: the run has not finished, or `out` holds other files.
        OSError: a file cannot be read or written.
    """
    source, target = pathlib.Path(workdir), pathlib.Path(out)
    for name in ("metrics.json", "config.json"):
        if not (source / name).is_file():
            raise ValueError(f"{source} has no {name}; a release needs a run that has finished")
    collection = opening.collect(workdir, [], None, os.devnull)
    collection.links = [["data card", "README.md"], ["queries", "queries.jsonl"]]
    card = target / "README.md"
    licence = _LICENCE.search(card.read_text("utf-8")) if card.is_file() else None
    export(collection, target)
    shutil.rmtree(target / "results", ignore_errors=True)
    (target / "results").mkdir()
    for file in collection.files:
        _pack(file.path, target / "results" / f"{file.label}.jsonl.gz")
    _write_queries(collection.files[0], target / "queries.jsonl")
    names = _public_names(json.loads((source / "config.json").read_text("utf-8")))
    for name in ("config.json", "metrics.json"):
        _write(target / name, (source / name).read_text("utf-8"), names)
    index = target / "data" / "index.js"
    _write(index, index.read_text("utf-8"), names)
    # Without this file GitHub Pages runs Jekyll, which leaves some files out.
    (target / ".nojekyll").touch()
    text = data_card.describe(collection, source, target)
    if licence:
        text = _LICENCE.sub(lambda _: licence[0], text, count=1)
    _write(card, text, names)
    return sum(path.stat().st_size for path in target.rglob("*") if path.is_file())


def _pack(path: str, packed: pathlib.Path) -> None:
    with open(path, "rb") as source, open_atomic(packed, "wb") as out:
        # No time and no name in the header, so that equal results give equal files.
        with gzip.GzipFile("", "wb", fileobj=out, mtime=0) as target:
            shutil.copyfileobj(source, target, 1 << 20)


def _write_queries(file: ResultsFile, path: pathlib.Path) -> None:
    """Writes the queries of a results file, without the retrieved passages."""
    with open_atomic(path) as out:
        for row in range(len(file)):
            fields = {k: x for k, x in file.record(row).items() if not _OF_RETRIEVAL.match(k)}
            out.write(json.dumps(fields, ensure_ascii=False) + "\n")


def _public_names(config: dict, section: str = "") -> dict[str, str]:
    """Returns the last part of each path of this machine in a config, by path."""
    names: dict[str, str] = {}
    for name, value in config.items():
        if isinstance(value, dict):
            names |= _public_names(value, f"{section}{name}.")
        elif isinstance(value, str):
            for path in _paths_in(f"{section}{name}", value):
                # "/" has no last part, and stands for much else in a text.
                if last := os.path.basename(path.rstrip("/")):
                    names[path] = last
    return names


def _paths_in(key: str, value: str) -> list[str]:
    """Returns the paths in a value, not names of data sets and models such as "c4/en"."""
    pieces = [piece.strip() for piece in value.split(",")] if key in _LISTS else [value.strip()]
    if key in _FILES:
        return [piece for piece in pieces if "://" not in piece]
    if key in _FILES_OR_NAMES:
        return [piece for piece in pieces if piece.startswith(("/", "~", "."))]
    # A plugin's key may name a file; other texts, such as patterns, begin with a slash too.
    is_path = value.startswith(("/", "~")) and os.path.exists(os.path.expanduser(value))
    return [value] if is_path else []


def _write(path: pathlib.Path, text: str, names: dict[str, str]) -> None:
    """Writes a text, JSON or not, with the names in place of the paths."""
    for long, short in sorted(names.items(), key=lambda item: -len(item[0])):
        text = text.replace(long, short).replace(json.dumps(long)[1:-1], json.dumps(short)[1:-1])
    with open_atomic(path) as out:
        out.write(text)
