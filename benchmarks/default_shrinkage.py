"""How much R should be shrunk by default, by the size of the corpus.

    python -m benchmarks.default_shrinkage --sizes=60,260,1060 --seeds=10
    python -m benchmarks.default_shrinkage --sizes=89299 --seeds=1 --record=shrinkage.jsonl \\
        --sentences=trex_lama_sentences.jsonl.gz --facts=trex_lama_facts.jsonl.gz

Trains a two-layer decoder on a small corpus of facts and other sentences, and traces what it says
of the facts. Up to 1,060 passages, four fifths of them state a fact that three others state in
other words; larger corpora are drawn from the 20,000 sentences of `world_facts` as they are. Above
20,000, the passages are all the sentences of a file, the queries those of `configs/trex_table1.py`,
and a model of four layers of twice the width is trained for two epochs, on other facts in the words
of their prompts too: with the small one no method finds anything (MRR 0.01). The passages are
ranked by `exp3` (no R), by `grad_cos` (neither R nor optimizer correction), and by
`trackstar_train` under each rule for shrinking R, with R dense and as a Kronecker product, all from
the same two sets of gradients.

Prints the mean reciprocal rank of the first passage that states the fact, its mean over training
seeds, and its difference to the better of `exp3` and `grad_cos` (the better in the mean over seeds)
with the standard error of the paired difference. While it runs, each seed's figures, with errors
over its queries.
"""

import itertools
import json
import pathlib
import random
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm
from absl import app, flags
from flax import nnx

from configs import trex_table1
from tda import loss as losses
from tda import methods
from tda.data import batches
from tda.data import tokens as token_tables
from tda.data.pretrained_tokenizer import PretrainedTokenizer
from tda.data.rows import parse_queries
from tda.data.tokenizer import Tokenizer
from tda.encoding import inputs
from tda.encoding.settings import MomentSettings, TextSettings, TraceSettings
from tda.evaluation.likelihood import target_statistics
from tda.facts import files, labels, statements
from tda.facts.world_facts.corpus import generate
from tda.gradients.projection import Projection
from tda.model.decoder import Decoder
from tda.model.settings import DecoderSettings
from tda.retrieval import exact
from tda.retrieval.hessian_settings import HessianSettings
from tda.retrieval.whitening import Whitening
from tda.runtime import progress

_SIZES = flags.DEFINE_list("sizes", ["60", "260", "1060"], "numbers of passages")
_SEEDS = flags.DEFINE_integer("seeds", 10, "training seeds")
_DAMPINGS = flags.DEFINE_list(
    "dampings", ["-1", "0.001", "0.1", "1"], "rules for R; below 0 shrinks it as its size needs"
)
_STRUCTURES = flags.DEFINE_list("structures", ["dense", "kronecker"], "structures of R")
_RECORD = flags.DEFINE_string("record", "", "JSON lines of finished seeds, which are not run again")
_SENTENCES = flags.DEFINE_string("sentences", "", "JSON lines of a corpus of more than 20,000")
_FACTS = flags.DEFINE_string("facts", "", "JSON lines of its facts")

_QUERIES, _STATEMENTS = 100, 4
_EPOCHS = {60: 60, 260: 40, 1060: 20}
_BATCH = 16
_LARGEST_DRAWN = 20_000


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


def corpus_of_files() -> tuple[
    list[str], list[tuple[str, str]], list[list[int]], Iterator[tuple[str, str]]
]:
    """Reads texts, queries and their rows as `corpus` does, and further text for training."""
    sentences = list(files.iter_sentences(_SENTENCES.value))
    facts = list(files.iter_facts(_FACTS.value))
    config = trex_table1.get_config().data
    pool = labels.clean_pool(facts, sentences, config.exclude_relations.split(","))
    queries = labels.select(sentences, pool, len(sentences), config.n_queries, config.seed)[1]
    stated = labels.relevant_passages(sentences, queries)
    row_of = {s.sentence_id: row for row, s in enumerate(sentences)}
    return (
        [s.text for s in sentences],
        [(f.prompt0, f.entity1) for f in queries],
        [[row_of[i] for i in stated[f.fact_id]] for f in queries],
        statements.statements(facts, queries, 1),
    )


