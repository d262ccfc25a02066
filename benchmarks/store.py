"""The gradient store: rates, ten million rows, faults, and search by dtype.

    python -m benchmarks.store --json=store.json

1. Writing and reading a store of random rows, by dtype, in turns with plain sequential writing (and
   one fsync a file, as a store does) and reading of as many bytes. The share is the plain side's
   time over the store's. Rows are already quantised, as an encoder's program does it.
2. A store of ten million rows: making it (passages and look-up by name), opening it, finding a
   passage by id, and planning the batches of as many sequences.
3. Faults: writers killed with SIGKILL at random moments, bits flipped at random places, and a full
   file system; then the store is finished, and compared byte for byte with one without faults.
4. Exact search of the same rows in every dtype, and as 4 pairs of vectors of each block, in turns,
   from the page cache: rows a CPU second, and the rate over int8's, the median of the rounds.

`benchmarks.dtypes` measures the quality of each dtype.
"""

import functools
import os
import pathlib
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
from absl import app, flags

from benchmarks import record
from tda import store as stores
from tda.data import batches
from tda.retrieval import exact
from tda.retrieval.scorer import Scorer
from tda.runtime import huge_pages
from tda.store import codec

_WORKDIR = flags.DEFINE_string("workdir", None, "where stores are made; temporary if unset")
_PARTS = flags.DEFINE_list("parts", ["rates", "rows", "faults", "search"], "which to measure")
_ROWS = flags.DEFINE_integer("rows", 49_152, "rows of 4,096 numbers to write and read")
_ROUNDS = flags.DEFINE_integer("rounds", 5, "rounds of the sides in turns")
_MANY = flags.DEFINE_integer("many", 10_000_000, "rows of the large store")
_KILLS = flags.DEFINE_integer("kills", 60, "writers killed")
_FLIPS = flags.DEFINE_integer("flips", 60, "bits flipped")
_CHILD = flags.DEFINE_string("child", None, "for internal use: write this store")

WIDTH, BLOCKS = 4096, {"a": 2048, "b": 2048}
# Blocks of matrices of side 32.
SQUARES = dict.fromkeys("abcd", 1024)


def rates(root: str) -> dict:
    """Measures part 1: shares of plain writing and reading."""
    x = np.random.default_rng(0).standard_normal((_ROWS.value, WIDTH), np.float32)
    figures = {}
    for dtype in stores.DTYPES:
        ids = [str(i) for i in range(len(x))]
        path = f"{root}/rates"

        def emptied(path=path, dtype=dtype, ids=ids):
            shutil.rmtree(path, ignore_errors=True)
            return stores.create(path, ids, BLOCKS, {}, dtype)

        store = emptied()
        shards, form = store.shards(), store.form
        sizes = [(s.stop - s.start) * form.row_bytes for s in shards]
        encoded = [codec.encode_on_host(x[s], form) for s in shards]
        plain, block = pathlib.Path(root, "plain"), os.urandom(16 << 20)

        def write_plainly(plain=plain, sizes=sizes, block=block):
            for i, size in enumerate(sizes):
                with open(f"{plain}.{i}", "wb", buffering=0) as out:
                    for at in range(0, size, len(block)):
                        out.write(memoryview(block)[: min(len(block), size - at)])
                    os.fsync(out.fileno())

        def write(store=store, encoded=encoded):
            for i, rows_of_shard in enumerate(encoded):
                store.write(i, rows_of_shard)

        def clear(store=store, shards=shards, plain=plain):
            for i in range(len(shards)):
                store.remove(i)
                pathlib.Path(f"{plain}.{i}").unlink(missing_ok=True)

        sides = {"store": write, "plain": write_plainly}
        times = record.in_turns(sides, _ROUNDS.value, 1, clear)
        if store.missing():
            write()
        if not pathlib.Path(f"{plain}.0").exists():
            write_plainly()
        found = {"write, share": _ratio(times["plain"], times["store"])}
        found["write, GB/s"] = sum(sizes) / statistics.median(times["store"]) / 1e9
        buffer = bytearray(16 << 20)

        def read_plainly(plain=plain, sizes=sizes, buffer=buffer):
            for i in range(len(sizes)):
                with open(f"{plain}.{i}", "rb", buffering=0) as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
                    while file.readinto(buffer):
                        pass

        def read(store=store):
            for _ in store.scan(1024):
                pass

        def forget(store=store, plain=plain, sizes=sizes):
            gradients = pathlib.Path(store.path, "0", "gradients").glob("c.*")
            record.forget([*gradients, *(f"{plain}.{i}" for i in range(len(sizes)))])

        sides = {"store": read, "plain": read_plainly}
        times = record.in_turns(sides, _ROUNDS.value, 1, forget)
        found["read, share"] = _ratio(times["plain"], times["store"])
        found["read, GB/s"] = sum(sizes) / statistics.median(times["store"]) / 1e9
        figures[dtype] = found
        print(f"{dtype}: {_told(found)}", flush=True)
        for i in range(len(sizes)):
            os.remove(f"{plain}.{i}")
        shutil.rmtree(path)
    return figures


