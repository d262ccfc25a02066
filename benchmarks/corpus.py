"""Measures tokenising by core, and the start on a large corpus.

    python -m benchmarks.corpus --rows=10000000 --texts=/path/to/corpus.jsonl.gz

The large corpus is synthetic: parts of random tokens, 8 a passage, so that 10M rows fit a laptop's
disk. A start does what `tda.trace(directory=)` does before its first shard, in a new process: it
opens the tokens, creates the store or finds it, and makes the first batch.
"""

import json
import pathlib
import resource
import subprocess
import sys
import tempfile
import time

import numpy as np
from absl import app, flags

from tda import store as stores
from tda.data import part_files, pieces, tokenised, tokenising
from tda.data.batches import BatchLayout, buckets
from tda.data.corpora import Corpus
from tda.data.file_states import read_states
from tda.data.tokenizer import Tokenizer
from tda.data.tokens import PassageTexts
from tda.runtime import progress
from tda.runtime.fingerprint import hash_64_bits

from . import record

_ROWS = flags.DEFINE_integer("rows", 10_000_000, "Passages of the synthetic corpus.")
_TEXTS = flags.DEFINE_string("texts", None, "A corpus to measure tokenising with.")
_START = flags.DEFINE_string("start", None, "The directory of a start, in a process of its own.")
_PART_ROWS, _LENGTH, _SHARD = 16_384, 8, 4096


class _Synthetic:
    """A corpus of random tokens, whose parts are made without a tokenizer."""

    unit, skipped, files = "document", 0, {}

    def __init__(self, rows: int):
        self.rows = rows
        self.pieces = [pieces.Piece((), rows)]

    def describe(self) -> dict:
        """Returns the number of rows."""
        return {"synthetic": self.rows}

    def read(self, piece: int):
        """Yields nothing: the parts are there."""
        yield from ()

    def write(self, folder: pathlib.Path) -> None:
        """Writes all parts."""
        folder.mkdir(parents=True)
        rng = np.random.default_rng(0)
        starts = range(0, self.rows, _PART_ROWS)
        for number, start in enumerate(starts):
            count = min(_PART_ROWS, self.rows - start)
            names = [f"c4-train.00000-of-01024.json.gz:{start + i}".encode() for i in range(count)]
            hashes = np.array([hash_64_bits(name.decode()) for name in names], np.uint64)
            arrays = {
                "tokens": rng.integers(3, 300, count * _LENGTH, np.int32),
                "scored": np.ones(count * _LENGTH, bool),
                "ends": np.arange(1, count + 1) * _LENGTH,
                "owners": np.arange(count),
                "spans": np.full((count, 2), -1),
                "id_hashes": hashes,
                "names": np.frombuffer(b"".join(names), np.uint8),
                "name_ends": np.cumsum([len(name) for name in names]),
                "name_hashes": hashes,
            }
            path = folder / pieces.file_name(0, number)
            part_files.write(path, arrays, 1, (count, 0, 0), False)
        end = pieces.PieceEnd(len(starts), 0, read_states({}))
        (folder / "000000.json").write_text(json.dumps(end.as_json()))


def _tokenizer() -> Tokenizer:
    return Tokenizer.train(["The capital of France is Paris."], 300)


def _start(directory: pathlib.Path) -> dict:
    """Runs the work before the first shard; returns seconds and memory."""
    before, begin = _memory(), time.perf_counter()
    tokenizer = _tokenizer()
    source = _Synthetic(_ROWS.value)
    with progress.hidden():
        table, _ = tokenised.tokenise_on_disk(directory / "tokens", source, tokenizer, 64)
    opened = time.perf_counter() - begin
    store = stores.create(
        directory / "store",
        table.ids,
        {"block": 64},
        {},
        shard_bytes=_SHARD * 4 * 64,
        documents=table.documents,
        texts=PassageTexts(table, tokenizer),
        corpus=table.fingerprint(),
    )
    shard = store.shards()[0]
    layout = BatchLayout(buckets(64), 4096, tokenizer.pad)
    batch = layout.batches(table, np.arange(shard.start, shard.stop))[0]
    return {
        "open the tokens, s": opened,
        "first batch, s": time.perf_counter() - begin,
        "memory beside the maps, MiB": _memory() - before,
        "scored tokens of the first batch": float(batch.weights.sum()),
    }


def _memory() -> float:
    """Returns the memory of this process that no file backs, in MiB."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("/proc/self/status has no RssAnon; run this on Linux")


def _run_start(directory: pathlib.Path) -> dict:
    command = [sys.executable, "-m", "benchmarks.corpus", f"--start={directory}"]
    command += [f"--rows={_ROWS.value}"]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def _tokenising(directory: pathlib.Path, texts: str) -> dict:
    """Returns the rates of tokenising with one worker and with two."""
    corpus = Corpus(texts)
    tokenizer = Tokenizer.train((d.text for d, _ in zip(corpus, range(300), strict=False)), 8000)
    figures = {}
    for workers in (1, 2):
        tokenising.count_workers = lambda source, n=workers: n
        begin = time.perf_counter()
        times = [
            resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
        ]
        place = directory / f"workers{workers}"
        with progress.hidden():
            table, _ = tokenised.tokenise_on_disk(place, corpus, tokenizer, 512)
        seconds = time.perf_counter() - begin
        after = [
            resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
        ]
        cpu = sum(
            b.ru_utime + b.ru_stime - a.ru_utime - a.ru_stime
            for a, b in zip(times, after, strict=True)
        )
        figures[f"{workers} workers, tokens/s"] = table.token_count / seconds
        figures[f"{workers} workers, tokens/CPU s"] = table.token_count / cpu
        size = sum(p.stat().st_size for p in (place / "parts").iterdir())
        figures["bytes a token"] = size / table.token_count
    return figures


def main(_) -> None:
    """Prints the figures."""
    if _START.value:
        print(json.dumps(_start(pathlib.Path(_START.value))))
        return
    with tempfile.TemporaryDirectory() as name:
        directory, figures = pathlib.Path(name), {}
        if _TEXTS.value:
            figures |= _tokenising(directory, _TEXTS.value)
        _Synthetic(_ROWS.value).write(directory / "tokens" / "parts")
        figures |= {f"first start: {k}": v for k, v in _run_start(directory).items()}
        figures |= _run_start(directory)
    for label, value in figures.items():
        print(f"{label:40} {value:12,.2f}")
    record.write("corpus", figures | {"rows": _ROWS.value})


if __name__ == "__main__":
    app.run(main)
