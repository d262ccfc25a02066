"""Two real processes, joined by jax.distributed on localhost, that encode into one store."""

import os
import socket
import subprocess
import sys

import numpy as np
import pytest

from tda import store as stores

PROGRAM = """
import os, sys, time
port, me, path, spans = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4] == "spans"
import jax
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
if me >= 0:
    jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=me)
from flax import nnx
from tda import store as stores
from tda.data import corpora, documents, pieces, tokenised
from tda.data.batches import BatchLayout
from tda.data.tokenizer import Tokenizer
from tda.gradients.encoder import make_encoder
from tda.gradients.projection import Projection
from tda.model import functional
from tda.model.decoder import Decoder
from tda.model.settings import DecoderSettings
from tda.encoding import table as encoding
from tda.runtime import code_version, processes, sharding

texts = [f"Passage {i} of {'many words ' * (i % 5)}here." for i in range(23)]
tokenizer = Tokenizer.train(texts, 300)
table, _ = tokenised.tokenise_in_memory(
    [documents.Document(str(i), t) for i, t in enumerate(texts)], tokenizer, 48
)
corpora._PIECE_BYTES, pieces.BATCH, pieces.BATCHES_A_PART = 1, 2, 1
corpus = corpora.Corpus(os.path.dirname(path) + "/corpus")
tokenised.tokenise_on_disk(path + "-tokens", corpus, tokenizer, 48)
shape = dict(width=16, layers=2, heads=2, kv_heads=1, head_width=8, ff_width=24)
model = Decoder(DecoderSettings(vocab_size=tokenizer.vocab_size, **shape), rngs=nnx.Rngs(0))
if spans and me >= 0:
    mesh = sharding.make_mesh(data=2, fsdp=2)
else:
    mesh = sharding.make_mesh(data=-1, devices=jax.local_devices())
model_fn, params = functional.split(model)
model = model_fn.merge(functional.place(params, model_fn.axes, mesh))
encoder = make_encoder(model, Projection(side=4, blocks=2), mesh=mesh)
blocks = dict.fromkeys(encoder.layout.blocks, 16)
store = stores.create(path, table.ids, blocks, {}, shard_bytes=4 * encoder.layout.width * 4)
layout = BatchLayout((16, 32, 48), tokens_per_batch=128, pad=0, mesh=mesh)
describe = code_version.describe
if me >= 0:
    code_version.describe = lambda: {"tda": str(me)}
    try:
        encoding.fill_stores([store], encoder, table, layout)
        raise AssertionError("not told")
    except processes.ProcessError as error:
        assert "process 1 has another version of the code" in str(error), error
    assert len(store.missing()) == 6
code_version.describe = describe
with jax.set_mesh(mesh):
    encoding.fill_stores([store], encoder, table, layout)
assert store.missing() == [], store.missing()
if me >= 0:
    said = processes.on_first_process("speak", lambda: {"who": me, "text": ["é" * 99, None]})
    assert said == {"who": 0, "text": ["é" * 99, None]}, said
    processes._SIGN_OF_LIFE = 0.2
    assert processes.on_first_process("work long", lambda: [time.sleep(1), me]) == [None, 0]
    assert processes.on_first_process("be silent", lambda: None) is None

    def work():
        # The others wait in the outer call, so what is shared inside concerns process 0 alone.
        processes.wait_for_all("nobody else comes")
        processes.check_alike("number", me)
        return processes.where(True), processes.on_first_process("work inside", lambda: "inside")

    assert processes.on_first_process("work outside", work) == [[0], "inside"]
    assert processes.on_first_process("speak again", lambda: me) == 0
    assert processes.where(me == 1) == [1] and processes.where(False) == []
    processes.check_alike("path", path)
    try:
        processes.check_alike("number", me)
        raise AssertionError("not told")
    except processes.ProcessError as error:
        assert "process 1 has another number" in str(error)
    jax.distributed.shutdown()
"""


def free_port():
    """A port of this machine that nobody listens on."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def run(arguments, program=PROGRAM):
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)


def finish(*processes):
    try:
        for process in processes:
            _, errors = process.communicate(timeout=300)
            assert process.returncode == 0, errors[-3000:]
    finally:
        for process in processes:
            process.kill()


TRACE = """
import os, sys
port, me, path = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
if me >= 0:
    jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=me)
