"""Encoding sentences of real lengths, in buckets, against sequences all of one length.

    python -m benchmarks.lengths --sentences=trex_lama_sentences.jsonl.gz --json=lengths.json
    python -m benchmarks.lengths --sentences=mine.jsonl --batches=120 --json=lengths.json

Batches are planned, padded, encoded and copied to the host as in `tda.run.encode`. Padding is given
for the whole corpus, planned at once and shard by shard of a store. The rate is that of scored
tokens over all of the plan's batches or a random sample; on the other side sequences of random
tokens fill every position. Both sides run in one process, batch by batch in turns: a round is some
pairs of batches, and a figure is the median over rounds of the ratio of the two rates; that of the
whole plan weights every length's median by the length's share. Every shape is compiled and run
first. Weights are random, since times do not depend on them. On a busy machine, --clock=cpu counts
the CPU seconds of all threads of this process instead of elapsed seconds.
"""

import collections
import statistics
import time

import numpy as np
from absl import app, flags
from flax import nnx

from benchmarks import record
from tda.data import batches, tokenised, tokens
from tda.data.documents import Document
from tda.data.tokenizer import Tokenizer
from tda.facts import files
from tda.gradients.encoder import Encoder, make_encoder, scored_positions
from tda.gradients.projection import Projection
from tda.model import sizes
from tda.model.decoder import Decoder
from tda.model.settings import DecoderSettings
from tda.plan import calibration

_SENTENCES = flags.DEFINE_string("sentences", None, "JSON lines: the corpus", required=True)
_BATCHES = flags.DEFINE_integer("batches", 0, "batches of the plan that are timed; 0: all")
_ROUND = flags.DEFINE_integer("round", 5, "batches of each side in a round")
_VOCABULARY = flags.DEFINE_integer("vocabulary", 8192, "of the tokenizer trained on the corpus")
_CONTEXT = flags.DEFINE_integer("context", 128, "positions that a sequence may have")
_TOKENS = flags.DEFINE_integer("tokens", 4096, "positions of a batch")
_RATIO = flags.DEFINE_float("ratio", None, "of neighbouring buckets; by default that of `buckets`")
_SIZE = flags.DEFINE_string("size", "small", "model of tda/model/sizes.py (small: the 10m)")
_CLOCK = flags.DEFINE_enum("clock", "wall", ["wall", "cpu"], "cpu: the process's own time")
_SIDE = flags.DEFINE_integer("side", 16, "side of the projection")

_SHARD_BYTES = 256 << 20


def now() -> float:
    """Returns the seconds of the chosen clock."""
    return time.perf_counter() if _CLOCK.value == "wall" else time.process_time()


def read(path: str) -> tuple[tokens.TokenTable, Tokenizer]:
    """Returns the corpus, tokenised by a tokenizer that is trained on it."""
    sentences = list(files.iter_sentences(path))
    tokenizer = Tokenizer.train([s.text for s in sentences], _VOCABULARY.value)
    documents = (Document(s.sentence_id, s.text) for s in sentences)
    return tokenised.tokenise_in_memory(documents, tokenizer, _CONTEXT.value)[0], tokenizer


def padding(positions: np.ndarray, bucket_lengths: tuple[int, ...], rows: int) -> dict:
    """Returns the shares of padding in the computed positions, planning `rows` rows at a time."""
    cells, of_rows, count, shapes = 0, 0, 0, set()
    for start in range(0, len(positions), rows):
        some = positions[start : start + rows]
        planned = batches.plan(some, bucket_lengths, _TOKENS.value)
        cells += int(np.sum(planned.lengths * planned.sizes))
        of_rows += int(np.sum(planned.lengths * (planned.sizes - np.diff(planned.starts))))
        count += len(planned)
        shapes |= set(zip(planned.lengths.tolist(), planned.sizes.tolist(), strict=True))
    return {
        "padding": 1 - int(positions.sum()) / cells,
        "of it rows that are padding": of_rows / cells,
        "batches": count,
        "shapes": len(shapes),
    }


class Side:
    """Batches of a plan, encoded and timed one by one."""

    def __init__(self, encoder: Encoder, table: tokens.TokenTable, planned: batches.Plan, pad: int):
        self.encoder, self.table, self.planned, self.pad = encoder, table, planned, pad

    def __call__(self, i: int) -> dict:
        """Encodes batch i; returns its length, positions, scored tokens, and seconds."""
        p, started = self.planned, now()
        batch = batches.materialise(self.table, p.members(i), p.lengths[i], p.sizes[i], self.pad)
        scored = scored_positions(batch.weights)
        made = now()
        np.asarray(self.encoder(batch.arrays(), scored))
        return {
            "length": int(p.lengths[i]),
            "positions": batch.tokens.size,
            "tokens": int(batch.weights.sum()),
            "seconds": now() - started,
            "host": made - started,
        }


def rate(done: list[dict], of: str = "tokens") -> float:
    """Returns tokens or positions a second over some batches."""
    return sum(d[of] for d in done) / sum(d["seconds"] for d in done)


