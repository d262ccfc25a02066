"""How much R should be shrunk by default, by the size of the corpus.

    python -m benchmarks.default_shrinkage --sizes=60,260,1060 --seeds=10

Trains a two-layer decoder on a small corpus of facts and other sentences, and traces what it says
of the facts. Up to 1,060 passages, four fifths of them state a fact that three others state in
other words; larger corpora are drawn from the 20,000 sentences of `world_facts` as they are. The
passages are ranked by `exp3` (no R), by `grad_cos` (neither R nor optimizer correction), and by
`trackstar_train` under each rule for shrinking R, all from the same two sets of gradients.

Prints the mean reciprocal rank of the first passage that states the fact, its mean over training
seeds, and its difference to the better of `exp3` and `grad_cos` (the better in the mean over seeds)
with the standard error of the paired difference.
"""

import collections
import random

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags
from flax import nnx

from tda import loss as losses
from tda import methods
from tda.data.tokenizer import Tokenizer
from tda.encoding import inputs
from tda.encoding.settings import MomentSettings, TraceSettings
from tda.facts.world_facts.corpus import generate
from tda.gradients.projection import Projection
from tda.model.decoder import Decoder
from tda.model.settings import DecoderSettings
from tda.retrieval import exact
from tda.retrieval.whitening import HessianSettings, Whitening

_SIZES = flags.DEFINE_list("sizes", ["60", "260", "1060"], "numbers of passages")
_SEEDS = flags.DEFINE_integer("seeds", 10, "training seeds")
_DAMPINGS = flags.DEFINE_list(
    "dampings", ["-1", "0.001", "0.1", "1"], "rules for R; below 0 shrinks it as its size needs"
)

_QUERIES, _STATEMENTS = 100, 4
_EPOCHS = {60: 60, 260: 40, 1060: 20}
_BATCH = 16


def corpus(size: int, seed: int) -> tuple[list[str], list[tuple[str, str]], list[list[int]]]:
    """Draws texts, queries (prompt, target), and the rows that state each query's fact."""
    sentences, facts = generate()
    text_of = {s.sentence_id: s.text for s in sentences}
    stated = {s.sentence_id: len(s.fact_triples) for s in sentences}
    rng = random.Random(f"{size} {seed}")
    facts = [f for f in facts if not f.is_repetition and f.n_objects_same_subject == 1]
    rng.shuffle(facts)
    chosen: dict[str, list[str]] = {}
    if size <= 1060:
        for fact in facts:
            alone = [i for i in fact.trex_sentences if stated[i] == 1]
            if len(chosen) < size // 5 and len(alone) >= _STATEMENTS:
                chosen[fact.fact_id] = rng.sample(alone, _STATEMENTS)
        ids = [i for members in chosen.values() for i in members]
        others = [i for i, count in stated.items() if not count]
        ids += rng.sample(others, size - len(ids))
    else:
        ids = rng.sample(list(text_of), size)
        drawn = set(ids)
        for fact in facts:
            if members := [i for i in fact.trex_sentences if i in drawn]:
                chosen[fact.fact_id] = members
    rng.shuffle(ids)
    row_of = {name: row for row, name in enumerate(ids)}
    asked = [f for f in facts if f.fact_id in chosen][:_QUERIES]
    return (
        [text_of[i] for i in ids],
        [(f.prompt0, f.entity1) for f in asked],
        [sorted(row_of[i] for i in chosen[f.fact_id]) for f in asked],
    )


