"""Attribution in one call: a model, passages and queries in, ranked passages out."""

import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from tda import encoding, hessian, methods, progress, sharding
from tda import loss as losses
from tda import store as stores
from tda.data import batches as batching
from tda.data import corpora, tokenised, tokens
from tda.data.corpora import Document
from tda.data.tokens import TokenTable
from tda.gradients import estimate, per_example, sites
from tda.gradients import projection as projections
from tda.gradients.encoder import make_encoder
from tda.gradients.projection import Projection
from tda.gradients.second_moments import Scale
from tda.model import functional, pretrained
from tda.retrieval import exact, scorer
from tda.traced import Answer, Found, Traced

__all__ = ["load", "trace"]

# Gradients that are kept in memory where no directory is given.
_MEMORY = 8 << 30


def load(path, *, parse_special: bool = False, **how) -> tuple[nnx.Module, Any]:
    """A pretrained model and its tokenizer, from a Hugging Face directory or a GGUF file.

    Args:
        path: the directory or the file, or the name of a package that holds a GGUF file.
        parse_special: see `tda.data.pretrained_tokenizer.PretrainedTokenizer`.
        **how: mesh, dtype, param_dtype, scan, remat, quiet: see `tda.model.pretrained.load`.

    Raises:
        tda.model.pretrained.PretrainedError: it is not a model that is known here.
        FileNotFoundError: no such path, or a directory without tokenizer.json.
    """
    from tda.data.pretrained_tokenizer import PretrainedTokenizer

    path = pretrained.locate(path)
    model = pretrained.load(path, **how)
    if path.is_dir():
        return model, PretrainedTokenizer.load(path, parse_special)
    from tda.model.pretrained import gguf_tokenizer

    return model, gguf_tokenizer.load(path, parse_special)


def trace(
    model: nnx.Module,
    passages: str | os.PathLike | Iterable,
    queries: Iterable,
    *,
    tokenizer=None,
    loss: str | Callable = "loss",
    method: str = "exp5",
    correction: str = "factored",
    scales: dict[str, Scale] | None = None,
    projection: Projection | None = None,
    k: int = 10,
    context: int = 512,
    tokens_per_batch: int = 4096,
    include: str | None = None,
    exclude: str | None = None,
    untapped: str = "leave",
    texts: Sequence[str] | None = None,
    sample: int = 64,
    damping: float = 1e-3,
    seed: int = 0,
    directory=None,
    mesh: jax.sharding.Mesh | None = None,
    quiet: bool = False,
) -> Traced:
    """Finds the training passages that made a model say something (Chang et al. 2024).

    With a tokenizer, passages and queries are texts. Without one, both are batches: trees of arrays
    with the examples as their first axis, one loss for each example.

    Args:
        model: any NNX model, in evaluation mode where it has one; a Linen model through
            `flax.nnx.bridge.ToNNX` with `untapped="reference"`.
        passages: the corpus. Texts: a path (`tda.data.corpora.documents` says which files), or an
            iterable of texts, of (id, text) or of `Document`. Else an iterable of batches.
        queries: (prompt, target) or (id, prompt, target); else batches.
        tokenizer: a `PretrainedTokenizer` or `Tokenizer`.
        loss: what is differentiated: "loss", "margin" or "logit" of a model from tokens [B, T] to
            logits [B, T, V]; or a function of the model and a batch ({"tokens", "targets",
            "weights"}, each [B, T], where there is a tokenizer) to float32 [B].
        method: a name of `tda.methods.METHODS`. "exp5" whitens by R of the passages; "trackstar"
            also mixes in R of the queries, which takes many queries of one form.
        correction: what √V the gradients are divided by: "factored", "low_rank(R)" or "adam".
        scales: 1/√V by path of parameter, where they are known
            (`tda.gradients.second_moments.read`); else they are estimated.
        projection: by default 16 × 16 dimensions for each weight matrix.
        k: how many proponents and opponents of each query.
        context: positions of a passage; longer documents are cut into several passages.
        tokens_per_batch: positions that are encoded together.
        include, exclude, untapped: which parameters (`tda.gradients.sites.find`).
        texts: of passages that are given as batches, in order, to show.
        sample: batches that second moments are estimated from, drawn at random; of batches from an
            iterator, the first ones.
        damping: of R, in mean eigenvalues of a block.
        seed: of the draw.
        directory: where tokens and gradients are kept; killed and called again with the same
            arguments, it goes on where it stopped. In memory where None.
        mesh: the devices that batches are split over; one device where None.
        quiet: shows no progress.

    Returns:
        The ranked passages of each query.

    Raises:
        ValueError: an argument does not fit; the message names it and says what to do.
        KeyError: `scales` lacks a parameter.
    """
    chosen = methods.parse(method)
    if len(chosen) != 1 or chosen[method].retriever != "gradient":
        named = [n for n, m in methods.METHODS.items() if m.retriever == "gradient"]
        raise ValueError(f"method={method!r} is not one of {', '.join(named)}")
    setting = _Setting(
        model,
        loss,
        chosen[method],
        correction,
        scales,
        projection or Projection(side=16, pooling="matrix"),
        dict(include=include, exclude=exclude, untapped=untapped),
        tokens_per_batch,
        sample,
        seed,
        mesh,
        quiet,
    )
    if tokenizer is None:
        if directory is not None:
            raise ValueError("directory is for texts: give a tokenizer, or no directory")
        made = _of_batches(setting, passages, queries, texts)
    else:
        if texts is not None:
            raise ValueError("texts is for passages given as batches; there is a tokenizer here")
        made = _of_texts(setting, passages, queries, tokenizer, context, directory)
    return _ranked(setting, made, k, damping)


