"""Exact search against the disk, the processor, FAISS and NumPy.

    python -m benchmarks.retrieval --json=retrieval.json

1. A store of random bfloat16 rows is searched from the disk, a part of its files at a time, in turn
   with plain sequential reading of the same files and with the bare float32 matrix product of as
   many rows. The share is the time of the slower of these two, over all parts, over that of the
   search. Each side's files are first dropped from the page cache, as for a corpus larger than the
   memory. Parts are short, since shared machines change their speed within seconds.
2. Peak memory of a process that searches all rows, over that of one that searches a tenth.
3. Float32 rows in memory: an `ExactSearch` that holds them, in turn with FAISS's flat index and
   NumPy's product and partition, each for proponents alone and for both; the results are compared.
"""

import functools
import json
import os
import pathlib
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from benchmarks import record
from tda import store as stores
from tda.retrieval import exact
from tda.retrieval.scorer import Scorer
from tda.retrieval.sources import InMemory
from tda.runtime import huge_pages, progress

_WORKDIR = flags.DEFINE_string("workdir", None, "where the stores are made; temporary if unset")
_ROWS = flags.DEFINE_integer("rows", 1_000_000, "rows of the large store; a small one has a tenth")
_WIDTH = flags.DEFINE_integer("width", 4096, "numbers in a row")
_QUERIES = flags.DEFINE_list("queries", ["16", "128", "1000"], "how many, each by itself")
_IN_MEMORY = flags.DEFINE_integer("in_memory", 100_000, "rows for FAISS and NumPy")
_PARTS = flags.DEFINE_integer("parts", 15, "that the large store is searched in")
_ROUNDS = flags.DEFINE_integer("rounds", 2, "rounds over all parts")
_MEMORY_ROUNDS = flags.DEFINE_integer("memory_rounds", 7, "rounds of the sides in memory")
_CHILD = flags.DEFINE_string("child", None, "for internal use: search this store, print the peak")

K = 10
METHOD = {"cosine": Scorer(None, True)}


def make(path: str, rows: int, width: int) -> stores.GradientStore:
    """Makes a store of random rows, or completes an unfinished one."""
    ids = [str(i) for i in range(rows)]
    store = stores.create(path, ids, {"block": width}, {"benchmark": "retrieval"}, "bfloat16")
    missing, shards = store.missing(), store.shards()
    done = rows - sum(_length(shards[i]) for i in missing)
    with progress.bar(rows, "make rows", "row", done) as bar:
        for i in missing:
            count = _length(shards[i])
            rng = np.random.default_rng(i)
            store.write(i, rng.standard_normal((count, width), np.float32))
            bar.update(count)
    return store


def _length(rows: slice) -> int:
    return rows.stop - rows.start


def queries_of(count: int, width: int) -> np.ndarray:
    """Returns random queries, float32 [Q, E]."""
    return np.random.default_rng(10**6).standard_normal((count, width), np.float32)


def files_of(store: stores.GradientStore) -> list[str]:
    """Returns the files of the rows."""
    found = pathlib.Path(store.path, "0", "gradients").glob("c.*.0")
    return [str(p) for p in sorted(found, key=lambda p: int(p.name.split(".")[1]))]


