"""Encoding, and the whole of TrackStar, against Bergson (the same methods in PyTorch).

    python -m benchmarks.vs_bergson --json=vs_bergson.json
    python -m benchmarks.vs_bergson --sizes=10m,30m --cases=train,build/none --rounds=5

Creates Bergson's own virtual environment in --venv if it is missing. torch's version is pinned, not
its build: the CPU build is enough, and gigabytes smaller if pip's index has one.

Both sides get the same weights (transformers' `LlamaForCausalLM` is our decoder), the same random
tokens, the same second moments, float32 and all cores. Bergson keeps one block of side × side for
every matrix of every layer; with pooling="matrix" so do we, and rows are equally wide. Each side is
a process of its own that waits while the other works; a round times ours, then theirs. The cases:

- `train`: a training step of each side (forward, backward, Adam; no Bergson in it): how fast XLA
  and PyTorch are on this machine. "In training steps" is a ratio divided by this one. PyTorch's
  matrix products (MKL) run at about half speed on processors that are not Intel's, unless a library
  with `int mkl_serv_intel_cpu_true() { return 1; }` is preloaded: --their_env=LD_PRELOAD=FILE.
- `build/none`, `build/factored`, `build/adam`: rows of raw projected gradients on disk, without
  correction, with Adafactor's and with Adam's exact second moments: `bergson build` against
  `tda.encoding.table.fill_stores` into a store.
- `trackstar/none`, …: `bergson trackstar` (a pass over the corpus for R, R of the queries, mixing,
  the queries' gradients, another pass for scores) against a store filled in one pass, from which R
  and scores are taken.

A time counts only work that grows with the corpus: starting a process, imports, loading and
compilation come before. A case's first run with all of these is its "whole process" figure. Work
of the same cost for any corpus (eigenvalues, λ, R^(−1/2)) is in TrackStar's ratio, but not in that
"of passes", which a large corpus approaches. "Cores' time" (in the JSON file) is the sum over all
cores, a better measure than the clock on a busy machine. Bergson's batch is the best of
--their_tokens, ours is always --tokens. Bergson computes R from all rows here, as we do; by default
it takes 10,000 at most, which saves most of a large corpus's first pass: see --hessian_rows and the
parts of each run in the JSON file ("approximate_hessians" is that pass and the queries').

Checked before any timing: losses and shapes are equal, mean squares of the rows agree, all numbers
are finite, and every query, a row of the corpus itself, finds itself first on both sides.
"""

import contextlib
import functools
import json
import math
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np
from absl import app, flags

from benchmarks import encoder as training
from benchmarks import record
from benchmarks.our_side import decoder, second_moments
from tda import hessian
from tda.model import functional

BERGSON = "2.5.1"
# Its imports for language models, without its other requirements (images, sound, 8 bits).
NEEDED = (
    "torch==2.13.0 transformers==5.23.0 datasets==5.2.0 peft==0.21.2 torchopt==0.7.3 "
    "simple-parsing==0.1.9 jaxtyping==0.3.11 jinja2 ml_dtypes natsort petname pandas scipy"
).split()
CASES = ("train", "build/none", "build/factored", "build/adam", "trackstar/none", "trackstar/adam")
# Bergson's default; nothing of the time depends on it.
DAMPING = 0.1

# Those of benchmarks.encoder that mean the same here.
for _name, _default in (("sizes", ["10m"]), ("rounds", 3), ("tokens", 2048)):
    flags.FLAGS.set_default(_name, _default)
    flags.declare_key_flag(_name)
flags.declare_key_flag("side")
_CASES = flags.DEFINE_list("cases", list(CASES), "what to compare")
_VENV = flags.DEFINE_string("venv", "~/.cache/tda-bergson", "Bergson's virtual environment")
_ROWS = flags.DEFINE_integer("rows", 256, "sequences of the corpus")
_LENGTH = flags.DEFINE_integer("length", 128, "tokens of a sequence")
_QUERIES = flags.DEFINE_integer("queries", 32, "queries, the first rows of the corpus")
_TIED = flags.DEFINE_bool("tied", True, "the output matrix is the embedding's transpose")
_POOLING = flags.DEFINE_enum("pooling", "matrix", ["matrix", "blocks"], "ours; theirs is matrix")
_THEIR_TOKENS = flags.DEFINE_list(
    "their_tokens", ["512", "1024", "2048", "4096", "8192"], "positions of Bergson's batch, tried"
)
_OUR_ENV = flags.DEFINE_list("our_env", [], "NAME=VALUE, … for our process alone")
_THEIR_ENV = flags.DEFINE_list("their_env", [], "NAME=VALUE, … for Bergson's process alone")
_HESSIAN_ROWS = flags.DEFINE_integer(
    "hessian_rows", None, "rows that Bergson takes R of the corpus from; all by default"
)