@dataclasses.dataclass(frozen=True)
class _Setting:
    """What `trace` was told, apart from its data."""

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
        return sites.find(self.model, **self.scope)

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
class _Made:
    """Gradients of passages and queries, and what they are of."""

    source: scorer.Source
    gradients_QxE: np.ndarray
    passage: Callable[[int], tuple[str, str]]
    asked: list[tuple[str, str, str]]


def _of_batches(setting: _Setting, passages, queries, texts) -> _Made:
    if isinstance(passages, str | os.PathLike):
        raise ValueError("passages are a path: give the model's tokenizer too")
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
    return _Made(
        _in_memory(gradients_CxE, layout.slices),
        gradients_QxE,
        lambda row: (str(row), "" if texts is None else texts[row]),
        [(str(i), "", "") for i in range(len(gradients_QxE))],
    )


def _sampled(batches, setting: _Setting) -> tuple[list, Iterable]:
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


def _in_memory(gradients_CxE: np.ndarray, slices) -> scorer.InMemory:
    gradients_CxE[~np.isfinite(gradients_CxE).all(axis=1)] = np.inf
    return scorer.InMemory(gradients_CxE, slices)


def _of_texts(setting: _Setting, passages, queries, tokenizer, context, directory) -> _Made:
    known = getattr(setting.model, "vocab_size", None)
    if known is not None and tokenizer.vocab_size > known:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model {known}: they do not "
            "belong together"
        )
    asked = _queries(queries)
    prompts = tokens.queries(asked, tokenizer, context)
    directory = None if directory is None else pathlib.Path(directory)
    table = _table(passages, tokenizer, context, directory, setting.quiet)
    longest = max(int(table.lengths.max()), int(prompts.lengths.max())) - 1
    layout = dict(
        bucket_lengths=batching.buckets(max(1, longest)),
        tokens_per_batch=setting.tokens_per_batch,
        pad=tokenizer.pad,
        mesh=setting.mesh,
    )
    scales = setting.estimated(_batches(setting, table, layout))
    encoder = make_encoder(
        setting.model, setting.projection, scales, setting.loss, **setting.scope, mesh=setting.mesh
    )
    rows = np.arange(len(prompts))
    gradients_QxE = encoding.encode_rows(encoder, prompts, rows, **layout)
    texts = _Texts(table, tokenizer)
    if directory is None:
        source = _encoded(setting, encoder, table, layout)
        return _Made(source, gradients_QxE, lambda row: (table.ids[row], texts[row]), asked)
    made_from = _made_from(setting, scales) | {"tokenizer": tokenizer.fingerprint()}
    store = stores.create(
        directory / "gradients",
        table.ids,
        dict.fromkeys(encoder.layout.blocks, setting.projection.side**2),
        made_from,
        documents=table.documents,
        texts=texts,
        corpus=tokenised.fingerprint(table),
    )
    encoding.fill(store, encoder, table, "encode passages", **layout)

    def passage(row):
        (found,) = store.passages([row])
        return found.id, found.text

    return _Made(store, gradients_QxE, passage, asked)


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
            made_from = {"corpus": corpora.state_of(passages)}
            how = (tokenizer, context, made_from, quiet)
            return _told(tokenised.on_disk(directory / "tokens", found, *how), quiet)
    else:
        found = _documents(passages)
    return _told(tokenised.in_memory(found, tokenizer, context, quiet), quiet)


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