def read_plainly(files: list[str], buffer: bytearray) -> None:
    """Reads files from end to end into the same memory."""
    for name in files:
        with open(name, "rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
            while file.readinto(buffer):
                pass


def product_of(queries_QxE: np.ndarray):
    """Returns the fastest of several bare float32 products with rows, and its order and step."""
    width = queries_QxE.shape[1]
    either = {
        "queries first": jax.jit(lambda q, x: jnp.matmul(q, x.T)),
        "rows first": jax.jit(lambda q, x: jnp.matmul(x, q.T)),
    }
    queries = jax.device_put(queries_QxE)

    def call(name: str, step: int):
        x = jax.device_put(np.ones((step, width), np.float32))

        def run(rows: int):
            for _ in range(-(-rows // step)):
                out = either[name](queries, x)
            jax.block_until_ready(out)

        return run

    ways = {(name, step): call(name, step) for name in either for step in (512, 2048, 8192)}
    few = {way: functools.partial(run, 8192) for way, run in ways.items()}
    times = record.in_turns(few, 5)
    best = min(few, key=lambda way: statistics.median(times[way]))
    return ways[best], best


class _Part:
    """Consecutive shards of a store, as a source: part `number` of `parts`."""

    def __init__(self, store: stores.GradientStore, number: int, parts: int):
        self._store, self.form = store, store.form
        shards = np.array_split(np.arange(len(store.shards())), parts)[number]
        self.files = [files_of(store)[i] for i in shards]
        self._start = store.shards()[shards[0]].start
        self.rows = store.shards()[shards[-1]].stop - self._start

    def scan(self, step: int, rows: range):
        """Yields the rows of these shards."""
        return self._store.scan(step, range(self._start + rows.start, self._start + rows.stop))


def from_disk(store: stores.GradientStore, count: int, parts: int) -> dict:
    """Measures search, reading and product in turns, part by part, with `count` queries."""
    buffer, queries = bytearray(16 << 20), queries_of(count, store.width)
    multiply, step = product_of(queries)
    parts = min(parts, len(store.shards()))
    sources = [_Part(store, i, parts) for i in range(parts)]
    sides = {
        "search": lambda part: exact.search(queries, part, METHOD, K),
        "read": lambda part: read_plainly(part.files, buffer),
        "product": lambda part: multiply(part.rows),
    }
    for call in sides.values():
        call(sources[0])
    seconds = {name: [] for name in sides}
    for turn in range(_ROUNDS.value * parts):
        part = sources[turn % parts]
        # Every side comes first, second and last equally often.
        order = list(sides)[turn % 3 :] + list(sides)[: turn % 3]
        for name in order:
            record.forget(part.files)
            started = time.perf_counter()
            sides[name](part)
            seconds[name].append(time.perf_counter() - started)
    total = {name: sum(t) / _ROUNDS.value for name, t in seconds.items()}
    size = sum(os.path.getsize(f) for part in sources for f in part.files)
    figures = {
        "queries": count,
        "rows": store.rows,
        "bytes": size,
        "product's step": step,
        "share": max(total["read"], total["product"]) / total["search"],
        **{f"{name}, s": t for name, t in total.items()},
        "search, GB/s": size / total["search"] / 1e9,
        "seconds by part": seconds,
    }
    print(
        f"{count} queries, {store.rows:,} rows: search {total['search']:.1f} s "
        f"({figures['search, GB/s']:.2f} GB/s), reading {total['read']:.1f} s, product "
        f"{total['product']:.1f} s: share {figures['share']:.2f}",
        flush=True,
    )
    return figures


def peak(path: str, count: int) -> float:
    """Returns the peak MiB of a separate process that searches a store."""
    command = [sys.executable, "-m", "benchmarks.retrieval", f"--child={path}"]
    out = subprocess.run(
        [*command, f"--queries={count}"], check=True, capture_output=True, text=True
    )
    return json.loads(out.stdout.splitlines()[-1])


def in_memory(rows: int, width: int, count: int) -> dict:
    """Measures ours, FAISS and NumPy on the same rows in memory."""
    import faiss

    passages = np.random.default_rng(0).standard_normal((rows, width), np.float32)
    queries = queries_of(count, width)
    index = faiss.IndexFlatIP(width)
    index.add(passages)
    held = exact.ExactSearch(InMemory(passages, [slice(0, width)]), hold=True)
    dot = {"dot": Scorer(None, False)}

    def with_numpy(both: bool = False):
        scores = queries @ passages.T
        found = _top(scores)
        return (found, _top(-scores)) if both else found

    ours = functools.partial(held.rank, queries, dot, K, opponents=False)
    both = np.concatenate([queries, -queries])
    sides = {
        "ours": ours,
        "ours, both": functools.partial(held.rank, queries, dot, K),
        "faiss": lambda: index.search(queries, K),
        "faiss, both": lambda: index.search(both, K),
        "numpy": with_numpy,
        "numpy, both": lambda: with_numpy(both=True),
    }
    found = ours()["dot"].proponents
    alike = {
        "faiss": float((index.search(queries, K)[1] == found).mean()),
        "numpy": float((with_numpy() == found).mean()),
    }
    times = record.in_turns(sides, _MEMORY_ROUNDS.value, warm_ups=1)
    figures = {"queries": count, "rows": rows, "same rows found": alike}
    for name, t in times.items():
        figures[f"{name}, s"] = statistics.median(t)
        same_work = times["ours, both" if name.endswith(", both") else "ours"]
        ratios = [x / y for x, y in zip(t, same_work, strict=True)]
        figures[f"{name} over ours"] = statistics.median(ratios)
    told = {n: round(figures[f"{n} over ours"], 2) for n in times if not n.startswith("ours")}
    print(
        f"{rows:,} rows in memory, {count} queries: time over ours {told}; the same rows: {alike}"
    )
    return figures


def _top(scores_QxC: np.ndarray) -> np.ndarray:
    """Returns the K rows with the largest scores, best first."""
    top = np.argpartition(scores_QxC, -K, axis=1)[:, -K:]
    order = np.argsort(-np.take_along_axis(scores_QxC, top, 1), axis=1, kind="stable")
    return np.take_along_axis(top, order, 1)


def main(argv):
    """Makes the stores, measures, prints."""
    del argv
    if _CHILD.value:
        store = stores.open_store(_CHILD.value)
        exact.search(queries_of(int(_QUERIES.value[0]), store.width), store, METHOD, K)
        print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))
        return
    root = _WORKDIR.value or tempfile.mkdtemp(prefix="retrieval_")
    counts = [int(q) for q in _QUERIES.value]
    try:
        rows, width = _ROWS.value, _WIDTH.value
        small = make(f"{root}/small", rows // 10, width)
        large = make(f"{root}/large", rows, width)
        figures = {"from disk": [from_disk(large, count, _PARTS.value) for count in counts]}
        peaks = {s.rows: peak(s.path, counts[-1]) for s in (small, large)}
        figures["peak, MiB"] = peaks
        figures["peak over a tenth's"] = peaks[large.rows] / peaks[small.rows]
        print(
            f"peak memory, MiB by rows: {peaks}: {figures['peak over a tenth' + chr(39) + 's']:.3f}"
        )
        figures["in memory"] = [in_memory(_IN_MEMORY.value, width, c) for c in counts]
    finally:
        if not _WORKDIR.value:
            shutil.rmtree(root)
    record.write("retrieval", figures)


if __name__ == "__main__":
    huge_pages.use()
    app.run(main)