def in_turns(real: Side, fixed: Side, chosen: np.ndarray) -> list[tuple[list, list]]:
    """Times pairs of batches of the two sides, and returns them by round."""
    # The first and last of a length: only the first may have rows so short that fewer logits count.
    lengths = np.unique(real.planned.lengths)
    ends = [np.searchsorted(real.planned.lengths, lengths, s) for s in ("left", "right")]
    for side, numbers in ((real, np.concatenate([ends[0], ends[1] - 1])), (fixed, [0, 0])):
        for i in numbers:
            side(i)
    rounds = []
    for start in range(0, len(chosen), _ROUND.value):
        some = chosen[start : start + _ROUND.value]
        pairs = [(real(i), fixed(0)) for i in some]
        rounds.append(tuple(zip(*pairs, strict=True)))
        ratios = [rate(a) / rate(b) for a, b in rounds]
        print(f"  {start + len(some)} batches: {statistics.median(ratios):.3f}", flush=True)
    return rounds


def rates(rounds: list[tuple[list, list]], planned: batches.Plan, scored: int) -> dict:
    """Returns the figures of all rounds, and those of the whole plan with `scored` tokens."""
    by_length, hosts = collections.defaultdict(list), []
    for real, fixed in rounds:
        for mine, other in zip(real, fixed, strict=True):
            ratio = rate([mine], "positions") / rate([other], "positions")
            by_length[mine["length"]].append(ratio)
            hosts.append(mine["host"] / mine["seconds"])
    medians = {length: statistics.median(r) for length, r in sorted(by_length.items())}
    cells = planned.lengths * planned.sizes
    timed = np.isin(planned.lengths, list(medians))
    usual = [cells[i] / medians[int(planned.lengths[i])] for i in np.flatnonzero(timed)]
    positions = cells[timed].sum() / sum(usual)
    return {
        "rate over the fixed length's, median": statistics.median(
            rate(a) / rate(b) for a, b in rounds
        ),
        "rate over the fixed length's, whole plan": positions * scored / int(cells.sum()),
        "rate of positions over the fixed length's, whole plan": positions,
        "share of the plan at lengths that were timed": cells[timed].sum() / cells.sum(),
        "tokens a second, fixed length": statistics.median(rate(b) for _, b in rounds),
        "host's share of the time": statistics.median(hosts),
        "rate of positions by length": {
            length: {
                "ratio": ratio,
                "batches": len(by_length[length]),
                "share of the plan": float(cells[planned.lengths == length].sum() / cells.sum()),
            }
            for length, ratio in medians.items()
        },
    }


def main(argv):
    """Plans, prints the padding, times, and writes the figures."""
    del argv
    table, tokenizer = read(_SENTENCES.value)
    positions = table.lengths - 1
    options = {} if _RATIO.value is None else {"ratio": _RATIO.value}
    bucket_lengths = batches.buckets(_CONTEXT.value, **options)
    shape = sizes.size(_SIZE.value) | dict(vocab_size=tokenizer.vocab_size)
    model = Decoder(DecoderSettings(**shape), rngs=nnx.Rngs(0))
    encoder = make_encoder(model, Projection(side=_SIDE.value, blocks=shape["layers"]))
    shard_rows = _SHARD_BYTES // (4 * encoder.layout.width)
    figures = {
        "clock": _CLOCK.value,
        "passages": len(table),
        "positions of a passage": dict(
            zip(
                ("mean", "5%", "50%", "95%"),
                [float(positions.mean()), *np.percentile(positions, [5, 50, 95]).tolist()],
                strict=True,
            )
        ),
        "buckets": list(bucket_lengths),
        "positions of a batch": _TOKENS.value,
        "padding by rows planned at once": {
            str(n): padding(positions, bucket_lengths, n)
            for n in (len(table), shard_rows, 6000, 2500, 700)
        },
    }
    for rows, found in figures["padding by rows planned at once"].items():
        print(f"{rows:>7} rows at once: {found['padding']:.1%} padding, {found['batches']} batches")
    planned = batches.plan(positions, bucket_lengths, _TOKENS.value)
    everything = np.random.default_rng(0).permutation(len(planned))
    real = Side(encoder, table, planned, tokenizer.pad)
    count = max(1, _TOKENS.value // _CONTEXT.value)
    other = calibration.random_table(count, _CONTEXT.value, tokenizer.vocab_size)
    alone = batches.plan(other.lengths - 1, (_CONTEXT.value,), _TOKENS.value)
    fixed = Side(encoder, other, alone, tokenizer.pad)
    rounds = in_turns(real, fixed, everything[: _BATCHES.value or None])
    figures |= rates(rounds, planned, int(table.scored.sum()))
    for key, value in figures.items():
        if isinstance(value, float):
            print(f"{key}: {value:,.3f}")
    for length, found in figures["rate of positions by length"].items():
        share, count = found["share of the plan"], found["batches"]
        print(f"  {length:4} positions ({share:.1%}): {found['ratio']:.3f} ({count} batches)")
    record.write("lengths", figures)


if __name__ == "__main__":
    app.run(main)
