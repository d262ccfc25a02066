"""Encoding, training, search and tail-patch on this host's accelerators: one table.

    python -m benchmarks.accelerator --out=accelerator
    python -m benchmarks.accelerator --out=accelerator --parts=train,encode --shapes=135m --sides=16
    python -m benchmarks.accelerator --out=tiny --shapes=micro --sides=4 --sequences=8 --length=16 \
        --batches=4,8 --vocabulary=64 --search_mib=1 --pairs=8 --parts=train,encode,search

A finished case is saved at once to `OUT/record.jsonl` and `OUT/table.md`; a killed run continues
with the next case. Other machines, versions and protocols need directories of their own.

The protocol: 512 sequences of 512 random tokens, computed in bfloat16 on accelerators (parameters
are float32) and in float32 on CPUs; random weights, since times do not depend on them. A rate is
that of the best number of sequences in a batch, from the smallest of --batches upward until the
rate falls or memory is full, and downward if not even that one fits. It is the median of --rounds
passes over all sequences after an uncounted one, which starts and compiles. The parts:

- `train`: forward, backward, Adam's update.
- `capture`: the same with the projected gradients of each of its examples (`tda.Capture`), a block
  of side × side for every weight matrix, in the batch that is best for `train`.
- `encode`: from tokens in memory to rows in memory (`tda.encoding.table`), a block of side × side
  for every weight matrix. Every side is measured with the first one's batch.
- `search`: rows/s of exact search (the 10 best and the 10 worst) over float32 rows in the device's
  memory, and the share of the memory's bandwidth; and FAISS's flat index on the first GPU, if
  faiss-gpu is installed.
- `tail_patch`: pairs of a passage and a query, each passage with a step of its own.
- `bergson`: `bergson build` (PyTorch, in an environment of its own: `benchmarks.vs_bergson`) and
  our store, one after the other on one device, each in processes of its own and with its best
  batch: the same weights, tokens and second moments. Measured first, while this process uses no
  memory of the device.

The share of the peak is the rate of all matrix products' operations (`tda.plan.cost`; recomputed
ones do not count) over the maker's figure for the chips (`tda.plan.chips`); for a search, the share
of the memory's bandwidth. It is left out for chips that are not listed.
"""

import dataclasses
import functools
import itertools
import os
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable

import jax
import numpy as np
import optax
from absl import app, flags
from flax import nnx

from benchmarks import encoder as measured_encoders
from benchmarks import record, vs_bergson
from benchmarks.case_record import Case, Record
from tda.data.batches import BatchLayout
from tda.data.tokens import TokenTable
from tda.encoding import table as encoding
from tda.evaluation.tail_patch import TailPatch
from tda.gradients.capture import Capture
from tda.gradients.encoder import make_encoder
from tda.gradients.projection import Projection
from tda.gradients.sites import find_sites
from tda.model import functional, sizes
from tda.model.decoder import Decoder
from tda.model.settings import DecoderSettings
from tda.plan import calibration, chips, cost, setting
from tda.retrieval.exact import ExactSearch
from tda.retrieval.scorer import Scorer
from tda.retrieval.sources import InMemory
from tda.runtime import atomic_file, sharding
from tda.training import loop

PARTS = ("bergson", "train", "capture", "encode", "tail_patch", "search")
_OUT = flags.DEFINE_string("out", None, "directory of the record and the table")
_PARTS = flags.DEFINE_list("parts", list(PARTS), "what to measure")
_SHAPES = flags.DEFINE_list(
    "shapes", ["135m", "360m", "1b", "8b"], "models: these, or sizes of tda.model.sizes"
)
_SIDES = flags.DEFINE_list("sides", ["16", "32", "64"], "sides of the projection")
_CORRECTIONS = flags.DEFINE_list(
    "corrections", list(measured_encoders.CORRECTIONS), "optimizer corrections"
)
_SEQUENCES = flags.DEFINE_integer("sequences", 512, "sequences of a pass")
_BATCHES = flags.DEFINE_list(
    "batches", ["8", "16", "32", "64", "128", "256", "512"], "sequences of a batch, rising"
)
_VOCABULARY = flags.DEFINE_integer("vocabulary", 49152, "tokens of the vocabulary")
_ATTENTION = flags.DEFINE_enum("attention", "blocked", ["blocked", "fused"], "kernel of attention")
_FSDP = flags.DEFINE_integer("fsdp", 1, "devices that share one copy of the parameters")
_SEARCH = flags.DEFINE_integer("search_mib", 8192, "MiB of rows to search")
_WIDTH = flags.DEFINE_integer("search_width", 16384, "numbers of such a row")
_PAIRS = flags.DEFINE_integer("pairs", 128, "pairs of the tail-patch")
flags.FLAGS.set_default("rounds", 3)
flags.FLAGS.set_default("length", 512)
flags.FLAGS.set_default("dtype", None)
for _name in ("rounds", "length", "dtype", "venv"):
    flags.declare_key_flag(_name)

