"""The sizes of a config's model, encodings and corpus, from which a plan is estimated."""

import contextlib
import dataclasses
import math
import pathlib
import tempfile
import time

import jax
import numpy as np
from flax import nnx

from tda import methods, store
from tda.data import tokenised
from tda.data.batches import buckets
from tda.gradients import projection as projections
from tda.gradients import sites
from tda.gradients.moments.scales import parse_correction
from tda.gradients.sites import find_sites
from tda.hessian import Shape
from tda.model.decoder import abstract_decoder
from tda.model.settings import DecoderSettings
from tda.plan import cost
from tda.retrieval.hessian_settings import HessianSettings
from tda.run import corpus, first_stage, plain_corpus, train
from tda.run.encode import NO_STORE
from tda.run.run import projection_of
from tda.run.workdir import Workdir


@dataclasses.dataclass(frozen=True)
class Size:
    """The size of a corpus and its queries."""

    passages: int
    tokens: int
    queries: int
    vocab_size: int
    """V of the model."""
    positions: np.ndarray | None = None
    """Of each passage; None if the config states the size."""
    query_positions: np.ndarray | None = None
    labelled: int = 0
    """Passages that are correct for a query: searched once more, for their ranks."""
    seconds: float | None = None
    """Seconds that reading and tokenising took here; None if the config states the size."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """Everything from which a plan is estimated."""

    size: Size
    parameters: int
    """Numbers in the model."""
    sites: list[sites.Site]
    """The parameters whose gradients are taken."""
    model: cost.Model
    blocks: tuple[Shape, ...]
    """The shape of each block of an encoding (`Layout.shapes`)."""
    r_blocks: tuple[Shape, ...]
    """The shape of each block of R."""
    taps: dict[str, cost.Taps]
    """By correction, each of which has a store of its own."""
    methods: dict[str, list[methods.Method]]
    """The methods that search a store, by correction."""
    reranking: tuple[int, int]
    """The number of second-stage methods, and of passages that they score for a query."""
    left_out: list[str]
    """Titles of methods that a plan does not estimate."""
    dtype: str
    """The dtype that the model computes in."""
    store_dtype: str
    store_rank: int
    """Pairs of vectors that a block is stored as, or 0."""
    r_rows: int
    """Passages that R is summed over."""
    rule: bool
    """Whether λ follows the mixing rule, which takes two spectra."""
    shapes: dict[tuple, float]
    """Number of batches of passages of each shape (B, T)."""
    query_shapes: dict[tuple, float]
    shard_rows: int
    """Passages in a shard of the store."""

    widths = property(lambda self: [math.prod(s) for s in self.blocks])
    width = property(lambda self: sum(self.widths))
    largest_factor = property(lambda self: max(n for shape in self.r_blocks for n in shape))
    has_store = property(lambda self: self.store_dtype != NO_STORE)

    @property
    def passes(self) -> list[tuple[str, ...]]:
        """The corrections of each pass over the corpus: with stores, all share one pass."""
        return [tuple(self.taps)] if self.has_store else [(c,) for c in self.taps]

    def stored_bytes(self, rows: int) -> int:
        """Returns the bytes of a number of gradients on disk."""
        if not self.has_store:
            return 0
        return rows * self.form(self.store_dtype).row_bytes

    def form(self, dtype: str) -> store.Form:
        """Returns how gradients are stored in a dtype."""
        return store.Form(dtype, tuple(self.widths), self.store_rank)

    def decompositions(self, correction: str) -> tuple[int, int]:
        """Returns how many R^(−1/2) a store's methods need, and how many decompositions of R."""
        kinds = {m.hessian for m in self.methods[correction]} - {"none"}
        return len(kinds), len(kinds) + 2 * ("mixed" in kinds and self.rule)

    def hessians(self) -> tuple[int, int]:
        """Returns how many R and R^(−1/2) are in memory at most; stores are searched in turn."""
        kinds = [{m.hessian for m in ms} - {"none"} for ms in self.methods.values()]
        return max(((1 + ("mixed" in k), len(k)) for k in kinds if k), default=(0, 0))

    def r_memory(self) -> int:
        """Returns the bytes of R, its roots and eigenvectors in memory."""
        matrices, roots = self.hessians()
        return cost.hessian_bytes(self.r_blocks, matrices, roots) if matrices else 0

    def held(self) -> int:
        """Returns the bytes that stay in memory, over the devices of one copy of the model."""
        tapped = _matrices(self.sites)
        parameters = 4 * self.parameters
        more = {
            c: cost.held_bytes(self.parameters, tapped, t.side * t.rank, t.exact) - parameters
            for c, t in self.taps.items()
        }
        return parameters + max(sum(more[c] for c in corrections) for corrections in self.passes)

    def matrices(self) -> tuple[cost.Matrix, ...]:
        """Returns the matrices whose gradients are taken; a tied embedding is two of them."""
        return next(iter(self.taps.values())).matrices

    def mean_lengths(self) -> tuple[float, float]:
        """Returns the mean positions of a passage and of a query; queries count as passages where
        their lengths are unknown."""
        length = self.size.tokens / self.size.passages
        queries = self.size.query_positions
        return length, length if queries is None else float(np.mean(queries))

    def shard_memory(self) -> int:
        """Returns the bytes of host memory for a store's shards: one is encoded, one written."""
        kinds = max(map(len, self.passes))
        return 2 * kinds * self.stored_bytes(self.shard_rows)

    def figures(self) -> dict:
        """Returns the setting as JSON values."""
        size = self.size
        return {
            "parameters": self.parameters,
            "with_gradients": sum(m.numbers for m in _matrices(self.sites)),
            "dtype": self.dtype,
            "passages": size.passages,
            "tokens": size.tokens,
            "queries": size.queries,
            "stated": size.positions is None,
            "padding": 1 - size.tokens / sum(B * T * n for (B, T), n in self.shapes.items()),
            "blocks": len(self.widths),
            "largest_block": max(self.widths),
            "kronecker_blocks": sum(len(s) == 2 for s in self.r_blocks),
            "width": self.width,
        }


