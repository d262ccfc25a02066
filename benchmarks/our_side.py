"""Our side of `benchmarks.vs_bergson`, which starts it; `benchmarks.bergson_side` is the other.

    python -m benchmarks.our_side DIRECTORY

One JSON command a line on standard input, one JSON answer a line on standard output.
"""

import json
import math
import os
import pathlib
import shutil
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks import encoder as training
from tda import hessian
from tda import loss as losses
from tda import store as stores
from tda.data.batches import BatchLayout
from tda.data.tokens import TokenTable
from tda.encoding import table as encoding
from tda.gradients.encoder import make_encoder
from tda.gradients.moments.scales import from_full
from tda.gradients.projection import Projection
from tda.gradients.sites import find_sites
from tda.model import functional
from tda.model.decoder import Decoder
from tda.model.settings import DecoderSettings
from tda.retrieval import exact
from tda.retrieval.scorer import Scorer
from tda.retrieval.sources import InMemory


def decoder(setup: dict) -> Decoder:
    """Returns our model; the same weights in every process."""
    shape = dict(vocab_size=setup["vocabulary"], tied=setup["tied"], **setup["shape"])
    shape["dtype"] = setup.get("dtype", "float32")
    return Decoder(DecoderSettings(**shape), rngs=nnx.Rngs(0))


def second_moments(model: Decoder) -> dict[str, np.ndarray]:
    """Returns random second moments of every matrix, by path."""
    out = {}
    for i, site in enumerate(find_sites(model)):
        normal = np.random.default_rng(i).standard_normal(site.shape, np.float32)
        out[site.path] = np.exp(normal)
    return out


class Stopwatch:
    """Seconds since it was made, by the clock and of all cores' work."""

    def __init__(self):
        self.started = time.perf_counter(), time.process_time()

    def read(self) -> dict[str, float]:
        """Returns the sum of both."""
        wall, cpu = self.started
        return {"seconds": time.perf_counter() - wall, "cpu seconds": time.process_time() - cpu}


class Ours:
    """Our side: answers commands as `benchmarks.bergson_side` does."""

    def __init__(self, directory: str):
        self.directory = pathlib.Path(directory)
        self.setup = json.loads((self.directory / "setup.json").read_text())
        self.tokens = np.load(self.directory / "tokens.npy", allow_pickle=False)
        self.model = decoder(self.setup)
        self.encoders, self.step = {}, None

    def projection(self) -> Projection:
        """Returns the projection with the side and pooling of the setup."""
        s = self.setup
        return Projection(s["side"], s["shape"]["layers"], pooling=s["pooling"])

    def encoder(self, correction: str):
        """Returns the encoder with a correction, compiled once."""
        if correction not in self.encoders:
            scales = None
            if correction != "none":
                found = second_moments(self.model).items()
                scales = {k: from_full(jnp.asarray(v) ** -0.5, correction) for k, v in found}
            self.encoders[correction] = make_encoder(self.model, self.projection(), scales)
        return self.encoders[correction]

    def table(self, rows: int) -> TokenTable:
        """Returns the corpus's first rows."""
        ids = [str(i) for i in range(rows)]
        length = self.tokens.shape[1]
        flat = self.tokens[:rows].reshape(-1)
        scored = np.arange(len(flat)) % length > 0
        return TokenTable(ids, ids, flat, length * np.arange(rows + 1), scored)

    def layout(self, tokens: int) -> BatchLayout:
        """Returns how they are batched."""
        # Their batches have as many positions; of ours the last is padding.
        return BatchLayout((self.tokens.shape[1],), tokens, pad=0)

    def build(self, correction: str, rows: int, tokens: int) -> dict:
        """Builds a store of raw projected gradients."""
        encoder, table = self.encoder(correction), self.table(rows)
        blocks = dict.fromkeys(encoder.layout.blocks, self.setup["side"] ** 2)
        path = self.directory / "ours"
        shutil.rmtree(path, ignore_errors=True)
        watch = Stopwatch()
        self.store = stores.create(path, table.ids, blocks, {})
        encoding.fill_stores([self.store], encoder, table, self.layout(tokens))
        return watch.read()

    def check_build(self) -> dict:
        """Returns the contents of the last store, and the model's mean loss."""
        rows = self.store.read(slice(0, self.store.rows))
        tokens = self.tokens[: len(rows)]
        model_fn, params = functional.split(self.model)

        @jax.jit
        def loss(params, batch):
            logits = model_fn.apply(params, batch[:, :-1])
            return losses.cross_entropy(logits, batch[:, 1:], jnp.ones(batch[:, 1:].shape))

        nats = [loss(params, tokens[i : i + 16]) for i in range(0, len(tokens), 16)]
        return {
            "rows": rows.shape[0],
            "width": rows.shape[1],
            "finite": bool(np.isfinite(rows).all()),
            "mean square": float(np.mean(np.square(rows, dtype=np.float64))),
            "loss": float(np.mean(np.concatenate(nats))),
        }

    def trackstar(self, correction: str, rows: int, tokens: int) -> dict:
        """Runs the stages of `experiments.trace` for the method "trackstar"."""
        built = self.build(correction, rows, tokens)
        parts = {"encode the corpus": built["seconds"]}
        encoder, table = self.encoder(correction), self.table(self.setup["queries"])
        store, slices = self.store, hessian.block_slices(self.store.form.widths)
        watch = Stopwatch()

        def lap(name):
            parts[name] = built["seconds"] + watch.read()["seconds"] - sum(parts.values())

        everyone = np.arange(len(table))
        queries = encoding.encode_rows(encoder, table, everyone, self.layout(tokens))
        lap("encode the queries")
        train = hessian.autocorrelation_of_source(store).blocks
        evaluation = hessian.autocorrelation_of_source(InMemory(queries, slices)).blocks
        lap("R")
        spectra = hessian.spectra(train), hessian.spectra(evaluation)
        weight = hessian.mixing_weight(*spectra, self.setup["component"])
        mixed = hessian.mix(train, evaluation, weight)
        scorers = {"trackstar": Scorer(hessian.inverse_root(mixed, self.setup["damping"]), True)}
        lap("fixed")
        found = exact.search(queries, store, scorers)
        self.ranked = found["trackstar"]
        lap("search")
        spent = {clock: built[clock] + s for clock, s in watch.read().items()}
        return spent | {"fixed": parts["fixed"], "parts": parts}

    def check_trackstar(self) -> dict:
        """Counts the queries, which are rows of the corpus, that find themselves first."""
        best, scores = self.ranked.proponents[:, 0], self.ranked.proponent_scores
        return {
            "rows": self.store.rows,
            "queries": len(best),
            "finite": bool(np.isfinite(scores).all()),
            "found": float(np.mean(best == np.arange(len(best)))),
        }

    def train(self, correction: str, rows: int, tokens: int) -> dict:
        """Takes training steps of the same model, one for each batch of the rows."""
        del correction
        length = self.setup["length"]
        size = max(1, min(rows, tokens // length))
        if self.step is None:
            batch = training.random_batch(self.setup["vocabulary"], size, length)
            self.step = training.TrainingStep(self.model, batch)
        watch = Stopwatch()
        for _ in range(math.ceil(rows / size)):
            loss = self.step()
        jax.block_until_ready(loss)
        return watch.read()


def serve(side: Ours) -> None:
    """Answers commands until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        command = json.loads(line)
        answer = getattr(side, command.pop("do"))(**command)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    serve(Ours(sys.argv[1]))
