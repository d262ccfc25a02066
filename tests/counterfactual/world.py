"""A tiny training and its queries, shared by the tests of this room."""

import functools
import pathlib
import tempfile

import numpy as np

from tda.counterfactual.metagradients import Reverse
from tda.counterfactual.training import QueryLosses, Training, plan_batches
from tda.data.batches import BatchLayout
from tda.data.tokens import TokenTable
from tda.model import functional
from tda.training import optimizer
from tests.conftest import TINY, make_decoder

PASSAGES, QUERIES = 24, 5
LAYOUT = BatchLayout((8,), 64, pad=0)
_STATES = tempfile.TemporaryDirectory()


def make_table(lengths, seed, name="p", targets=None):
    """Sequences of random tokens; only the last `targets` of each are scored, by default all."""
    rng = np.random.default_rng(seed)
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    # Half of the tokens are one of four: something to learn in a few steps.
    drawn = rng.integers(1, TINY["vocab_size"], starts[-1])
    tokens = np.where(rng.random(starts[-1]) < 0.5, rng.integers(1, 5, starts[-1]), drawn)
    at = np.concatenate([np.arange(n) for n in lengths])
    size = np.repeat(lengths, lengths)
    scored = (at > 0) & (at >= size - (targets or 99))
    ids = [f"{name}{i}" for i in range(len(lengths))]
    return TokenTable(ids, ids, tokens.astype(np.int32), starts, scored)


def make_optimizer(steps, name="adam", **constants):
    rate = optimizer.schedule("cosine", 1e-2, steps, 2, 0.1)
    return optimizer.make_optimizer(name, rate, **{"eps_root": 1e-5, **constants})


@functools.cache
def make_training(seed=0, optimizer_name="adam", epochs=2.0):
    """Six steps on 24 passages of 4 to 9 tokens, in batches of eight."""
    table = make_table(4 + np.arange(PASSAGES) % 6, seed=1)
    model_fn, params = functional.split(make_decoder())
    batches = plan_batches(table, LAYOUT, epochs, seed)
    return Training(model_fn, params, make_optimizer(len(batches), optimizer_name), table, batches)


@functools.cache
def make_reverse():
    return Reverse(make_training(), make_queries(), pathlib.Path(_STATES.name))


@functools.cache
def exact_scores():
    """−dL/dw of all queries by token: shared, since its program takes seconds to compile."""
    return make_reverse().by_token(np.arange(QUERIES))


@functools.cache
def make_queries():
    table = make_table([6, 7, 8, 5, 9][:QUERIES], seed=2, name="q", targets=2)
    return QueryLosses(make_training().model_fn, table, LAYOUT)
