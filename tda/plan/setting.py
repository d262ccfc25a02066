"""What a config sets the planner: sizes of its model, its encodings and its corpus."""

import contextlib
import dataclasses
import math
import tempfile

import jax
import numpy as np
from flax import nnx

from tda import methods
from tda.data.batches import buckets
from tda.gradients import projection as projections
from tda.gradients import sites
from tda.gradients.moments.second_moments import parse_correction
from tda.gradients.projection import Projection
from tda.gradients.sites import find_sites
from tda.model.decoder import Decoder
from tda.model.settings import DecoderSettings
from tda.plan import cost
from tda.run import corpus, train
from tda.run.encode import NO_STORE
from tda.run.workdir import Workdir


@dataclasses.dataclass(frozen=True)
class Size:
    """How large a corpus is.

    Attributes:
        passages, tokens, queries: how many there are.
        vocab_size: V of the model.
        positions: of each passage, or None where only their number is known.
        query_positions: of each query, or None.
        labelled: passages that are correct for some query: the search scores them once more first.
    """

    passages: int
    tokens: int
    queries: int
    vocab_size: int
    positions: np.ndarray | None = None
    query_positions: np.ndarray | None = None
    labelled: int = 0


@dataclasses.dataclass(frozen=True)
class Setting:
    """Everything that a plan is reckoned from.

    Attributes:
        size: of the corpus.
        parameters: numbers in the model.
        sites: of the gradients that are taken.
        model: what a position is multiplied by.
        widths: numbers in each block of an encoding.
        taps: what is taken of the model, by correction; a store is made for each.
        methods: those that search each store, by correction.
        left_out: titles of methods with other gradients, or of several checkpoints, which are not
            reckoned.
        dtype: that the model computes in.
        store_dtype: of the numbers on disk; "none" where the corpus is encoded as it is searched.
        r_rows: passages that R is taken of.
        rule: whether λ is found by the rule, which takes two spectra.
        shapes, query_shapes: how many batches of each shape (B, T) there are.
    """

    size: Size
    parameters: int
    sites: list[sites.Site]
    model: cost.Model
    widths: list[int]
    taps: dict[str, cost.Taps]
    methods: dict[str, list[methods.Method]]
    left_out: list[str]
    dtype: str
    store_dtype: str
    r_rows: int
    rule: bool
    shapes: dict[tuple, float]
    query_shapes: dict[tuple, float]

    passages = property(lambda self: self.size.passages)
    tokens = property(lambda self: self.size.tokens)
    queries = property(lambda self: self.size.queries)
    vocab_size = property(lambda self: self.size.vocab_size)
    width = property(lambda self: sum(self.widths))
    has_store = property(lambda self: self.store_dtype != NO_STORE)
    stores = property(lambda self: len(self.taps) * self.has_store)

    @property
    def passes(self) -> list[tuple[str, ...]]:
        """The corrections of every pass over the corpus: all in one, where they have stores."""
        return [tuple(self.taps)] if self.has_store else [(c,) for c in self.taps]

    def stored_bytes(self, rows: int) -> int:
        """Bytes of so many gradients on disk: 0 where there is no store."""
        return rows * cost.row_bytes(self.widths, self.store_dtype) if self.has_store else 0

    def decompositions(self, correction: str) -> tuple[int, int]:
        """How many R^(−1/2) a store's methods need, and how many times R is decomposed for them."""
        kinds = {m.hessian for m in self.methods[correction]} - {"none"}
        return len(kinds), len(kinds) + 2 * ("mixed" in kinds and self.rule)

    def hessians(self) -> tuple[int, int]:
        """How many R and R^(−1/2) are held at once at the most."""
        kinds = [{m.hessian for m in ms} - {"none"} for ms in self.methods.values()]
        return max(((1 + ("mixed" in k), len(k)) for k in kinds if k), default=(0, 0))

    def held(self) -> int:
        """Bytes that encoding holds for every batch, over the devices of one copy of the model."""
        tapped = [_matrix(s) for s in self.sites]
        alone = cost.held_bytes(self.parameters, [], 0, False)
        more = {
            c: cost.held_bytes(self.parameters, tapped, t.side * t.rank, t.exact) - alone
            for c, t in self.taps.items()
        }
        return alone + max(sum(more[c] for c in corrections) for corrections in self.passes)

    def figures(self) -> dict:
        """The same as JSON values."""
        return {
            "parameters": self.parameters,
            "with_gradients": sum(m.numbers for m in map(_matrix, self.sites)),
            "dtype": self.dtype,
            "passages": self.passages,
            "tokens": self.tokens,
            "queries": self.queries,
            "stated": self.size.positions is None,
            "padding": 1 - self.tokens / sum(B * T * n for (B, T), n in self.shapes.items()),
            "blocks": len(self.widths),
            "largest_block": max(self.widths),
            "width": self.width,
        }