def of(config, multiple: int = 1, workdir: str | None = None) -> Setting:
    """Returns the setting of a run's config.

    Args:
        config: the config.
        multiple: the number of devices that a batch is split over, of which B is a multiple.
        workdir: the run's directory, where a corpus without labels may be tokenised already.

    Raises:
        ValueError: a key is out of range, no method needs gradients, or as for `corpus.load`.
    """
    chosen_methods, left_out = _by_correction(config)
    size = _size(config, workdir)
    arguments = train.model_arguments(config, size.vocab_size)
    # Shapes without values: a model of any size is planned on any machine.
    model = abstract_decoder(DecoderSettings(**arguments))
    g, projection = config.gradients, projection_of(config)
    scope = dict(include=g.include or None, exclude=g.exclude or None, untapped=g.untapped)
    chosen = find_sites(model, **scope)
    layout = projections.layout(chosen, projection)
    has_store = config.store.dtype != NO_STORE
    stored, rank = (config.store.dtype, config.store.rank) if has_store else ("float32", 0)
    form = store.Form(stored, tuple(map(math.prod, layout.shapes)), rank)
    shard_rows = max(1, config.store.shard_bytes // form.row_bytes)
    plan = (buckets(config.model.context), g.tokens_per_batch, multiple, shard_rows)
    if size.positions is None:
        # The config states no lengths: every passage counts as one of the mean length.
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
        model=count_model(find_sites(model, include="."), arguments),
        blocks=layout.shapes,
        r_blocks=HessianSettings(**dict(config.hessian)).shapes_of(layout.shapes, size.passages),
        taps={
            c: count_taps(chosen, projection.side, c, model.settings.tied) for c in chosen_methods
        },
        methods=chosen_methods,
        reranking=_reranking(config, size.passages),
        left_out=left_out,
        dtype=train.computing_dtype(config),
        store_dtype=config.store.dtype,
        store_rank=rank,
        r_rows=min(config.hessian.sample or size.passages, size.passages),
        rule=config.hessian.weight < 0,
        shapes=shapes,
        query_shapes=query_shapes,
        shard_rows=shard_rows,
    )


