"""The gradients of what `tda.trace` is given: texts with a tokenizer, or batches."""

import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Sequence

import jax
import numpy as np
from flax import nnx

from tda import loss as losses
from tda import methods
from tda import store as stores
from tda.data import batches as batching
from tda.data import corpora, tokenised, tokens
from tda.data.batches import BatchLayout
from tda.data.corpora import Document
from tda.data.tokens import TokenTable
from tda.encoding import loss_identity
from tda.encoding import table as encoding
from tda.gradients import per_example, sites
from tda.gradients import projection as projections
from tda.gradients.encoder import make_encoder
from tda.gradients.moments import estimate, kept_scales
from tda.gradients.moments.second_moments import Scale
from tda.gradients.projection import Projection
from tda.gradients.sites import find_sites
from tda.model import functional
from tda.retrieval.sources import InMemory, Source
from tda.runtime import progress, sharding
from tda.store.making import SHARD_BYTES

# Gradients that are kept in memory where no directory is given, in bytes.
_MEMORY = 8 << 30
# Tokens of a shard, about: what a kill loses at most, a few minutes on slow machines.
_SHARD_TOKENS = 1 << 15
# Of fewer tokens than this, padding costs less than compiling for more lengths of batches.
_FEW_TOKENS, _COARSE = 1 << 20, 1.5


@dataclasses.dataclass(frozen=True)
class Setting:
    """What `tda.trace` was told, apart from its data; attributes are its arguments."""

    model: nnx.Module
    loss: str | Callable
    method: methods.Method
    correction: str
    scales: dict[str, Scale] | None
    projection: Projection
    scope: dict
    tokens_per_batch: int
    sample: int
    seed: int
    mesh: jax.sharding.Mesh | None
    quiet: bool

    def sites(self) -> list[sites.Site]:
        """The parameters whose gradients are taken."""
        return find_sites(self.model, **self.scope)

    def tell_coverage(self) -> None:
        """Prints how much of the model is taken, and what is left out."""
        if not self.quiet:
            print(sites.coverage(self.model, self.sites()))

    def per_example(self, model, batch):
        """The loss of each example of a batch, [B]."""
        if callable(self.loss):
            return self.loss(model, batch)
        found = losses.output(self.loss)
        return found(model(batch["tokens"]), batch["targets"], batch["weights"])

    def summed(self, model, batch):
        """The losses of a batch, added up where that spares memory: [B] or [1]."""
        if callable(self.loss):
            return self.loss(model, batch)
        return losses.total(model, batch, losses.output(self.loss))[None]

    def estimated(self, batches: Iterable) -> dict[str, Scale] | None:
        """1/√V as the method wants it: none, those given, or from some batches."""
        if not self.method.corrected:
            return None
        if self.scales is not None:
            return self.scales
        batches = list(batches)
        with progress.bar(len(batches), "second moments", "batch", quiet=self.quiet) as bar:

            def counted():
                for batch in batches:
                    yield batch
                    bar.update()

            return estimate.estimate(
                self.model, self.summed, counted(), self.sites(), self.correction
            )


@dataclasses.dataclass(frozen=True)
class Made:
    """Gradients of passages and queries, and what they are of.

    Attributes:
        source: the passages' gradients.
        gradients_QxE: the queries', float32.
        passage: from a row to the passage's id and text.
        asked: id, prompt and target of each query.
    """

    source: Source
    gradients_QxE: np.ndarray
    passage: Callable[[int], tuple[str, str]]
    asked: list[tuple[str, str, str]]


def of_batches(setting: Setting, passages, queries, texts) -> Made:
    """Gradients of batches of arrays, in memory."""
    if isinstance(passages, str | os.PathLike):
        raise ValueError("passages are a path: give the model's tokenizer too")
    setting.tell_coverage()
    first, passages = _sampled(passages, setting)
    scales = setting.estimated(first)
    scope = setting.scope

    def encode(batches, what):
        found = []
        with progress.bar(None, what, "example", quiet=setting.quiet) as bar:
            for x_BxE in per_example(
                setting.model, setting.per_example, batches, setting.projection, scales, **scope
            ):
                found.append(x_BxE)
                bar.update(len(x_BxE))
        if not found:
            raise ValueError(f"there is nothing to {what}: the iterable of batches is empty")
        return np.concatenate(found)

    gradients_CxE = encode(passages, "encode passages")
    gradients_QxE = encode(queries, "encode queries")
    if texts is not None and len(texts) != len(gradients_CxE):
        raise ValueError(f"there are {len(texts)} texts of {len(gradients_CxE)} passages")
    layout = projections.layout(setting.sites(), setting.projection)
    return Made(
        _in_memory(gradients_CxE, layout.slices),
        gradients_QxE,
        lambda row: (str(row), "" if texts is None else texts[row]),
        [(str(i), "", "") for i in range(len(gradients_QxE))],
    )