def install(path: pathlib.Path) -> str:
    """Returns the Python of Bergson's virtual environment, which is created if missing."""
    python = path / "bin" / "python"
    probe = [python, "-c", f"import bergson as b; assert b.__version__ == {BERGSON!r}"]
    if python.exists() and not subprocess.run(probe, capture_output=True).returncode:
        return str(python)
    print(f"installing Bergson {BERGSON} into {path}", flush=True)
    subprocess.run([sys.executable, "-m", "venv", path], check=True)
    pip = [python, "-m", "pip", "install", "-qq"]
    subprocess.run([*pip, *NEEDED], check=True)
    subprocess.run([*pip, "--no-deps", f"bergson=={BERGSON}"], check=True)
    subprocess.run(probe, check=True)
    return str(python)


NAMES = {
    "attention/query": "self_attn.q_proj",
    "attention/key": "self_attn.k_proj",
    "attention/value": "self_attn.v_proj",
    "attention/out": "self_attn.o_proj",
    "mlp/up": "mlp.up_proj",
    "mlp/gate": "mlp.gate_proj",
    "mlp/down": "mlp.down_proj",
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
}


def as_llama(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Arrays of our parameters by path, under a Llama's names and in its layout."""
    out = {}
    for path, x in arrays.items():
        module, x = path.rpartition("/")[0], np.asarray(x)
        if module.startswith("layers/"):
            name = NAMES[module.removeprefix("layers/")]
            for i, one in enumerate(x):
                out[f"model.layers.{i}.{name}.weight"] = np.ascontiguousarray(one.T)
        elif module == "embedding":
            out["model.embed_tokens.weight"] = x
        elif module == "final_norm":
            out["model.norm.weight"] = x
        else:
            out["lm_head.weight"] = np.ascontiguousarray(x.T)
    return out


def prepare(directory: pathlib.Path, size: str) -> dict:
    """Writes what both sides read; how the comparison is set up."""
    shape = training.SIZES[size]
    width = 7 * shape["layers"] * flags.FLAGS.side**2
    setup = {
        "shape": shape,
        "vocabulary": training.VOCABULARY[size],
        "tied": _TIED.value,
        "rows": _ROWS.value,
        "length": _LENGTH.value,
        "queries": min(_QUERIES.value, _ROWS.value),
        "side": flags.FLAGS.side,
        "pooling": _POOLING.value,
        "component": hessian.default_component(width),
        "damping": DAMPING,
        "hessian_rows": _HESSIAN_ROWS.value,
    }
    write_inputs(directory, setup)
    return setup


def write_inputs(directory: pathlib.Path, setup: dict) -> None:
    """Writes the setup, and the weights, moments and tokens of both sides."""
    (directory / "setup.json").write_text(json.dumps(setup))
    model = decoder(setup)
    weights = functional.flat_parameters(functional.split(model)[1])
    np.savez(directory / "weights.npz", **as_llama(weights))
    np.savez(directory / "moments.npz", **as_llama(second_moments(model)))
    rng = np.random.default_rng(0)
    shape = setup["rows"], setup["length"]
    np.save(directory / "tokens.npy", rng.integers(0, setup["vocabulary"], shape, dtype=np.int32))


class Process:
    """A side in a process of its own, which works only while it is asked."""

    def __init__(self, command: list[str], log: pathlib.Path, own: dict[str, str]):
        # Huge pages for large buffers suit both sides; nothing is to be fetched, no bar drawn.
        common = {
            "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
            "JAX_PLATFORMS": "cpu",
            "CUDA_VISIBLE_DEVICES": "",
            "HF_HUB_OFFLINE": "1",
            "TQDM_DISABLE": "1",
        }
        self.log = log
        with open(log, "w") as out:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=out,
                text=True,
                env=os.environ | common | own,
            )

    def ask(self, do: str, **command) -> dict:
        """Returns the side's answer."""
        self.process.stdin.write(json.dumps({"do": do} | command) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.process.args} failed:\n{self.log.read_text()[-4000:]}")
        return json.loads(line)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        self.process.wait()


