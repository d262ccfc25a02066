"""Killed at any moment and started again, a store ends in the bytes of an uninterrupted run."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from tda import store as stores
from tda.store import shard_file
from tests.runtime.test_processes import free_port
from tests.store.test_gradient_store import contents

# Makes a store, fills it, appends and fills again; slow enough to be hit anywhere.
WRITE = """
import sys, time, numpy as np
from tda import store as stores
from tda.store import location, shard_file
def slowly(function, seconds):
    def call(*arguments):
        time.sleep(seconds)
        return function(*arguments)
    return call
shard_file.Writer.add = slowly(shard_file.Writer.add, 0.002)
location.Location.write = slowly(location.Location.write, 0.01)
path, dtype = sys.argv[1], sys.argv[2]
data = np.random.default_rng(0).normal(size=(60, 8)).astype(np.float32)
blocks, texts = {"a": 4, "b": 4}, [f"text {i}" for i in range(60)]
ids = [f"p{i}" for i in range(60)]
bytes_ = 4 * stores.Form(dtype, (4, 4)).row_bytes
print("begin", flush=True)
def fill(store):
    for i in store.missing():
        store.write(i, data[store.shards()[i]])
        print(f"wrote:{i}", flush=True)
fill(stores.create(path, ids[:40], blocks, {"made": 1}, dtype, bytes_, texts=texts[:40]))
fill(stores.append(path, ids[40:], {"made": 1}, bytes_, texts=texts[40:]))
print("end", flush=True)
"""


def start(program, arguments, **env):
    command = [sys.executable, "-c", program, *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": os.getcwd()} | env
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def assert_same(one, other):
    a, b = contents(one), contents(other)
    assert sorted(a) == sorted(b)
    assert [n for n in a if a[n] != b[n]] == []


def await_begin(process):
    """Waits until a program says so, whatever the collectives print before."""
    for line in process.stdout:
        if line.strip() == "begin":
            return
    raise AssertionError(process.stderr.read()[-2000:])


def run_until_killed(processes, seconds):
    """Waits for the first to begin, then kills all after some time; whether they ended before."""
    await_begin(processes[0])
    until = time.monotonic() + seconds
    while time.monotonic() < until and any(p.poll() is None for p in processes):
        time.sleep(0.002)
    ended = all(p.poll() == 0 for p in processes)
    for p in processes:
        p.send_signal(signal.SIGKILL)
    written = [p.communicate()[0].split() for p in processes]
    # Collectives print numbers of their own.
    shards = [
        w.removeprefix("wrote:") for words in written for w in words if w.startswith("wrote:")
    ]
    return ended, [int(w) for w in shards]


@pytest.mark.parametrize("dtype", ["float32", "3bit"])
@pytest.mark.parametrize("kills", [4, pytest.param(40, marks=pytest.mark.slow)])
def test_a_writer_killed_at_random_moments_resumes_to_the_same_bytes(tmp_path, dtype, kills):
    """Guards: a killed run that must start again from nothing; rows twice, rows never."""
    run = start(WRITE, [tmp_path / "uninterrupted", dtype])
    await_begin(run)
    began = time.monotonic()
    assert run.wait() == 0, run.stderr.read()[-2000:]
    length = time.monotonic() - began
    rng, written, ended = random.Random(kills), [], False
    while not ended:
        # After the last kill it may take all the time that it needs.
        seconds = rng.uniform(0, length / 3) if kills else 300
        kills -= 1
        ended, more = run_until_killed([start(WRITE, [tmp_path / "killed", dtype])], seconds)
        written += more
    # A shard that was reported as written is not written again.
    assert len(set(written)) == len(written) and set(written) <= set(range(15))
    assert_same(tmp_path / "uninterrupted", tmp_path / "killed")


ENCODE = """
import sys
port, me, path, flag = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
import jax
jax.config.update("jax_num_cpu_devices", 1)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
if port:
    jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=me)
from flax import nnx
from tda import store as stores
from tda.data import documents, tokenised
from tda.data.batches import BatchLayout
from tda.data.tokenizer import Tokenizer
from tda.encoding import table as encoding
from tda.gradients.encoder import make_encoder
from tda.gradients.projection import Projection
from tda.model.decoder import Decoder
from tda.model.settings import DecoderSettings
texts = [f"Passage {i} of {'many words ' * (i % 5)}here." for i in range(64)]
tokenizer = Tokenizer.train(texts, 300)
table, _ = tokenised.tokenise_in_memory(
    [documents.Document(str(i), t) for i, t in enumerate(texts)], tokenizer, 48
)
shape = dict(width=16, layers=2, heads=2, kv_heads=1, head_width=8, ff_width=24)
model = Decoder(DecoderSettings(vocab_size=tokenizer.vocab_size, **shape), rngs=nnx.Rngs(0))
encoder = make_encoder(model, Projection(side=4, blocks=2))
layout = BatchLayout((16, 32, 48), tokens_per_batch=128, pad=0)
encoding.encode_rows(encoder, table, range(64), layout)  # compiled before the clock starts
blocks = dict.fromkeys(encoder.layout.blocks, 16)
print("begin", flush=True)
store = stores.create(
    path, table.ids, blocks, {}, flag, shard_bytes=2 * encoder.layout.width * 4, texts=texts
)
write = stores.GradientStore.write
def told(self, shard, x):
    out = write(self, shard, x)
    print(f"wrote:{shard}", flush=True)
    return out