def _sampled(batches, setting: Setting) -> tuple[list, Iterable]:
    """Some batches to estimate from, and all of them."""
    if not setting.method.corrected or setting.scales is not None:
        return [], batches
    if isinstance(batches, Sequence):
        rng, count = np.random.default_rng(setting.seed), min(setting.sample, len(batches))
        drawn = np.sort(rng.choice(len(batches), count, replace=False))
        return [batches[i] for i in drawn], batches
    batches = iter(batches)
    first = list(itertools.islice(batches, setting.sample))
    return first, itertools.chain(first, batches)


def _in_memory(gradients_CxE: np.ndarray, slices) -> InMemory:
    gradients_CxE[~np.isfinite(gradients_CxE).all(axis=1)] = np.inf
    return InMemory(gradients_CxE, slices)


def of_texts(setting: Setting, passages, queries, tokenizer, context, directory) -> Made:
    """Gradients of texts, kept in `directory` or in memory."""
    known = getattr(setting.model, "vocab_size", None)
    if known is not None and tokenizer.vocab_size > known:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model {known}: they do not "
            "belong together"
        )
    setting.tell_coverage()
    asked = _queries(queries)
    prompts = tokens.tokenise_queries(asked, tokenizer, context)
    directory = None if directory is None else pathlib.Path(directory)
    table = _table(passages, tokenizer, context, directory, setting.quiet)
    longest = max(int(table.lengths.max()), int(prompts.lengths.max())) - 1
    how = {"ratio": _COARSE} if len(table.tokens) < _FEW_TOKENS else {}
    layout = BatchLayout(
        batching.buckets(max(1, longest), **how),
        setting.tokens_per_batch,
        tokenizer.pad,
        setting.mesh,
    )
    made_from = None if directory is None else _made_from(setting, table, directory)
    scales = _scales(setting, table, layout, directory, made_from)
    encoder = make_encoder(
        setting.model, setting.projection, scales, setting.loss, **setting.scope, mesh=setting.mesh
    )
    # A batch of a few prompts is not padded to as many as a batch of passages has.
    few = dataclasses.replace(
        layout, tokens_per_batch=_tokens_of(prompts, setting.tokens_per_batch)
    )
    gradients_QxE = encoding.encode_rows(encoder, prompts, np.arange(len(prompts)), few)
    texts = _Texts(table, tokenizer)
    if directory is None:
        source = _encoded(setting, encoder, table, layout)
        return Made(source, gradients_QxE, lambda row: (table.ids[row], texts[row]), asked)
    made_from |= _corrected_by(setting, scales) | {"tokenizer": tokenizer.fingerprint()}
    store = stores.create(
        directory / "gradients",
        table.ids,
        dict.fromkeys(encoder.layout.blocks, setting.projection.side**2),
        made_from,
        shard_bytes=_shard_bytes(table, encoder.layout.width),
        documents=table.documents,
        texts=texts,
        corpus=tokenised.fingerprint(table),
    )
    loss_identity.keep(made_from["loss"], directory)
    encoding.fill_store(store, encoder, table, layout, "encode passages", setting.quiet)

    def passage(row):
        (found,) = store.passages([row])
        return found.id, found.text

    return Made(store, gradients_QxE, passage, asked)


def _tokens_of(prompts: TokenTable, most: int) -> int:
    """Positions of a batch that holds all prompts, `most` at most."""
    return min(most, len(prompts) * int(prompts.lengths.max()))


def _shard_bytes(table: TokenTable, width: int) -> int:
    rows = max(1, int(_SHARD_TOKENS / max(1.0, float(table.lengths.mean()))))
    return min(SHARD_BYTES, rows * 4 * width)


def _scales(
    setting: Setting, table: TokenTable, layout: BatchLayout, directory, made_from: dict | None
):
    """1/√V as the method wants it; what was estimated is kept in `directory`, if there is one."""
    batches = _batches(setting, table, layout)
    if directory is None or not setting.method.corrected or setting.scales is not None:
        return setting.estimated(batches)
    made_from = made_from | {
        "correction": setting.correction,
        "sample": setting.sample,
        "seed": setting.seed,
        "tokens_per_batch": setting.tokens_per_batch,
        "corpus": tokenised.fingerprint(table),
    }
    file = directory / "scales.safetensors"
    found = kept_scales.load(file, made_from)
    if found is None:
        found = setting.estimated(batches)
        file.parent.mkdir(parents=True, exist_ok=True)
        kept_scales.save(file, found, made_from)
    return found


def _queries(queries: Iterable) -> list[tuple[str, str, str]]:
    out = []
    for i, query in enumerate(queries):
        if isinstance(query, str) or len(query) not in (2, 3):
            raise ValueError(
                f"query {i} is {query!r}; give (prompt, target) or (id, prompt, target)"
            )
        out.append((str(i), *query) if len(query) == 2 else tuple(query))
    if not out:
        raise ValueError("there are no queries")
    return out