from flax import nnx
import tda
from tda.data.tokenizer import Tokenizer
from tda.model.decoder import Decoder
from tda.model.settings import DecoderSettings

texts = [f"Passage {i} of {'many words ' * (i % 5)}here." for i in range(9)]
tokenizer = Tokenizer.train(texts, 300)
shape = dict(width=16, layers=2, heads=2, kv_heads=1, head_width=8, ff_width=24)
model = Decoder(DecoderSettings(vocab_size=tokenizer.vocab_size, **shape), rngs=nnx.Rngs(0))
queries = [("Passage 3 of", "many"), ("Passage 7 of", "many")]
traced = tda.trace(model, texts, queries, tokenizer=tokenizer, directory=path, quiet=True)
print(traced, file=open(f"{path}-{me}", "w"))
"""


MOMENTS = """
import sys
port, me, path = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
if me >= 0:
    jax.distributed.initialize(f"localhost:{port}", num_processes=3, process_id=me)
import numpy as np
import optax
from tda.gradients.moments import second_moments
from tda.gradients.sites import Site
from tda.training import checkpoint

if me < 0:
    params = {"w": {"kernel": np.zeros((48, 33), np.float32)}}
    nu = np.exp(np.random.default_rng(0).normal(size=(48, 33))).astype(np.float32)
    adam, *rest = optax.adam(1e-3).init(jax.tree.map(jax.numpy.asarray, params))
    adam = adam._replace(nu={"w": {"kernel": jax.numpy.asarray(nu)}}, count=jax.numpy.int32(3))
    constants = {"name": "adam", "b2": 0.9, "eps": 0.1, "eps_root": 0.0}
    state = {"params": params, "opt_state": (adam, *rest)}
    checkpoint.save(path, 3, state, {"optimizer": constants})
scale = second_moments.read(path, [Site(("w",), "kernel", 48, 33)], "factored", 3, on_host=True)
np.savez(f"{path}-{me}.npz", left=scale["w/kernel"].left, right=scale["w/kernel"].right)
"""


@pytest.mark.slow
def test_joined_processes_read_the_bits_that_one_process_reads(tmp_path):
    port = free_port()
    path = tmp_path / "checkpoints"
    finish(run([port, -1, path], MOMENTS))
    finish(*(run([port, me, path], MOMENTS) for me in range(3)))
    expected = np.load(f"{path}--1.npz")
    for me in range(3):
        scale = np.load(f"{path}-{me}.npz")
        for side in ("left", "right"):
            np.testing.assert_array_equal(scale[side], expected[side])


@pytest.mark.slow
def test_joined_processes_trace_with_one_directory(tmp_path):
    port = free_port()
    finish(run([port, -1, tmp_path / "one"], TRACE))
    finish(*(run([port, me, tmp_path / "two"], TRACE) for me in (0, 1)))
    expected = (tmp_path / "one--1").read_text()
    assert "Passage" in expected
    assert [(tmp_path / f"two-{me}").read_text() for me in (0, 1)] == [expected] * 2


@pytest.mark.parametrize("how", [pytest.param("alone", marks=pytest.mark.slow), "spans"])
def test_two_processes_write_the_store_that_one_writes(tmp_path, how):
    """Guards: streaming shards that overwrite each other; rows written twice or never."""
    port = free_port()
    (tmp_path / "corpus").mkdir()
    for name in "abc":
        rows = [f'{{"text": "Passage {i} of {name}."}}\n' for i in range(5)]
        (tmp_path / "corpus" / f"{name}.jsonl").write_text("".join(rows))
    finish(run([port, -1, tmp_path / "one", how]))
    finish(*(run([port, me, tmp_path / "two", how]) for me in (0, 1)))
    one, two = (stores.open_store(tmp_path / name) for name in ("one", "two"))
    assert len(one.shards()) == 6 and one.manifest == two.manifest
    files = [sorted((tmp_path / n).rglob("*.*")) for n in ("one-tokens", "two-tokens")]
    assert len(files[0]) == 14
    assert [p.read_bytes() for p in files[0]] == [p.read_bytes() for p in files[1]]
    assert one.passages(range(23)) == two.passages(range(23))
    a, b = (s.read(slice(0, 23)) for s in (one, two))
    np.testing.assert_allclose(b, a, rtol=0, atol=1e-5 * np.abs(a).max())