stores.GradientStore.write = told
encoding.fill_stores([store], encoder, table, layout)
if port:
    jax.distributed.shutdown()
"""


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
def test_encoding_killed_at_random_moments_resumes_to_the_same_bytes(tmp_path, count):
    """The real thing, by one process and by two that share the work."""

    def begin(path):
        port = free_port() if count > 1 else 0
        env = {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
        return [start(ENCODE, [port, me, path, "float32"], **env) for me in range(count)]

    running = begin(tmp_path / "uninterrupted")
    await_begin(running[0])
    began = time.monotonic()
    for p in running:
        _, errors = p.communicate()
        assert p.returncode == 0, errors[-2000:]
    length = time.monotonic() - began
    rng, written, ended, kills = random.Random(count), [], False, 8
    while not ended:
        seconds = rng.uniform(0, length / 2) if kills else 300
        kills -= 1
        ended, more = run_until_killed(begin(tmp_path / "killed"), seconds)
        written += more
    assert len(set(written)) == len(written)
    assert_same(tmp_path / "uninterrupted", tmp_path / "killed")


def test_two_writers_of_one_shard_leave_it_whole(tmp_path, monkeypatch):
    """Guards: a shard with holes, where the second writer emptied the first one's file."""
    data = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)
    store = stores.create(tmp_path / "s", list("abcd"), {"a": 8}, {}, shard_bytes=128)
    add, both = shard_file.Writer.add, threading.Barrier(2)

    def add_together(*arguments):
        add(*arguments)
        # Whichever opened the file last, both have written to it from here on.
        both.wait(60)

    monkeypatch.setattr(shard_file.Writer, "add", add_together)
    with ThreadPoolExecutor(2) as pool:
        for written in [pool.submit(store.write, 0, data) for _ in range(2)]:
            assert written.result() == []
    np.testing.assert_array_equal(store.read(slice(0, 4)), data)
    assert store.damage(0) is None and not list(tmp_path.rglob("*.part"))


def test_a_full_disk_is_reported_and_the_store_is_resumed(tmp_path, monkeypatch):
    """The disk is full in the middle of a shard; then there is room again."""
    data = np.random.default_rng(0).normal(size=(12, 8)).astype(np.float32)
    store = stores.create(
        tmp_path / "s", [str(i) for i in range(12)], {"a": 8}, {}, shard_bytes=128
    )
    store.write(0, data[:4])
    monkeypatch.setattr(shard_file.Writer, "end", _no_space)
    with pytest.raises(stores.StoreError, match=r"cannot write shard 1 of .*No space left"):
        store.write(1, data[4:8])
    monkeypatch.undo()
    assert store.missing() == [1, 2] and not list(tmp_path.rglob("*.part"))
    for i in store.missing():
        store.write(i, data[store.shards()[i]])
    np.testing.assert_array_equal(store.read(slice(0, 12)), data)


def _no_space(writer):
    raise OSError(28, "No space left on device")


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_small_disk_that_is_full_is_reported_and_the_store_is_resumed(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk]).returncode:
        pytest.skip("this machine does not let a test mount a disk")
    try:
        data = np.random.default_rng(0).normal(size=(64, 8192)).astype(np.float32)
        ids = [str(i) for i in range(64)]
        make = lambda: stores.create(  # noqa: E731
            disk / "s", ids, {"a": 8192}, {}, shard_bytes=16 * 32768
        )
        (disk / "other").write_bytes(bytes(2_600_000))
        store = make()
        with pytest.raises(stores.StoreError, match="No space left"):
            for i in store.missing():
                store.write(i, data[store.shards()[i]])
        left = store.missing()
        assert 0 < len(left) < 4
        (disk / "other").unlink()
        again = make()
        assert again.missing() == left
        for i in left:
            again.write(i, data[again.shards()[i]])
        np.testing.assert_array_equal(again.read(slice(0, 64)), data)
        assert not list(disk.rglob("*.part"))
    finally:
        subprocess.run(["umount", disk], check=True)