def _documents(passages: Iterable) -> Iterable[Document]:
    for i, passage in enumerate(passages):
        if isinstance(passage, Document):
            yield passage
        elif isinstance(passage, str):
            yield Document(str(i), passage)
        else:
            name, text = passage
            yield Document(str(name), text)


def _table(passages, tokenizer, context, directory, quiet) -> TokenTable:
    if isinstance(passages, str | os.PathLike):
        found = corpora.documents(passages)
        if directory is not None:
            made_from = {"corpus": corpora.describe_files(passages)}
            how = (tokenizer, context, made_from, quiet)
            return _told(tokenised.tokenise_on_disk(directory / "tokens", found, *how), quiet)
    else:
        found = _documents(passages)
    return _told(tokenised.tokenise_in_memory(found, tokenizer, context, quiet), quiet)


def _told(made: tuple[TokenTable, tokenised.Counts], quiet: bool) -> TokenTable:
    table, counts = made
    if not quiet:
        print(
            f"{counts.documents:,} documents ({counts.blank:,} of them blank and left out), "
            f"{len(table):,} passages, {int(table.scored.sum()):,} tokens"
        )
    return table


class _Texts(Sequence):
    """The texts of a table's passages, decoded when they are asked for."""

    def __init__(self, table: TokenTable, tokenizer):
        self._table, self._tokenizer = table, tokenizer

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, row: int) -> str:
        begin, end = self._table.starts[row], self._table.starts[row + 1]
        return self._tokenizer.decode(self._table.tokens[begin:end]).strip()


def _batches(setting: Setting, table: TokenTable, layout: BatchLayout) -> Iterable[dict]:
    """Batches of passages that are drawn from the whole corpus, to estimate from."""
    if not setting.method.corrected or setting.scales is not None:
        return
    rng = np.random.default_rng(setting.seed)
    # Enough rows for so many batches, and not more than are needed to draw from.
    mean = max(1.0, float(table.lengths.mean()))
    count = min(len(table), int(setting.sample * setting.tokens_per_batch / mean) + 1)
    rows = rng.choice(len(table), count, replace=False)
    # The estimate runs on one device, whatever mesh batches of the corpus are split over.
    layout = dataclasses.replace(layout, mesh=None)
    for batch in itertools.islice(layout.batches(table, rows, setting.seed), setting.sample):
        yield batch.arrays()


def _encoded(setting: Setting, encoder, table: TokenTable, layout: BatchLayout) -> InMemory:
    needed = 4 * len(table) * encoder.layout.width
    if needed > _MEMORY:
        raise ValueError(
            f"the gradients of {len(table):,} passages take {needed / 2**30:.0f} GiB; give a "
            "directory to keep them in, or a smaller projection.side"
        )
    total = int(table.scored.sum())
    with progress.bar(total, "encode passages", "token", quiet=setting.quiet) as bar:
        gradients_CxE = encoding.encode_rows(
            encoder, table, np.arange(len(table)), layout, bar.update
        )
    return _in_memory(gradients_CxE, encoder.layout.slices)


def _made_from(setting: Setting, table: TokenTable, directory) -> dict:
    """What decides the gradients, but for their correction, as JSON values."""
    _, params = functional.split(setting.model)
    made = {
        "model": _digest(functional.flat_parameters(params)),
        "projection": dataclasses.asdict(setting.projection),
        "loss": loss_identity.found(setting.per_example, setting.model, directory),
        "parameters": {s.path: list(s.shape) for s in setting.sites()},
        "passages": _ends(table),
        **setting.scope,
    }
    return json.loads(json.dumps(made))


def _corrected_by(setting: Setting, scales: dict[str, Scale] | None) -> dict:
    """The correction of the gradients, as JSON values."""
    if scales is None:
        return {"correction": "none"}
    arrays = {f"{p}/{n}": x for p, s in scales.items() for n, x in vars(s).items() if x is not None}
    return {"correction": setting.correction, "scales": _digest(arrays)}


def _ends(table: TokenTable) -> str:
    """A hash of where passages end: without it, the same tokens may be cut in other places."""
    return hashlib.blake2b(np.asarray(table.starts, np.int64).tobytes(), digest_size=8).hexdigest()


def _digest(arrays: dict[str, jax.Array]) -> str:
    """A hash of named arrays."""
    found = hashlib.blake2b(digest_size=8)
    for name in sorted(arrays):
        x = np.ascontiguousarray(sharding.to_host(arrays[name]))
        found.update(f"{name} {x.shape} {x.dtype}\0".encode())
        found.update(x.view(np.uint8).reshape(-1).data)
    return found.hexdigest()