def _batches(setting: _Setting, table: TokenTable, layout: dict) -> Iterable[dict]:
    """Batches of passages that are drawn from the whole corpus, to estimate from."""
    if not setting.method.corrected or setting.scales is not None:
        return
    rng = np.random.default_rng(setting.seed)
    # Enough rows for so many batches, and not more than are needed to draw from.
    mean = max(1.0, float(table.lengths.mean()))
    count = min(len(table), int(setting.sample * setting.tokens_per_batch / mean) + 1)
    rows = rng.choice(len(table), count, replace=False)
    planned = batching.plan(
        table.lengths[rows] - 1,
        layout["bucket_lengths"],
        setting.tokens_per_batch,
        seed=setting.seed,
    )
    for i in range(min(setting.sample, len(planned))):
        own = rows[planned.order[planned.starts[i] : planned.starts[i + 1]]]
        length, size = int(planned.lengths[i]), int(planned.sizes[i])
        yield batching.materialise(table, own, length, size, layout["pad"]).arrays()


def _encoded(setting: _Setting, encoder, table: TokenTable, layout: dict) -> scorer.InMemory:
    needed = 4 * len(table) * encoder.layout.width
    if needed > _MEMORY:
        raise ValueError(
            f"the gradients of {len(table):,} passages take {needed / 2**30:.0f} GiB; give a "
            "directory to keep them in, or a smaller projection.side"
        )
    total = int(table.scored.sum())
    with progress.bar(total, "encode passages", "token", quiet=setting.quiet) as bar:
        gradients_CxE = encoding.encode_rows(
            encoder, table, np.arange(len(table)), on_batch=bar.update, **layout
        )
    return _in_memory(gradients_CxE, encoder.layout.slices)


def _made_from(setting: _Setting, scales: dict[str, Scale] | None) -> dict:
    """What decides the gradients, as JSON values; functions by name alone."""
    _, params = functional.split(setting.model)
    named = functional.flat_parameters(params)
    made = {
        "model": _digest(named),
        "correction": setting.correction if scales is not None else "none",
        "projection": dataclasses.asdict(setting.projection),
        "output": setting.loss if isinstance(setting.loss, str) else setting.loss.__qualname__,
        "parameters": {s.path: list(s.shape) for s in setting.sites()},
        **{name: value for name, value in setting.scope.items()},
    }
    if scales is not None:
        made["scales"] = _digest(
            {f"{p}/{n}": x for p, s in scales.items() for n, x in vars(s).items() if x is not None}
        )
    return json.loads(json.dumps(made))


def _digest(arrays: dict[str, jax.Array]) -> str:
    """A hash of named arrays."""
    found = hashlib.blake2b(digest_size=8)
    for name in sorted(arrays):
        x = np.ascontiguousarray(sharding.to_host(arrays[name]))
        found.update(f"{name} {x.shape} {x.dtype}\0".encode())
        found.update(x.view(np.uint8).reshape(-1).data)
    return found.hexdigest()


def _ranked(setting: _Setting, made: _Made, k: int, damping: float) -> Traced:
    bad = np.flatnonzero(~np.isfinite(made.gradients_QxE).all(axis=1))
    if len(bad):
        raise ValueError(
            f"the gradient of query {made.asked[bad[0]][0]!r} is not finite; look at the model's "
            "output for it"
        )
    method, source = setting.method, made.source
    roots = None
    if method.hessian != "none":
        slices = scorer.slices_of(source.form.widths)
        R = hessian.autocorrelation(hessian.rows_for(source), slices)
        if method.hessian == "mixed":
            R = _mixed(R, made.gradients_QxE, slices)
        roots = hessian.inverse_root(R, damping)
    one = {"it": scorer.Scorer(roots, method.unit_norm)}
    with progress.bar(source.rows, "search", "passage", quiet=setting.quiet) as bar:
        found = exact.search(
            made.gradients_QxE, source, one, k, mesh=setting.mesh, on_rows=bar.update
        )["it"]

    def passages(rows, scores):
        return tuple(
            Found(name, float(score), text)
            for row, score in zip(rows, scores, strict=True)
            for name, text in [made.passage(int(row))]
        )

    return Traced(
        method.title,
        [
            Answer(
                *query,
                passages(found.proponents[q], found.proponent_scores[q]),
                passages(found.opponents[q], found.opponent_scores[q]),
            )
            for q, query in enumerate(made.asked)
        ],
    )


def _mixed(R_train, gradients_QxE, slices):
    """λ R_eval + (1 − λ) R_train by the paper's rule."""
    R_eval = hessian.autocorrelation([gradients_QxE], slices)
    k = hessian.component(gradients_QxE.shape[1])
    spectrum = hessian.spectrum(R_eval)
    if spectrum[k - 1] <= 1e-6 * spectrum[0]:
        raise ValueError(
            f"R of {len(gradients_QxE)} queries has fewer than the {k} directions that the mixing "
            "rule compares; use method='exp5', or more queries"
        )
    weight = hessian.mixing_weight(hessian.spectrum(R_train), spectrum, k)
    return hessian.mix(R_train, R_eval, weight)
