"""How the texts of `tda.trace` are cut into batches, and which batches V is estimated from.

A program is compiled for every length of batches. That takes longer than encoding a small corpus,
so a small one gets the lengths that minimise the time of compiling and padding together.
"""

import dataclasses
import itertools
from collections.abc import Iterable

import numpy as np

from tda.data import batches as batching
from tda.data.batches import BatchLayout
from tda.data.tokens import TokenTable
from tda.encoding.settings import TraceSettings

# With fewer tokens than this, padding costs less than compiling for more lengths of batches.
_FEW_TOKENS, _COARSE = 1 << 20, 1.5
# Below this, lengths are chosen one by one.
_FEWEST_TOKENS = 1 << 14
# Positions that take as long as compiling for another length, times the model's parameters. On 2
# CPU cores SmolLM2's encoder compiles in 4 s, and takes 7 ms a position with 135M parameters.
_COMPILING = 7e10
# A table that does not fill a few batches is cut into smaller ones: memory grows with a batch's
# positions (that model takes 7 GB with 4,096 and 2.8 GB with 640), and second moments from a single
# batch would be the square of one mean.
_FEWEST_BATCHES, _LEAST_POSITIONS = 4, 512
# Positions of a batch that second moments are estimated from, if a position takes long: four such
# batches come as near to V of a large sample as a whole small corpus does. With SmolLM2 and 60
# sentences, log 1/√V is off by 0.30 and 0.26; it varies by 0.70.
_SAMPLE_POSITIONS = 128


def make_layout(settings: TraceSettings, table: TokenTable, pad: int) -> BatchLayout:
    """Returns how a table is cut into batches: a small one into small ones of few lengths."""
    total = table.token_count
    if is_small(table):
        # Capped, so that padding never takes much more than the tokens, however small the model.
        price = min(max(total, _LEAST_POSITIONS), _compiling_positions(settings))
        bucket_lengths = cheapest_lengths(np.maximum(table.lengths - 1, 1), price)
    else:
        options = {"ratio": _COARSE} if total < _FEW_TOKENS else {}
        longest = int(table.lengths_of(np.array(table.longest)))
        bucket_lengths = batching.buckets(max(1, longest - 1), **options)
    most = min(settings.tokens_per_batch, max(_LEAST_POSITIONS, total // _FEWEST_BATCHES))
    # With `spread` no sequence moves to a longer length, which the prices do not allow for.
    spread = is_small(table) and len(bucket_lengths) > 1
    return BatchLayout(bucket_lengths, most, pad, settings.mesh, spread)


def is_small(table: TokenTable) -> bool:
    """Returns whether encoding a table takes less time than compiling a program."""
    return table.token_count < _FEWEST_TOKENS


def _compiling_positions(settings: TraceSettings) -> int:
    """Returns how many positions take as long as compiling for a length of batches."""
    return int(_COMPILING / max(1, settings.parameter_count))


def cheapest_lengths(positions: np.ndarray, price: int) -> tuple[int, ...]:
    """Returns the padded lengths that cost the fewest positions.

    Args:
        positions: positions of each sequence, int [N], at least one sequence.
        price: the cost of a length besides its sequences' padded positions, in positions.
    """
    lengths, counts = np.unique(positions, return_counts=True)
    # Sequences up to each length: a difference of two counts those padded to the longer one.
    reached = np.append(0, np.cumsum(counts))
    costs, cuts = np.zeros(len(lengths) + 1), np.zeros(len(lengths) + 1, np.int64)
    for i, length in enumerate(lengths, start=1):
        options = costs[:i] + (reached[i] - reached[:i]) * length + price
        cuts[i] = options.argmin()
        costs[i] = options[cuts[i]]
    chosen, i = [], len(lengths)
    while i:
        chosen.append(int(lengths[i - 1]))
        i = cuts[i]
    return tuple(reversed(chosen))


def sample_passages(
    settings: TraceSettings, table: TokenTable, layout: BatchLayout
) -> Iterable[dict]:
    """Yields batches of passages drawn from the whole corpus, to estimate second moments from."""
    count, seed = settings.moments.sample, settings.moments.seed
    # About as many rows as the batches hold: planning the whole corpus would take longer.
    mean = max(1.0, table.token_count / len(table))
    size = min(len(table), int(count * settings.tokens_per_batch / mean) + 1)
    rows = np.random.default_rng(seed).choice(len(table), size, replace=False)
    # The estimate runs on one device, even if a mesh encodes the corpus.
    layout = dataclasses.replace(layout, mesh=None)
    if is_small(table) and _compiling_positions(settings) < len(table.tokens):
        # With so slow positions the whole corpus would take longer here than in the encoder: a
        # full gradient costs 6 products with each weight, not 4, and its program compiles longer.
        longest = layout.bucket_lengths[-1]
        most = min(layout.tokens_per_batch, max(longest, _SAMPLE_POSITIONS))
        layout = dataclasses.replace(layout, bucket_lengths=(longest,), tokens_per_batch=most)
        count = min(count, _FEWEST_BATCHES)
    for batch in itertools.islice(layout.batches(table, rows, seed), count):
        yield batch.arrays()
