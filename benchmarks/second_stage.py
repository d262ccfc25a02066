"""The second stage: seconds a (query, candidate) pair, against forming whole gradients.

    python -m benchmarks.second_stage --size=tiny --queries=64 --passages=128

Both sides score every query against every passage: ours from the factors of gradients, and so does
one that forms the gradient of each parameter of each example and multiplies. They take turns. Below
it are lists of candidates, an eighth of all pairs, and encoding the same passages at side 16.
"""

import jax
import numpy as np
from absl import app, flags
from flax import nnx

from benchmarks import record
from tda.data.batches import BatchLayout
from tda.data.tokens import TokenTable
from tda.encoding import table as encoding
from tda.gradients import pair_products, reference
from tda.gradients.encoder import make_encoder
from tda.gradients.factors import GradientFactors
from tda.gradients.projection import Projection
from tda.gradients.second_stage import Pairs, PairScorer
from tda.gradients.sites import find_sites
from tda.model.decoder import Decoder
from tda.model.settings import DecoderSettings
from tda.model.sizes import size

_SIZE = flags.DEFINE_string("size", "tiny", "a size in tda/model/sizes.py")
_QUERIES = flags.DEFINE_integer("queries", 64, "queries")
_PASSAGES = flags.DEFINE_integer("passages", 128, "passages")
_LENGTHS = flags.DEFINE_list("lengths", ["12", "32"], "positions of a query and of a passage")
_ROUNDS = flags.DEFINE_integer("rounds", 5, "times that each side is timed")
_JSON = flags.DEFINE_string("json", "", "file to write the figures to")

_VOCABULARY = 2048
_LARGEST_DIFFERENCE = 1e-5


def _table(rows: int, positions: int, seed: int) -> TokenTable:
    """Returns rows of random tokens of one length, all scored."""
    tokens = np.random.default_rng(seed).integers(1, _VOCABULARY, rows * (positions + 1))
    starts = np.arange(rows + 1) * (positions + 1)
    scored = np.arange(len(tokens)) % (positions + 1) > 0
    names = list(map(str, range(rows)))
    return TokenTable(names, names, tokens.astype(np.int32), starts, scored)


def main(argv):
    """Prints the seconds of each side, and the largest difference of their scores."""
    del argv
    settings = DecoderSettings(vocab_size=_VOCABULARY, **size(_SIZE.value))
    model = Decoder(settings, rngs=nnx.Rngs(0))
    sites = find_sites(model)
    lengths = tuple(map(int, _LENGTHS.value))
    counts = _QUERIES.value, _PASSAGES.value
    queries, passages = (
        _table(n, t, i) for i, (n, t) in enumerate(zip(counts, lengths, strict=True))
    )
    layout = BatchLayout(lengths, 4096, pad=0)
    factors = GradientFactors(model, sites)
    metric = {"cosine": (pair_products.identity(sites), True)}
    scorer = PairScorer(factors, metric, layout, 4 << 30)
    complete = Pairs.of_all(*counts)
    rng = np.random.default_rng(0)
    lists = [rng.choice(counts[1], max(1, counts[1] // 8), replace=False) for _ in range(counts[0])]
    some = Pairs.of_lists(lists)
    gradients = jax.jit(lambda batch: reference.per_example_gradients(model, batch))
    encoder = make_encoder(model, Projection(side=16, pooling="matrix"), tell=False)

    def formed(table: TokenTable) -> np.ndarray:
        """Returns the gradients of a table's rows, of norm one."""
        rows = np.empty((len(table), sum(int(np.prod(s.shape)) for s in sites)), np.float32)
        for batch in layout.batches(table):
            whole = gradients(batch.arrays())
            parts = [np.asarray(whole[s.path]).reshape(len(batch.tokens), -1) for s in sites]
            rows[batch.places] = np.concatenate(parts, axis=1)[: len(batch.places)]
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    sides = {
        "ours, all pairs": lambda: scorer.score(queries, passages, complete)["cosine"],
        "gradients formed, all pairs": lambda: formed(queries) @ formed(passages).T,
        "ours, an eighth": lambda: scorer.score(queries, passages, some)["cosine"],
        "encoding the passages": lambda: encoding.encode_rows(
            encoder, passages, np.arange(counts[1]), layout
        ),
    }
    ours = np.stack([s for _, s in complete.by_query(sides["ours, all pairs"](), counts[0])])
    difference = float(np.abs(ours - sides["gradients formed, all pairs"]()).max())
    times = record.in_turns(sides, _ROUNDS.value, warm_ups=1)
    seconds = {name: float(np.median(x)) for name, x in times.items()}
    figures = {"seconds": seconds, "difference": difference, "times": times}
    for name, pairs in (("ours, all pairs", complete), ("ours, an eighth", some)):
        figures[f"microseconds a pair, {name}"] = 1e6 * seconds[name] / len(pairs.queries)
    for name, x in seconds.items():
        print(f"{name}: {x:.3f} s")
    for name in list(figures)[3:]:
        print(f"{name}: {figures[name]:.0f}")
    print(f"largest difference of a cosine: {difference:.1e}")
    if _JSON.value:
        record.write(_JSON.value, "second_stage", figures)
    if difference > _LARGEST_DIFFERENCE:
        raise SystemExit(f"the sides differ by more than {_LARGEST_DIFFERENCE}")


if __name__ == "__main__":
    app.run(main)