SEARCHED = (1, 128, 1024)
SHAPES = {
    "135m": measured_encoders.SIZES["135m"],
    "360m": dict(width=960, layers=32, heads=15, kv_heads=5, head_width=64, ff_width=2560),
    "1b": sizes.size("1b"),
    # Its activations would not fit beside its parameters.
    "8b": sizes.size("8b") | {"remat": True},
}
OUT_OF_MEMORY = {"failed": "out of memory"}


def plan() -> list[Case]:
    """Returns all cases that the flags ask for.

    Raises:
        ValueError: a part is unknown.
    """
    if wrong := set(_PARTS.value) - set(PARTS):
        raise ValueError(f"--parts: unknown {', '.join(sorted(wrong))}; use {', '.join(PARTS)}")
    sides = list(map(int, _SIDES.value))
    cases = [
        Case("bergson", shape, sides[0], correction)
        for shape, correction in itertools.product(_SHAPES.value, ("none", "adam"))
    ]
    for shape in _SHAPES.value:
        cases += [Case("train", shape), Case("tail_patch", shape)]
        cases += [Case("capture", shape, side) for side in sides]
        for correction, side in itertools.product(_CORRECTIONS.value, sides):
            cases.append(Case("encode", shape, side, correction))
    cases += [Case("search", queries=count) for count in SEARCHED]
    return [case for case in cases if case.part in _PARTS.value]


def settings_of(shape: str) -> dict:
    """Returns the settings of a model, those of its vocabulary and dtype too."""
    of_shape = SHAPES[shape] if shape in SHAPES else sizes.size(shape)
    chosen = {"dtype": flags.FLAGS.dtype, "attention": _ATTENTION.value}
    return {"vocab_size": _VOCABULARY.value, **chosen, **of_shape}


def rate(call: Callable[[], object], count: int) -> float:
    """Returns how many of `count` things a call does in a second: the median, once warm."""
    (seconds,) = record.in_turns({"": call}, flags.FLAGS.rounds, warm_ups=1).values()
    return count / statistics.median(seconds)


def figures_of_best(rates: dict[int, float]) -> dict:
    """Returns the best of some rates as JSON values."""
    if not rates:
        return OUT_OF_MEMORY
    batch = max(rates, key=rates.get)
    return {"tokens a second": rates[batch], "batch": batch, "by batch": rates}


def random_table(rows: int) -> TokenTable:
    """Returns random sequences of --length positions."""
    return calibration.random_table(rows, flags.FLAGS.length, _VOCABULARY.value)