def tune(theirs: Process, correction: str, rows: int) -> dict[int, float]:
    """Bergson's tokens a second with every size of batch, on a quarter of the corpus."""
    few = max(1, rows // 4)
    rates = {}
    for tokens in map(int, _THEIR_TOKENS.value):
        command = dict(correction=correction, rows=few, tokens=max(tokens, _LENGTH.value))
        seconds = min(theirs.ask("build", **command)["seconds"] for _ in range(2))
        rates[command["tokens"]] = few * _LENGTH.value / seconds
    return rates


def check(what: str, ours: dict, theirs: dict, pooling: str) -> None:
    """Raises ValueError unless both sides did the same work."""
    good = ours["finite"] and theirs["finite"] and ours["rows"] == theirs["rows"]
    if what == "trackstar":
        good &= ours["queries"] == theirs["queries"] and min(ours["found"], theirs["found"]) == 1
    else:
        good &= math.isclose(ours["loss"], theirs["loss"], rel_tol=1e-4)
        if pooling == "matrix":
            good &= ours["width"] == theirs["width"]
            good &= math.isclose(ours["mean square"], theirs["mean square"], rel_tol=0.3)
    if not good:
        raise ValueError(f"the sides differ in {what}: ours {ours}, Bergson's {theirs}")


def compare(case: str, start: dict, setup: dict, tuned: dict) -> dict:
    """Returns all figures of a case; `tuned` keeps Bergson's rates by correction."""
    what, _, correction = case.partition("/")
    rows, length = setup["rows"], setup["length"]
    command = {n: dict(correction=correction, rows=rows, tokens=flags.FLAGS.tokens) for n in start}
    sides, whole, checks = {}, {}, {}
    with contextlib.ExitStack() as stack:
        for name in start:
            begun = time.perf_counter()
            sides[name] = stack.enter_context(start[name]())
            sides[name].ask(what, **command[name])
            whole[name] = time.perf_counter() - begun
        if what != "train":
            checks = {name: side.ask(f"check_{what}") for name, side in sides.items()}
            check(what, checks["ours"], checks["bergson"], setup["pooling"])
            if correction not in tuned:
                tuned[correction] = tune(sides["bergson"], correction, rows)
            command["bergson"]["tokens"] = max(tuned[correction], key=tuned[correction].get)
        runs = {name: [] for name in sides}
        for _ in range(flags.FLAGS.rounds):
            for name, side in sides.items():
                runs[name].append(side.ask(what, **command[name]))
    seconds = {n: [r["seconds"] for r in runs[n]] for n in runs}
    figures = {
        "ratio": ratio(seconds),
        "ratio of cores' time": ratio({n: [r["cpu seconds"] for r in runs[n]] for n in runs}),
        "tokens a second": {n: rows * length / statistics.median(s) for n, s in seconds.items()},
        "whole process, seconds": whole,
        "positions of a batch": {n: command[n]["tokens"] for n in command},
        "their tokens a second by batch": tuned.get(correction),
        "checks": checks,
        "runs": runs,
    }
    if what == "trackstar":
        passes = {n: [r["seconds"] - r["fixed"] for r in runs[n]] for n in runs}
        figures["ratio of passes"] = ratio(passes)
    return figures


def ratio(seconds: dict[str, list[float]]) -> float:
    """Returns the median over rounds of their time over ours: how many times as fast ours is."""
    pairs = zip(seconds["ours"], seconds["bergson"], strict=True)
    return statistics.median(theirs / ours for ours, theirs in pairs)


def told(case: str, figures: dict, step: float | None) -> str:
    """Formats a case as a line; `step` is the ratio of the training steps."""
    rates, whole = figures["tokens a second"], figures["whole process, seconds"]
    line = (
        f"  {case:16} {rates['ours']:9,.0f} and {rates['bergson']:9,.0f} tokens/s:"
        f" {figures['ratio']:6.2f} times as fast"
    )
    if "ratio of passes" in figures:
        line += f", its passes {figures['ratio of passes']:.2f}"
    if step is not None and case != "train":
        line += f", {figures['ratio'] / step:.2f} in training steps"
    return f"{line} (whole process {whole['ours']:.0f} and {whole['bergson']:.0f} s)"


def starters(directory: pathlib.Path, python: str) -> dict:
    """Returns what starts each side's process, by name, in the order of a round."""
    theirs = pathlib.Path(__file__).resolve().with_name("bergson_side.py")
    sides = {
        "ours": ([sys.executable, "-m", "benchmarks.our_side", str(directory)], _OUR_ENV),
        "bergson": ([python, str(theirs), str(directory)], _THEIR_ENV),
    }
    return {
        name: functools.partial(Process, command, directory / f"{name}.log", environment_of(own))
        for name, (command, own) in sides.items()
    }


def environment_of(flag) -> dict[str, str]:
    """Returns a list of NAME=VALUE as a dict."""
    return dict(x.split("=", 1) for x in flag.value)


def main(argv):
    """Runs every case of every size, ours and Bergson's in turns, and prints a line for each."""
    del argv
    jax.config.update("jax_platforms", "cpu")  # as both sides
    python = install(pathlib.Path(_VENV.value).expanduser())
    own = {"ours": environment_of(_OUR_ENV), "bergson": environment_of(_THEIR_ENV)}
    found = {}
    for size in flags.FLAGS.sizes:
        with tempfile.TemporaryDirectory() as made:
            directory = pathlib.Path(made)
            setup, start = prepare(directory, size), starters(directory, python)
            with start["bergson"]() as side:
                versions = side.ask("prepare")
            name = f"{size}, {setup['rows']} x {setup['length']} tokens, side {setup['side']}"
            print(f"{name}: ours and Bergson's", flush=True)
            cases, tuned, step = {}, {}, None
            found[name] = {"setup": setup, "peer": versions, "environment": own, "cases": cases}
            for case in _CASES.value:
                cases[case] = compare(case, start, setup, tuned)
                step = cases[case]["ratio"] if case == "train" else step
                print(told(case, cases[case], step), flush=True)
                record.write("vs_bergson", found)


if __name__ == "__main__":
    app.run(main)
