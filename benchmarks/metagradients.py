"""How memory, disk and time of metagradients grow with steps T, parameters P and queries Q.

    python -m benchmarks.metagradients --json=metagradients.json

For each width of a decoder and each T: seconds of CPU of a training and of a reverse pass (both
compiled before), the largest sum of live arrays' bytes during the pass, and the states on disk.
Then the laws, fitted by least squares of relative errors, and their predictions for `--say`.
"""

import math
import os
import pathlib
import tempfile

import jax
import numpy as np
from absl import app, flags
from flax import nnx

from benchmarks import record
from tda.counterfactual.metagradients import Reverse
from tda.counterfactual.training import QueryLosses, Training, plan_batches
from tda.data.batches import BatchLayout
from tda.model import functional
from tda.model.decoder import Decoder, DecoderSettings
from tda.plan.calibration import random_table
from tda.training import optimizer

_WIDTHS = flags.DEFINE_list("widths", ["64", "128", "256"], "widths of the decoder")
_STEPS = flags.DEFINE_list("steps", ["4", "16", "36"], "numbers of steps")
_QUERIES = flags.DEFINE_list("queries", ["1", "4"], "numbers of queries")
_SAY = flags.DEFINE_list("say", ["135e6", "72", "50"], "P, T and Q to extrapolate to")

LENGTH, BATCH, VOCABULARY = 32, 8, 512


def make_training(width: int, steps: int) -> Training:
    """Returns a training of a decoder of four layers on random tokens."""
    settings = DecoderSettings(
        vocab_size=VOCABULARY, width=width, layers=4, heads=4, kv_heads=4,
        head_width=width // 4, ff_width=4 * width,
    )  # fmt: skip
    model_fn, params = functional.split(Decoder(settings, rngs=nnx.Rngs(0)))
    rows, layout = steps * BATCH, BatchLayout((LENGTH,), BATCH * LENGTH, pad=0)
    table = random_table(rows, LENGTH, VOCABULARY)
    rate = optimizer.schedule("constant", 1e-3, steps, 0, 1.0)
    tx = optimizer.make_optimizer("adam", rate, eps_root=1e-8)
    return Training(model_fn, params, tx, table, plan_batches(table, layout, 1.0, 0))


def measure(training: Training, count: int, directory: pathlib.Path) -> dict:
    """Figures of one training and of a pass of its first rows as queries."""
    layout = BatchLayout((LENGTH,), BATCH * LENGTH, pad=0)
    queries = QueryLosses(training.model_fn, training.table, layout)
    reverse, numbers = Reverse(training, queries, directory), np.arange(count)
    largest, pull = [0], reverse._pull

    def watched(*arguments):
        result = pull(*arguments)
        jax.block_until_ready(result)
        largest[0] = max(largest[0], sum(x.nbytes for x in jax.live_arrays()))
        return result

    before = sum(x.nbytes for x in jax.live_arrays())
    reverse.by_token(numbers, "warm")
    training.run()
    reverse._pull = watched
    return {
        "training seconds": cpu_seconds(lambda: jax.block_until_ready(training.run()["params"])),
        "pass seconds": cpu_seconds(lambda: reverse.by_token(numbers, "timed")),
        "live bytes": largest[0] - before,
        "disk bytes": sum(f.stat().st_size for f in directory.iterdir()),
    }


def cpu_seconds(work) -> float:
    """Returns CPU seconds: elapsed time would count the machine's other work."""
    before = sum(os.times()[:2])
    work()
    return sum(os.times()[:2]) - before


def fit(rows: list[dict], name: str, terms) -> np.ndarray:
    """Coefficients of the terms of (P, T, Q) in a figure, none below 0, by relative errors."""
    y = np.asarray([r[name] for r in rows], float)
    X = np.asarray([terms(r["P"], r["T"], r["Q"]) for r in rows], float) / y[:, None]
    keep = np.ones(X.shape[1], bool)
    while True:
        coefficients = np.zeros(X.shape[1])
        coefficients[keep] = np.linalg.lstsq(X[:, keep], np.ones(len(y)), rcond=None)[0]
        if (coefficients >= 0).all():
            return coefficients
        keep &= coefficients > 0


LAWS = {
    "live bytes": ("P√T, PQ, P", lambda P, T, Q: (P * math.isqrt(T), P * Q, P)),
    "disk bytes": ("P√T, PQ, P", lambda P, T, Q: (P * -(-T // math.isqrt(T)), P * Q, P)),
    "training seconds": ("PT, T", lambda P, T, Q: (P * T, T)),
    "pass seconds": ("PTQ, PT, T", lambda P, T, Q: (P * T * Q, P * T, T)),
}


def main(_):
    """Measures, fits, and prints."""
    rows = []
    for width in map(int, _WIDTHS.value):
        for steps in map(int, _STEPS.value):
            training = make_training(width, steps)
            P = sum(x.size for x in jax.tree.leaves(training.params))
            for count in map(int, _QUERIES.value):
                with tempfile.TemporaryDirectory() as folder:
                    point = {"P": P, "T": steps, "Q": count}
                    rows.append(point | measure(training, count, pathlib.Path(folder)))
                print(rows[-1], flush=True)
    P, T, Q = map(float, _SAY.value)
    laws = {}
    for name, (described, terms) in LAWS.items():
        coefficients = fit(rows, name, terms)
        errors = [
            abs(float(np.dot(terms(r["P"], r["T"], r["Q"]), coefficients)) / r[name] - 1)
            for r in rows
        ]
        value = float(np.dot(terms(P, int(T), Q), coefficients))
        laws[name] = {
            "terms": described,
            "coefficients": list(coefficients),
            "largest relative error": max(errors),
            "extrapolated": value,
        }
        print(f"{name}: {coefficients} of {described}; off by {max(errors):.0%}; {value:.3g}")
    record.write("metagradients", {"points": rows, "laws": laws})


if __name__ == "__main__":
    app.run(main)