class Bench:
    """Measures cases on a mesh of all devices.

    Args:
        lines: the cases that are finished.
    """

    def __init__(self, lines: Record):
        self._lines, self._mesh = lines, sharding.make_mesh(-1, _FSDP.value)
        self._batches = [int(b) for b in _BATCHES.value if int(b) <= _SEQUENCES.value]
        self._tokens = _SEQUENCES.value * flags.FLAGS.length
        self._chip = chips.of_device(jax.devices()[0].device_kind)
        self._held: tuple[str, Decoder | None] = "", None

    def measure(self, case: Case) -> dict:
        """Returns a case's figures as JSON values."""
        parts = {
            "bergson": self._against_bergson,
            "train": self._train,
            "capture": self._capture,
            "encode": self._encode,
            "tail_patch": self._tail_patch,
            "search": self._search,
        }
        try:
            return parts[case.part](case)
        except Exception as error:
            if not record.is_out_of_memory(error):
                raise
            return OUT_OF_MEMORY

    def _model(self, shape: str) -> Decoder:
        """Returns a model with random weights, laid out on the mesh; one is held at a time."""
        if self._held[0] != shape:
            self._held = "", None
            decoder = Decoder(DecoderSettings(**settings_of(shape)), rngs=nnx.Rngs(0))
            model_fn, params = functional.split(decoder)
            params = functional.place(params, model_fn.axes, self._mesh)
            self._held = shape, model_fn.merge(params)
        return self._held[1]

    def _layout(self, batch: int) -> BatchLayout:
        length = flags.FLAGS.length
        return BatchLayout((length,), batch * length, 0, self._mesh)

    def _with_share(self, figures: dict, operations: float) -> dict:
        """Adds the share of the peak, by the operations of a token."""
        figures = figures | {"operations a token": operations}
        if self._chip is None or "failed" in figures:
            return figures
        peak = self._chip.bfloat16 if flags.FLAGS.dtype == "bfloat16" else self._chip.float32
        done = figures["tokens a second"] * operations
        return figures | {"share of the peak": done / (peak * jax.device_count())}

    def _counted(self, shape: str) -> cost.Model:
        """Returns the products of a model, without those that are recomputed."""
        everything = find_sites(self._model(shape), include=".")
        arguments = dataclasses.asdict(self._model(shape).settings) | {"remat": False}
        return setting.count_model(everything, arguments)

    def _train(self, case: Case) -> dict:
        figures = self._best_of_steps(case.shape, lambda merge, tx: loop.make_step(merge, tx, None))
        context = (flags.FLAGS.length + 1) / 2
        operations = cost.training_operations(self._counted(case.shape), context)
        return self._with_share(figures, operations)

    def _capture(self, case: Case) -> dict:
        projection = Projection(case.side, pooling="matrix")
        capture = Capture(self._model(case.shape), projection, tell=False)
        capturing = functools.partial(measured_encoders.capturing_step, capture)

        def make_step(merge, tx):
            return jax.jit(functools.partial(capturing, merge, tx), donate_argnums=0)

        return self._best_of_steps(case.shape, make_step, Case("train", case.shape))

    def _best_of_steps(self, shape: str, make_step: Callable, known: Case | None = None) -> dict:
        """Returns the figures of training steps; `known` has found the best batch, if measured."""
        tx, table = optax.adam(1e-3), random_table(_SEQUENCES.value)

        def rate_of(batch: int) -> float:
            model_fn, state = loop.initial_state(self._model(shape), tx, self._mesh)
            step, layout = make_step(model_fn.merge, tx), self._layout(batch)
            inputs, states = [x.arrays() for x in layout.batches(table)], [state]

            def train_on_all():
                for arrays in inputs:
                    states[0], *made = step(states[0], layout.put(arrays))
                return made

            with jax.set_mesh(self._mesh):
                return rate(train_on_all, self._tokens)

        return self._best(rate_of, known)

    def _best(self, rate_of: Callable[[int], float], known: Case | None) -> dict:
        """Returns the figures of the best batch, which `known` has found if it is measured."""
        batch = self._lines.figures.get(known.title, {}).get("batch") if known else None
        return figures_of_best(record.best_batch(rate_of, [batch] if batch else self._batches))

    def _encode(self, case: Case) -> dict:
        model, table = self._model(case.shape), random_table(_SEQUENCES.value)
        chosen, rows = find_sites(model), np.arange(len(table))
        encoder = make_encoder(
            model,
            Projection(case.side, pooling="matrix"),
            calibration.ones(chosen, case.correction),
            mesh=self._mesh,
            tell=False,
        )

        def rate_of(batch: int) -> float:
            layout = self._layout(batch)
            with jax.set_mesh(self._mesh):
                return rate(
                    lambda: encoding.encode_rows(encoder, table, rows, layout), self._tokens
                )

        first = dataclasses.replace(case, side=int(_SIDES.value[0]))
        figures = self._best(rate_of, first)
        tied, length = model.settings.tied, flags.FLAGS.length
        taps = setting.count_taps(chosen, case.side, case.correction, tied)
        counted = self._counted(case.shape)
        operations = cost.encoding_operations(counted, [taps], {(1, length): 1}) / length
        return self._with_share(figures, operations)

    def _tail_patch(self, case: Case) -> dict:
        tx, table = optax.adam(1e-3), random_table(_PAIRS.value)
        model_fn, state = loop.initial_state(self._model(case.shape), tx, self._mesh)
        patch = TailPatch(model_fn, state, tx, dataclasses.replace(self._layout(1), mesh=None))
        pairs = [(i, i) for i in range(len(table))]
        with jax.set_mesh(self._mesh):
            return {"pairs a second": rate(lambda: patch(table, table, pairs), len(pairs))}

    def _search(self, case: Case) -> dict:
        width, rng = _WIDTH.value, np.random.default_rng(0)
        rows = max(16, (_SEARCH.value << 20) // (4 * width))
        x_RxE = rng.standard_normal((rows, width), np.float32)
        q_QxE = rng.standard_normal((case.queries, width), np.float32)
        search = ExactSearch(InMemory(x_RxE, [slice(0, width)]), hold=True)
        scorers = {"dot": Scorer(None, False)}
        ours = rate(lambda: search.rank(q_QxE, scorers), rows)
        figures = {"rows a second": ours, "bytes a second": 4 * width * ours}
        if (index := _faiss_index(x_RxE)) is not None:  # beside our rows, in the same memory
            figures["FAISS's rows a second"] = rate(lambda: index.search(q_QxE, 10), rows)
        if self._chip is not None:
            figures["share of the peak"] = 4 * width * ours / self._chip.bandwidth
        return figures

    def _against_bergson(self, case: Case) -> dict:
        if jax.default_backend() == "tpu":
            return {"failed": "PyTorch has no such device"}
        settings, is_accelerated = settings_of(case.shape), sharding.is_accelerated()
        kept = ("width", "layers", "heads", "kv_heads", "head_width", "ff_width")
        setup = {
            "shape": {name: settings[name] for name in kept},
            "tied": settings.get("tied", True),
            "vocabulary": _VOCABULARY.value,
            "dtype": flags.FLAGS.dtype,
            "precision": "bf16" if flags.FLAGS.dtype == "bfloat16" else "fp32",
            "device": "cuda" if is_accelerated else "cpu",
            "rows": _SEQUENCES.value,
            "length": flags.FLAGS.length,
            "queries": 1,
            "side": case.side,
            "pooling": "matrix",
        }
        python = vs_bergson.install(pathlib.Path(flags.FLAGS.venv).expanduser())
        script = str(pathlib.Path(vs_bergson.__file__).with_name("bergson_side.py"))
        commands = {
            "ours": [sys.executable, "-m", "benchmarks.our_side"],
            "Bergson's": [python, script],
        }
        # Both see one device; by default they see none.
        device = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        seen = {"JAX_PLATFORMS": "cuda", "CUDA_VISIBLE_DEVICES": device} if is_accelerated else {}
        figures: dict = {}
        with tempfile.TemporaryDirectory() as made:
            folder = pathlib.Path(made)
            vs_bergson.write_inputs(folder, setup)
            for name, command in commands.items():
                start = functools.partial(
                    vs_bergson.Process, [*command, made], folder / "log", seen
                )
                if name != "ours":
                    with start() as side:
                        figures["versions"] = side.ask("prepare")
                rates = record.best_batch(
                    functools.partial(self._build, start, case), self._batches
                )
                figures[f"{name}, by batch"] = rates
                figures[f"{name}, tokens a second"] = max(rates.values(), default=None)
        return figures

    def _build(self, start: Callable, case: Case, batch: int) -> float:
        """Returns the tokens/s of a side that builds its store, in a process of its own."""
        command = {"correction": case.correction, "rows": _SEQUENCES.value}
        command["tokens"] = batch * flags.FLAGS.length
        # In a new process: one that ran out of memory cannot continue.
        with start() as side:
            side.ask("build", **command)
            runs = [side.ask("build", **command) for _ in range(flags.FLAGS.rounds)]
        return self._tokens / statistics.median(run["seconds"] for run in runs)


def _faiss_index(x_RxE: np.ndarray):
    """Returns FAISS's flat index of some rows on the first GPU; None where there is none."""
    try:
        import faiss
    except ImportError:
        return None
    if not getattr(faiss, "get_num_gpus", lambda: 0)():
        return None
    index = faiss.GpuIndexFlatIP(faiss.StandardGpuResources(), x_RxE.shape[1])
    index.add(x_RxE)
    return index


def main(argv):
    """Measures every case that the record lacks, and prints a line for each."""
    del argv
    if not _OUT.value:
        raise app.UsageError("give --out, a directory for the record and the table")
    # Otherwise this process would take most of the device's memory before Bergson starts.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if flags.FLAGS.dtype is None:
        flags.FLAGS.dtype = "bfloat16" if sharding.is_accelerated() else "float32"
    out, cases = pathlib.Path(_OUT.value), plan()
    out.mkdir(parents=True, exist_ok=True)
    protocol = {
        name: flags.FLAGS[name].value
        for name in ("sequences", "length", "dtype", "fsdp", "attention")
    }
    lines = Record(out / "record.jsonl", record.machine() | protocol)
    bench = Bench(lines)
    for i, case in enumerate(cases):
        if case.title in lines.figures:
            continue
        print(f"[{i + 1}/{len(cases)}] {case.title}", flush=True)
        started = time.perf_counter()
        lines.add(case, bench.measure(case))
        with atomic_file.open_atomic(out / "table.md") as table:
            table.write(lines.markdown(cases))
        shown = [
            f"{value:,.3g} {name}" if isinstance(value, float) else f"{name} {value}"
            for name, value in lines.figures[case.title].items()
            if not isinstance(value, dict)
        ]
        print(f"  {'; '.join(shown)} ({time.perf_counter() - started:.0f} s)", flush=True)
    print(f"\n{lines.markdown(cases)}")


if __name__ == "__main__":
    app.run(main)