def _ratio(one: list[float], other: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(one, other, strict=True))


class _Names:
    """Ids of many rows, made on demand."""

    def __init__(self, count: int):
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, row: int) -> str:
        return f"passage-{row}"

    def __iter__(self):
        return map(self.__getitem__, range(self._count))


def rows(root: str) -> dict:
    """Measures part 2: seconds of work that must grow little or not at all with the corpus."""
    path, count, ids = f"{root}/many", _MANY.value, _Names(_MANY.value)
    figures = {"rows": count}

    def timed(name: str, call):
        started = time.perf_counter()
        out = call()
        figures[name] = time.perf_counter() - started
        print(f"{name}: {figures[name]:.3f}", flush=True)
        return out

    make = lambda: stores.create(path, ids, BLOCKS, {}, "bfloat16")  # noqa: E731
    timed("make it, s", make)
    store = timed("open it, s", lambda: stores.open_store(path))
    row = count * 3 // 4
    found = timed("find a passage by id, s", lambda: store.row_of(f"passage-{row}"))
    if found != row:
        raise AssertionError(f"row {found} was found, not {row}")
    timed("read 10 passages at random, s", lambda: store.passages([*range(1, count, count // 10)]))
    timed("list the missing shards, s", store.missing)
    shutil.rmtree(path)
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(3.7, 0.5, count), 4, 128).astype(np.int64)
    timed("plan the batches, s", lambda: batches.plan(lengths, batches.buckets(128), 4096))
    return figures


def faults(root: str) -> dict:
    """Measures part 3: rows lost by kills, damage and a full disk."""
    x = _data()
    whole = _write(f"{root}/whole", x)
    wanted = _contents(f"{root}/whole")
    rng, figures = np.random.default_rng(0), {}
    path, killed, begun = f"{root}/killed", 0, 0
    while killed < _KILLS.value:
        command = [sys.executable, "-m", "benchmarks.store", f"--child={path}"]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        child.stdout.readline()
        time.sleep(rng.uniform(0, 0.4))
        child.send_signal(signal.SIGKILL)
        begun += 1
        if child.wait() == -signal.SIGKILL:
            killed += 1
        else:
            # It had finished before the signal: start again.
            shutil.rmtree(path)
        child.stdout.close()
    _write(path, x)
    figures["writers killed"] = killed
    figures["files that differ after kills"] = _differing(wanted, _contents(path))
    found = 0
    for _ in range(_FLIPS.value):
        files = sorted(pathlib.Path(path, "0", "gradients").glob("c.*"))
        i = int(rng.integers(len(files)))
        raw = bytearray(files[i].read_bytes())
        raw[int(rng.integers(len(raw)))] ^= 1 << int(rng.integers(8))
        files[i].write_bytes(raw)
        store = stores.open_store(path)
        damaged = [n for n in range(len(store.shards())) if store.damage(n)]
        found += damaged == [int(files[i].name.split(".")[1])]
        for n in damaged:
            store.remove(n)
        _write(path, x)
    figures |= {"bits flipped": _FLIPS.value, "found, in the right shard": found}
    figures["files that differ after damage"] = _differing(wanted, _contents(path))
    figures |= _filled(root, x, wanted)
    store = stores.open_store(path)
    figures["rows lost"] = int((store.read(slice(0, store.rows)) != x).any(axis=1).sum())
    print(f"{whole.rows} rows: {_told(figures)}", flush=True)
    return figures


def search(root: str) -> dict:
    """Measures part 4: rows a second in every dtype, without and with whitening."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((_ROWS.value, WIDTH), np.float32)
    ids, by_dtype = [str(i) for i in range(len(x))], {}
    for rank, dtype in [*((0, d) for d in stores.DTYPES), (4, "int8"), (4, "2bit")]:
        name = f"{dtype}, rank {rank}" if rank else dtype
        by_dtype[name] = stores.create(f"{root}/{name}", ids, SQUARES, {}, dtype, rank=rank)
        for i, shard in enumerate(by_dtype[name].shards()):
            by_dtype[name].write(i, x[shard])
    roots = [np.eye(w, dtype=np.float32) for w in SQUARES.values()]
    plain, figures = Scorer(None, True), {}
    for count, scorer in ((16, plain), (128, plain), (16, Scorer(roots, True))):
        queries = rng.standard_normal((count, WIDTH), np.float32)
        sides = {
            dtype: functools.partial(exact.search, queries, store, {"m": scorer})
            for dtype, store in by_dtype.items()
        }
        times = record.in_turns(sides, _ROUNDS.value, 1, clock=time.process_time)
        name = f"{count} queries" + (", whitened" if scorer.roots else "")
        figures[name] = {
            dtype: {
                "rows a CPU second": len(x) / statistics.median(times[dtype]),
                "over int8's": _ratio(times["int8"], times[dtype]),
            }
            for dtype in sides
        }
        for dtype, rates_of_dtype in figures[name].items():
            print(f"{name}, {dtype}: {_told(rates_of_dtype)}", flush=True)
    return figures


def _filled(root: str, x: np.ndarray, wanted: dict) -> dict:
    """Fills a file system at many different moments; needs the right to mount one."""
    disk, refused = pathlib.Path(root, "disk"), 0
    disk.mkdir(exist_ok=True)
    size = sum(map(len, wanted.values()))
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={2 * size}", "tmpfs", disk]).returncode:
        return {"disks filled": 0}
    sizes = range(size // 4, 2 * size, size // 8)
    differing = 0
    try:
        for other in sizes:
            (disk / "other").write_bytes(bytes(other))
            try:
                _write(str(disk / "s"), x)
            except stores.StoreError as error:
                if "No space left" not in str(error):
                    raise
                refused += 1
            (disk / "other").unlink()
            _write(str(disk / "s"), x)
            differing += _differing(wanted, _contents(str(disk / "s")))
            shutil.rmtree(disk / "s")
    finally:
        subprocess.run(["umount", disk], check=True)
    return {"disks filled": refused, "files that differ after full disks": differing}


def _data() -> np.ndarray:
    return np.random.default_rng(1).standard_normal((256, WIDTH), np.float32)


def _write(path: str, x: np.ndarray, slowly: float = 0.0) -> stores.GradientStore:
    """Makes or completes a store of some rows, 8 in a shard, in two segments."""
    half, shard = len(x) // 2, 8 * 4 * WIDTH
    ids, texts = ([f"{word} {i}" for i in range(len(x))] for word in ("passage", "text"))
    first = stores.create(path, ids[:half], BLOCKS, {}, shard_bytes=shard, texts=texts[:half])
    _fill(first, x, slowly)
    both = stores.append(path, ids[half:], {}, shard, texts=texts[half:])
    _fill(both, x, slowly)
    return both


def _fill(store: stores.GradientStore, x: np.ndarray, slowly: float) -> None:
    for i in store.missing():
        time.sleep(slowly)
        store.write(i, x[store.shards()[i]])


def _contents(path: str) -> dict[str, bytes]:
    files = (p for p in pathlib.Path(path).rglob("*") if p.is_file())
    return {str(p.relative_to(path)): p.read_bytes() for p in files}


def _differing(one: dict, other: dict) -> int:
    return sum(one.get(name) != other.get(name) for name in one.keys() | other.keys())


def _told(figures: dict) -> str:
    return ", ".join(f"{k} {v:.4g}" for k, v in figures.items() if isinstance(v, int | float))


def main(argv):
    """Measures the parts asked for."""
    del argv
    if _CHILD.value:
        x = _data()
        print("begin", flush=True)
        _write(_CHILD.value, x, slowly=0.01)
        return
    root = _WORKDIR.value or tempfile.mkdtemp(prefix="store_")
    os.makedirs(root, exist_ok=True)
    parts = {"rates": rates, "rows": rows, "faults": faults, "search": search}
    try:
        figures = {name: parts[name](root) for name in _PARTS.value}
    finally:
        if not _WORKDIR.value:
            shutil.rmtree(root)
    record.write("store", figures)


if __name__ == "__main__":
    huge_pages.use()
    app.run(main)
