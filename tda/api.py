"""Attribution in one call: a model, passages and queries in, ranked passages out."""

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from tda import methods
from tda.answers import Answer, Found, Traced
from tda.data.pretrained_tokenizer import PretrainedTokenizer
from tda.encoding import inputs
from tda.gradients.moments.second_moments import Scale
from tda.gradients.projection import Projection
from tda.model import pretrained
from tda.retrieval import exact
from tda.retrieval.whitening import HessianSettings, Whitening
from tda.runtime import progress

__all__ = ["load", "trace"]

# With fewer queries than this, the mixture removes each query's own direction.
_FEWEST_QUERIES = 16


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
    return pretrained.load(path, **how), pretrained.load_tokenizer(path, parse_special)


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
    sample: int = 16,
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
        tokenizer: the model's tokenizer: that of `load`, one of transformers, or a path (any form
            that `PretrainedTokenizer.wrap` takes).
        loss: what is differentiated: "loss", "margin" or "logit" of a model from tokens [B, T] to
            logits [B, T, V]; or a function of the model and a batch ({"tokens", "targets",
            "weights"}, each [B, T], where there is a tokenizer) to float32 [B].
        method: a name of `tda.methods.METHODS`. "exp5" whitens by R of the passages; "trackstar"
            also mixes in R of the queries, which takes many queries of one form.
        correction: what √V the gradients are divided by: "factored", "low_rank(R)" or "adam".
        scales: 1/√V by path of parameter, where they are known
            (`tda.gradients.moments.second_moments.read`); else they are estimated.
        projection: by default 16 × 16 dimensions for each weight matrix.
        k: how many proponents and opponents of each query.
        context: positions of a passage; longer documents are cut into several passages.
        tokens_per_batch: positions that are encoded together.
        include, exclude, untapped: which parameters (`tda.gradients.sites.find_sites`).
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
    if len(chosen) != 1 or not chosen[method].is_plain:
        named = [n for n, m in methods.METHODS.items() if m.is_plain]
        raise ValueError(f"method={method!r} is not one of {', '.join(named)}")
    setting = inputs.Setting(
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
        made = inputs.of_batches(setting, passages, queries, texts)
    else:
        if texts is not None:
            raise ValueError("texts is for passages given as batches; there is a tokenizer here")
        tokenizer = PretrainedTokenizer.wrap(tokenizer)
        made = inputs.of_texts(setting, passages, queries, tokenizer, context, directory)
    return _ranked(setting, made, k, damping)


def _ranked(setting: inputs.Setting, made: inputs.Made, k: int, damping: float) -> Traced:
    bad = np.flatnonzero(~np.isfinite(made.gradients_QxE).all(axis=1))
    if len(bad):
        raise ValueError(
            f"the gradient of query {made.asked[bad[0]][0]!r} is not finite; look at the model's "
            "output for it"
        )
    method, source = setting.method, made.source
    if method.hessian == "mixed" and len(made.gradients_QxE) < _FEWEST_QUERIES:
        raise ValueError(
            f"R of {len(made.gradients_QxE)} queries is hardly more than these, and mixing it in "
            "would take out what is asked for; use method='exp5' below "
            f"{_FEWEST_QUERIES} queries"
        )
    settings = HessianSettings(damping=damping)
    whitening = Whitening(settings, source, made.gradients_QxE, setting.mesh, quiet=setting.quiet)
    (part,) = whitening.parts({"": method})
    with progress.bar(source.rows, "search", "passage", quiet=setting.quiet) as bar:
        ranked = exact.search(
            made.gradients_QxE, source, part.scorers, k, mesh=setting.mesh, on_rows=bar.update
        )[""]

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
                passages(ranked.proponents[q], ranked.proponent_scores[q]),
                passages(ranked.opponents[q], ranked.opponent_scores[q]),
            )
            for q, query in enumerate(made.asked)
        ],
    )