def plan_training(size: int, lengths: np.ndarray, seed: int) -> list[tuple[np.ndarray, int]]:
    """Returns the rows and the padded length of the sequences of every training step."""
    if size > _LARGEST_DRAWN:
        buckets = batches.buckets(int(lengths.max()), ratio=1.5)
        plans = [batches.plan(lengths, buckets, 2048, seed=2 * seed + i) for i in range(2)]
        return [(p.members(i), int(p.lengths[i])) for p in plans for i in range(len(p))]
    rng, count = np.random.default_rng(seed), len(lengths)
    orders = [rng.permutation(count) for _ in range(_EPOCHS.get(size, 8))]
    starts = range(0, count - _BATCH + 1, _BATCH)
    return [(order[i : i + _BATCH], int(lengths.max())) for order in orders for i in starts]


def train(texts: list[str], tokenizer: Tokenizer, size: int, seed: int) -> Decoder:
    """Trains a decoder by a plain loop."""
    scale = 2 if size > _LARGEST_DRAWN else 1
    sizes = DecoderSettings(
        vocab_size=tokenizer.vocab_size,
        width=64 * scale,
        layers=2 * scale,
        heads=4 * scale,
        kv_heads=4 * scale,
        head_width=16,
        ff_width=256 * scale,
        gated=False,
        activation="gelu",
    )
    model = Decoder(sizes, rngs=nnx.Rngs(seed))
    sequences = [tokenizer.sequence(t) for t in texts]
    steps = plan_training(size, np.array([len(s) - 1 for s in sequences]), seed)
    schedule = optax.warmup_cosine_decay_schedule(0.0, 3e-3 / scale, len(steps) // 10, len(steps))
    optimizer = nnx.Optimizer(model, optax.adam(schedule), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, tokens, weights):
        def mean_loss(model):
            nats = losses.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:], weights)
            return nats.sum() / weights.sum()

        loss, gradient = nnx.value_and_grad(mean_loss)(model)
        optimizer.update(model, gradient)
        return loss

    for rows, length in tqdm.tqdm(steps, "train", mininterval=10):
        chosen = [sequences[row] for row in rows]
        padded = [s + [tokenizer.pad] * (length + 1 - len(s)) for s in chosen]
        weights = [[1.0] * (len(s) - 1) + [0.0] * (length + 1 - len(s)) for s in chosen]
        loss = step(model, optimizer, jnp.asarray(padded), jnp.asarray(weights))
    print(f"{size} passages, seed {seed}: training loss {float(loss):.3f}", flush=True)
    return model


def print_known(model: Decoder, tokenizer: PretrainedTokenizer, queries) -> None:
    """Prints what share of the targets the model ranks in its first ten."""
    table = token_tables.tokenise_queries(parse_queries(queries), tokenizer, 512, None)
    layout = batches.BatchLayout((int(table.lengths.max()) - 1,), 4096, tokenizer.pad)
    ranks = [
        target_statistics(model(batch.tokens), batch.targets, batch.weights)[1][: len(batch.rows)]
        for batch in layout.batches(table)
    ]
    print(f"targets in the first ten: {np.mean(np.concatenate(ranks) <= 10):.1%}", flush=True)


def encode(model, tokenizer, texts, queries, method: str) -> tuple:
    """Takes the gradients of passages and queries as `tda.trace` does.

    Returns:
        The passages' source, the queries' gradients, [Q, E], and the shapes of their blocks.
    """
    settings = TraceSettings(
        model=model,
        loss="loss",
        corrected=methods.METHODS[method].corrected,
        moments=MomentSettings("factored", None, 16, 0),
        projection=Projection(side=16, pooling="matrix"),
        scope=dict(include=None, exclude=None, untapped="leave"),
        tokens_per_batch=4096,
        mesh=None,
    )
    reading = TextSettings(
        tokenizer=PretrainedTokenizer.wrap(tokenizer),
        context=512,
        text_field=None,
        id_field=None,
        directory=None,
    )
    made = inputs.TextInputs(settings, inputs.TextCorpus(texts, reading))
    encoded = made.encode_queries(queries, methods.METHODS[method], joiner=None)
    return made.source, encoded.gradients_QxE, settings.layout().shapes