def _by_correction(config) -> tuple[dict[str, list[methods.Method]], list[str]]:
    """Returns the methods by the correction of their store, and the titles of those left out."""
    out: dict[str, list] = {}
    left_out = []
    chosen = methods.parse(config.methods)
    for method in first_stage.with_first(config, chosen).values():
        if method.retriever != "gradient":
            continue
        if method.beyond_plain.keys() - {"evaluation"}:
            left_out.append(method.title)
            continue
        correction = config.gradients.correction if method.corrected else "none"
        out.setdefault(correction, []).append(method)
    if not out:
        raise ValueError(
            f"none of methods={config.methods} searches the gradients of one checkpoint, and a "
            "plan covers these alone; add one, such as trackstar"
        )
    return out, left_out


def _reranking(config, passages: int) -> tuple[int, int]:
    """Returns the number of second-stage methods, and of a query's candidates.

    Candidates of several first-stage methods count as different passages.
    """
    chosen = methods.parse(config.methods)
    reranking = {name: m for name, m in chosen.items() if m.retriever == "rerank"}
    count, first = len(reranking), first_stage.first_methods(config, reranking)
    each = len(first) * config.rerank.passages if first else passages
    return count, min(passages, each) if count else 0


def _size(config, workdir: str | None) -> Size:
    """Returns the size that the config states, or that of the corpus, tokenised or read here."""
    stated = dict(config.plan)
    if any(stated.values()):
        wrong = [f"plan.{k}={v}" for k, v in stated.items() if v < 1]
        if wrong:
            raise ValueError(f"{', '.join(wrong)}: give all keys of plan, or none")
        if stated["tokens"] > stated["passages"] * config.model.context:
            raise ValueError(
                f"plan.tokens={stated['tokens']} is more than plan.passages={stated['passages']} "
                f"passages of model.context={config.model.context} hold; lower it, or raise those"
            )
        return Size(vocab_size=config.tokenizer.vocab_size, **stated)
    print("reading the corpus", flush=True)
    start = time.perf_counter()
    # In a temporary directory: a plan must not begin the run.
    with tempfile.TemporaryDirectory() as path, contextlib.redirect_stdout(None):
        run_path = pathlib.Path(workdir or path)
        if config.data.corpus and tokenised.is_finished(run_path / plain_corpus.FOLDER):
            data = plain_corpus.open_finished(config, run_path)
        else:
            data = corpus.load(config, Workdir(path))
        # Before the directory is removed, which holds the tokens of a corpus without labels.
        correct = [rows for lists in data.correct.values() for rows in lists]
        return Size(
            passages=len(data.passages),
            tokens=data.passages.count_scored(),
            queries=len(data.prompts),
            vocab_size=data.tokenizer.vocab_size,
            positions=data.passages.lengths - 1,
            query_positions=data.prompts.lengths - 1,
            seconds=time.perf_counter() - start,
            labelled=len(np.unique(np.concatenate([*correct, np.zeros(0, np.int64)]))),
        )


def _matrices(chosen: list[sites.Site], as_head: bool = False) -> list[cost.Matrix]:
    """Returns the matrices of sites; `as_head` multiplies by an embedding instead of looking up."""
    return [
        cost.Matrix(s.rows, s.columns, s.stack or 1, s.group == "embedding" and not as_head)
        for s in chosen
    ]


def _heads(chosen: list[sites.Site]) -> list[cost.Matrix]:
    """Returns the embeddings as output heads, as in a tied model."""
    return _matrices([s for s in chosen if s.group == "embedding"], as_head=True)


def count_model(everything: list[sites.Site], arguments: dict) -> cost.Model:
    """Returns the products of a model, given all its sites and its decoder's settings."""
    layers = _matrices([s for s in everything if s.stack is not None])
    outside = _matrices([s for s in everything if s.stack is None and s.group != "embedding"])
    if arguments.get("tied", True):
        outside += _heads(everything)
    attention = arguments["layers"] * arguments["heads"] * arguments["head_width"]
    return cost.Model(tuple(layers), tuple(outside), attention, arguments["remat"])


def count_taps(chosen: list[sites.Site], side: int, correction: str, tied: bool) -> cost.Taps:
    """Returns the taps of some sites; `tied` says whether the embedding is also the output head."""
    name, rank = parse_correction(correction)
    matrices = _matrices(chosen)
    if tied:  # a tied embedding has two taps: where it is looked up, and as the head
        matrices += _heads(chosen)
    return cost.Taps(tuple(matrices), side, rank or 1, name == "adam")