def train(texts: list[str], tokenizer: Tokenizer, size: int, seed: int) -> Decoder:
    """Trains a decoder by a plain loop."""
    sizes = DecoderSettings(
        vocab_size=tokenizer.vocab_size,
        width=64,
        layers=2,
        heads=4,
        kv_heads=4,
        head_width=16,
        ff_width=256,
        gated=False,
        activation="gelu",
    )
    model = Decoder(sizes, rngs=nnx.Rngs(seed))
    sequences = [tokenizer.sequence(t) for t in texts]
    length = max(map(len, sequences))
    ids = np.array([s + [tokenizer.pad] * (length - len(s)) for s in sequences])
    weights = np.array([[1.0] * (len(s) - 1) + [0.0] * (length - len(s)) for s in sequences])
    epochs = _EPOCHS.get(size, 8)
    steps = epochs * (len(texts) // _BATCH)
    schedule = optax.warmup_cosine_decay_schedule(0.0, 3e-3, steps // 10, steps)
    optimizer = nnx.Optimizer(model, optax.adam(schedule), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, tokens, weights):
        def mean_loss(model):
            nats = losses.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:], weights)
            return nats.sum() / weights.sum()

        loss, gradient = nnx.value_and_grad(mean_loss)(model)
        optimizer.update(model, gradient)
        return loss

    rng = np.random.default_rng(seed)
    for _ in range(epochs):
        order = rng.permutation(len(texts))
        for start in range(0, len(texts) - _BATCH + 1, _BATCH):
            rows = order[start : start + _BATCH]
            loss = step(model, optimizer, jnp.asarray(ids[rows]), jnp.asarray(weights[rows]))
    print(f"{size} passages, seed {seed}: training loss {float(loss):.3f}", flush=True)
    return model


def encode(model, tokenizer, texts, queries, method: str) -> inputs.TraceGradients:
    """Takes the gradients of passages and queries as `tda.trace` does."""
    settings = TraceSettings(
        model=model,
        loss="loss",
        method=methods.METHODS[method],
        moments=MomentSettings("factored", None, 16, 0),
        projection=Projection(side=16, pooling="matrix"),
        scope=dict(include=None, exclude=None, untapped="leave"),
        tokens_per_batch=4096,
        mesh=None,
        quiet=True,
    )
    return inputs.encode_texts(settings, texts, queries, tokenizer, 128, None)


def reciprocal_rank(gradients, method: str, damping: float, correct) -> float:
    """Returns the mean reciprocal rank of a method."""
    source, queries_QxE = gradients.source, gradients.gradients_QxE
    whitening = Whitening(HessianSettings(damping=damping), source, queries_QxE, quiet=True)
    (part,) = whitening.parts({"": methods.METHODS[method]})
    ranked = exact.search(queries_QxE, source, part.scorers, source.rows)[""]
    first = [
        1 + np.flatnonzero(np.isin(rows, c))[0]
        for rows, c in zip(ranked.proponents, correct, strict=True)
    ]
    return float(np.mean(1 / np.array(first)))


def main(argv):
    """Runs every size and seed, and prints a table for each size."""
    del argv
    rows = collections.defaultdict(lambda: collections.defaultdict(list))
    for size in map(int, _SIZES.value):
        for seed in range(_SEEDS.value):
            texts, queries, correct = corpus(size, seed)
            tokenizer = Tokenizer.train(texts, 512 if size <= 260 else 2048)
            model = train(texts, tokenizer, size, seed)
            corrected, raw = (
                encode(model, tokenizer, texts, queries, m) for m in ("exp3", "grad_cos")
            )
            figures = rows[size]
            figures["exp3"].append(reciprocal_rank(corrected, "exp3", 0, correct))
            figures["grad_cos"].append(reciprocal_rank(raw, "grad_cos", 0, correct))
            for damping in _DAMPINGS.value:
                value = reciprocal_rank(corrected, "trackstar_train", float(damping), correct)
                figures[f"damping {damping}"].append(value)
            jax.clear_caches()
        print_table(size, rows[size])


def print_table(size: int, figures: dict[str, list[float]]) -> None:
    """Prints the rows of one size."""
    better = max((figures["exp3"], figures["grad_cos"]), key=np.mean)
    for name, values in figures.items():
        difference = np.subtract(values, better)
        error = np.std(difference, ddof=1) / len(values) ** 0.5 if len(values) > 1 else np.nan
        print(
            f"{size:7,d}  {name:15s} {np.mean(values):.3f}   "
            f"{np.mean(difference):+.3f} ± {error:.3f}   " + " ".join(f"{v:.3f}" for v in values),
            flush=True,
        )


if __name__ == "__main__":
    app.run(main)