def reciprocal_ranks(gradients, method: str, settings: HessianSettings, correct) -> np.ndarray:
    """Returns the reciprocal rank of each query by a method, float64 [Q]."""
    source, queries_QxE, shapes = gradients
    whitening = Whitening(settings, source, queries_QxE, shapes=shapes)
    (part,) = whitening.parts({"": methods.METHODS[method]})
    rows = {"": [np.asarray(c) for c in correct]}
    ranked = exact.search(queries_QxE, source, part.scorers, k=1, correct=rows)[""]
    return 1 / ranked.first_ranks[""]


def measure(size: int, seed: int) -> dict[str, float]:
    """Trains a model and returns the mean reciprocal rank of every method and rule for R."""
    if size > _LARGEST_DRAWN:
        texts, queries, correct, others = corpus_of_files()
        training_texts, vocabulary = texts + [text for _, text in others], 4096
    else:
        texts, queries, correct = corpus(size, seed)
        training_texts, vocabulary = texts, 512 if size <= 260 else 2048
    tokenizer = Tokenizer.train(training_texts, vocabulary)
    model = train(training_texts, tokenizer, size, seed)
    print_known(model, PretrainedTokenizer.wrap(tokenizer), queries)
    corrected, raw = (encode(model, tokenizer, texts, queries, m) for m in ("exp3", "grad_cos"))
    ranks_Q = {
        "exp3": reciprocal_ranks(corrected, "exp3", HessianSettings(), correct),
        "grad_cos": reciprocal_ranks(raw, "grad_cos", HessianSettings(), correct),
    }
    for structure, damping in itertools.product(_STRUCTURES.value, _DAMPINGS.value):
        settings = HessianSettings(damping=float(damping), structure=structure)
        ranks_Q[f"{structure}, damping {damping}"] = reciprocal_ranks(
            corrected, "trackstar_train", settings, correct
        )
    jax.clear_caches()
    for name, ranks in ranks_Q.items():
        difference = ranks - ranks_Q["exp3"]
        error = np.std(difference, ddof=1) / len(ranks) ** 0.5
        print(f"  {name:24s} {ranks.mean():.3f}, less exp3 {difference.mean():+.3f} ± {error:.3f}")
    return {name: float(ranks.mean()) for name, ranks in ranks_Q.items()}


def main(argv):
    """Runs every size and seed, and prints a table for each size."""
    del argv
    record = pathlib.Path(_RECORD.value) if _RECORD.value else None
    finished = {}
    if record is not None and record.exists():
        for line in record.read_text().splitlines():
            entry = json.loads(line)
            finished[entry["size"], entry["seed"]] = entry["mrr"]
    for size in map(int, _SIZES.value):
        rows = []
        for seed in range(_SEEDS.value):
            with progress.hidden():
                figures = finished.get((size, seed)) or measure(size, seed)
            rows.append(figures)
            if record is not None and (size, seed) not in finished:
                with record.open("a") as out:
                    print(json.dumps({"size": size, "seed": seed, "mrr": figures}), file=out)
        print_table(size, {name: [r[name] for r in rows] for name in rows[0]})


def print_table(size: int, figures: dict[str, list[float]]) -> None:
    """Prints the rows of one size."""
    better = max((figures["exp3"], figures["grad_cos"]), key=np.mean)
    for name, values in figures.items():
        difference = np.subtract(values, better)
        error = np.std(difference, ddof=1) / len(values) ** 0.5 if len(values) > 1 else np.nan
        print(
            f"{size:7,d}  {name:24s} {np.mean(values):.3f}   "
            f"{np.mean(difference):+.3f} ± {error:.3f}   " + " ".join(f"{v:.3f}" for v in values),
            flush=True,
        )


if __name__ == "__main__":
    app.run(main)