def of(config, multiple: int = 1) -> Setting:
    """The setting of a config.

    Args:
        config: of a run.
        multiple: what B of a batch is a multiple of: devices that the batch is split over.

    Raises:
        ValueError: a key is out of range, or no method needs gradients; or as `corpus.load` does.
    """
    chosen_methods, left_out = _by_correction(config)
    size = _size(config)
    arguments = train.model_arguments(config, size.vocab_size)
    model = nnx.eval_shape(lambda: Decoder(DecoderSettings(**arguments), rngs=nnx.Rngs(0)))
    g, projection = config.gradients, Projection(**dict(config.projection))
    scope = dict(include=g.include or None, exclude=g.exclude or None, untapped=g.untapped)
    chosen = find_sites(model, **scope)
    layout = projections.layout(chosen, projection)
    widths = [projection.side**2] * len(layout.blocks)
    everything = find_sites(model, include=".")
    row = cost.row_bytes(
        widths, "float32" if config.store.dtype == NO_STORE else config.store.dtype
    )
    shard_rows = max(1, config.store.shard_bytes // row)
    plan = (buckets(config.model.context), g.tokens_per_batch, multiple, shard_rows)
    if size.positions is None:
        # Every passage is taken to have the mean length.
        length = math.ceil(size.tokens / size.passages)
        examples = max(1, g.tokens_per_batch // length // multiple) * multiple
        shapes, query_shapes = {(examples, length): size.passages / examples}, {}
    else:
        shapes = cost.batch_shapes(size.positions, *plan)
        query_shapes = cost.batch_shapes(size.query_positions, *plan)
    return Setting(
        size=size,
        parameters=sum(p.size for p in jax.tree.leaves(nnx.state(model, nnx.Param))),
        sites=chosen,
        model=_model(everything, arguments),
        widths=widths,
        taps={c: _taps(chosen, projection.side, c, model.settings.tied) for c in chosen_methods},
        methods=chosen_methods,
        left_out=left_out,
        dtype=config.model.dtype,
        store_dtype=config.store.dtype,
        r_rows=min(config.hessian.sample or size.passages, size.passages),
        rule=config.hessian.weight < 0,
        shapes=shapes,
        query_shapes=query_shapes,
    )


def _by_correction(config) -> tuple[dict[str, list[methods.Method]], list[str]]:
    """The methods that need a store, by its correction, and the titles of those left out."""
    out: dict[str, list] = {}
    left_out = []
    for method in methods.parse(config.methods).values():
        if method.retriever != "gradient":
            continue
        if method.beyond_plain.keys() - {"evaluation"}:
            left_out.append(method.title)
            continue
        correction = config.gradients.correction if method.corrected else "none"
        out.setdefault(correction, []).append(method)
    if not out:
        raise ValueError(
            f"none of methods={config.methods} searches the gradients of one checkpoint: nothing "
            "to plan"
        )
    return out, left_out


def _size(config) -> Size:
    """The size that the config states, or that of its corpus, which is read."""
    stated = dict(config.plan)
    if any(stated.values()):
        wrong = [f"plan.{k}={v}" for k, v in stated.items() if v < 1]
        if wrong:
            raise ValueError(f"{', '.join(wrong)}: give all of a corpus's size, or nothing of it")
        if stated["tokens"] > stated["passages"] * config.model.context:
            raise ValueError(
                f"plan.tokens={stated['tokens']} are more than plan.passages={stated['passages']} "
                f"can have with model.context={config.model.context}"
            )
        return Size(vocab_size=config.tokenizer.vocab_size, **stated)
    print("reading the corpus", flush=True)
    # A directory of its own: to plan a run must not begin it.
    with tempfile.TemporaryDirectory() as path, contextlib.redirect_stdout(None):
        data = corpus.load(config, Workdir(path))
    return Size(
        passages=len(data.passages),
        tokens=int(data.passages.scored.sum()),
        queries=len(data.prompts),
        vocab_size=data.tokenizer.vocab_size,
        positions=data.passages.lengths - 1,
        query_positions=data.prompts.lengths - 1,
        labelled=len(np.unique(np.concatenate([r for q in data.correct.values() for r in q]))),
    )


def _matrix(site: sites.Site, looked_up: bool | None = None) -> cost.Matrix:
    looked_up = site.group == "embedding" if looked_up is None else looked_up
    return cost.Matrix(site.rows, site.columns, site.stack or 1, looked_up)


def _model(everything: list[sites.Site], arguments: dict) -> cost.Model:
    layers = [_matrix(s) for s in everything if s.stack is not None]
    outside = [_matrix(s) for s in everything if s.stack is None and s.group != "embedding"]
    if arguments.get("tied", True):
        outside += [_matrix(s, False) for s in everything if s.group == "embedding"]
    attention = arguments["layers"] * arguments["heads"] * arguments["head_width"]
    return cost.Model(tuple(layers), tuple(outside), attention, arguments["remat"])


def _taps(chosen: list[sites.Site], side: int, correction: str, tied: bool) -> cost.Taps:
    name, rank = parse_correction(correction)
    matrices = [_matrix(s) for s in chosen]
    if tied:  # a tied embedding is tapped where it is looked up and as the head
        matrices += [_matrix(s, False) for s in chosen if s.group == "embedding"]
    return cost.Taps(tuple(matrices), side, rank or 1, name == "adam")
