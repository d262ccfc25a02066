"""Attribution in one call: from a model, passages and queries to ranked passages."""

import os
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
from flax import nnx

from tda.answers import TraceResult
from tda.data.pretrained_tokenizer import PretrainedTokenizer
from tda.encoding import batch_inputs, checks, idle_arguments, inputs
from tda.encoding.settings import MomentSettings, TextSettings, TraceSettings
from tda.gradients.moments.scales import Scale, check_full
from tda.gradients.moments.second_moments import SecondMoments
from tda.gradients.projection import Projection
from tda.index import Index, parse_names
from tda.methods import METHODS
from tda.model import pretrained
from tda.runtime import compilation_cache

__all__ = ["encode", "load", "trace"]


def load(
    path: str | os.PathLike, *, parse_special: bool = False, **options: Any
) -> tuple[nnx.Module, PretrainedTokenizer]:
    """Loads a pretrained model and its tokenizer from a Hugging Face directory or a GGUF file.

    Args:
        path: the directory or the file, or the name of a package that holds a GGUF file.
        parse_special: see `tda.data.pretrained_tokenizer.PretrainedTokenizer`.
        **options: mesh, dtype, param_dtype, scan, remat, attention, quiet: see
            `tda.model.pretrained.load`.

    Raises:
        tda.model.pretrained.PretrainedError: the model is of an unknown kind.
        FileNotFoundError: no such path, or a directory without tokenizer.json.
    """
    # The tokenizer first: a large model takes minutes to load.
    tokenizer = pretrained.load_tokenizer(path, parse_special)
    return pretrained.load(path, **options), tokenizer


def trace(
    model: nnx.Module,
    passages: str | os.PathLike | Iterable,
    queries: Iterable,
    *,
    tokenizer: Any = None,
    loss: str | Callable = "loss",
    method: str = "trackstar_train",
    correction: str | None = None,
    scales: dict[str, Scale] | SecondMoments | None = None,
    projection: Projection | None = None,
    k: int = 10,
    rerank: int = 0,
    contrast: Iterable | None = None,
    candidates: str | None = None,
    context: int | None = None,
    tokens_per_batch: int | None = None,
    include: str | None = None,
    exclude: str | None = None,
    untapped: str = "leave",
    texts: Sequence[str] | None = None,
    text_field: str | None = None,
    id_field: str | None = None,
    joiner: str | None = None,
    sample: int | None = None,
    damping: float = -1.0,
    structure: str = "auto",
    seed: int | None = None,
    directory: str | os.PathLike | None = None,
    mesh: jax.sharding.Mesh | None = None,
    quiet: bool = False,
) -> TraceResult:
    """Finds the training passages that made a model say something (Chang et al. 2024).

    With a tokenizer, passages and queries are texts. Without one, both are batches: trees of arrays
    whose first axis is the examples, each of which has a loss.

    Unless jax already has a folder for compiled programs (`jax_compilation_cache_dir`), it gets one
    in the user's cache folder (`tda.runtime.compilation_cache`).

    Args:
        model: any NNX model, in evaluation mode if it has one; wrap a Linen model in
            `flax.nnx.bridge.ToNNX` and give `untapped="reference"`.
        passages: the corpus. With a tokenizer, a path or a `tda.data.corpora.Corpus` (which says
            which files), or an iterable of texts, of (id, text), of `Document` or of rows with
            named fields (dicts, rows of a `datasets.Dataset`); else an iterable of batches.
        queries: an iterable of (prompt, target), of (id, prompt, target) or of rows with the fields
            "prompt" and "target" (and "id"); else of batches.
        tokenizer: the model's tokenizer: that of `load`, one of transformers, or a path (any form
            that `PretrainedTokenizer.wrap` takes).
        loss: the function that is differentiated: "loss", "margin" or "logit" of a model from
            tokens [B, T] to logits [B, T, V]; or a function of the model and a batch to float32 [B]
            (with a tokenizer, the batch is {"tokens", "targets", "weights"}, each [B, T]).
        method: a name in `tda.methods.METHODS`. "trackstar_train" (the paper's Exp 5)
            whitens by R of the passages; "trackstar" also mixes in R of the queries, which needs
            many queries of one form. "ekfac" are influence functions (Grosse et al. 2023), for
            texts: the inverse Fisher matrix of up to 4,096 passages, with labels drawn from the
            model, before the projection; with `rerank`, without one.
        correction: the form of √V that gradients are divided by: "factored" (the default),
            "low_rank(R)" or "adam".
        scales: the optimizer's second moments (`tda.second_moments`), or 1/√V by path of parameter;
            else V is estimated from the passages.
        projection: the random projection; by default 16 × 16 dimensions for each weight matrix.
        k: the number of proponents, and of opponents, of each query.
        rerank: how many of the method's first passages are scored again without projection, by
            whole gradients with the same correction and norm, and R as a product of each matrix's
            row and column second moments (of "trackstar" with those of the queries, mixed by the
            paper's rule); 0 for none, the number of passages for all. Then there are no opponents.
            Only for texts.
        contrast: further queries, in the form of `queries`. There is then one answer, to the mean
            gradient of `queries` minus that of these (what makes the model say the ones rather than
            the others?), or to the mean of `queries` alone if it is empty. Queries weigh by their
            gradients' norms before R; the norm is that of the difference.
        candidates: "bm25" scores BM25's first `rerank` passages again too.
        context: the most positions of a passage, 512 by default; longer documents are cut into
            several passages.
        tokens_per_batch: the most positions that are encoded together, 4096 by default; fewer for a
            small corpus, which would not fill four batches.
        include, exclude, untapped: the choice of parameters (`tda.gradients.sites.find_sites`).
        texts: the texts, in order, of passages that are given as batches, for display.
        text_field, id_field: the fields of a passage's text and id, in files and rows with named
            fields; by default "text", and the id from "id", "sentence_id", "doc_id", "docid" or
            "_id".
        joiner: the text between prompt and target. By default one space where English puts one:
            none if there is white space already, after an opening bracket or another symbol
            (`2+2=`), after `":`, before a closing mark, and none in Chinese, Japanese or Thai
            (`tda.data.joining.choose_joiner` has the whole rule). `joiner=""`, for code, joins them
            without a space.
        sample: the number of batches that second moments are estimated from, 16 by default, drawn
            at random; from an iterator of batches, the first ones. With few texts and a large model
            at most four small ones, or the estimate would cost more than the trace.
        damping: added to R, in mean eigenvalues of a block, such as 1e-3. By default R is shrunk
            towards a multiple of the identity, as much as the number of passages requires (Ledoit
            and Wolf 2004), so that noise in R does no harm on a small corpus; it prints how much.
            The R of `rerank` has 1e-3 by default.
        structure: that of R of a weight matrix: "dense"; "kronecker", the product of a factor for
            its rows and one for its columns, of 2k² numbers in place of k⁴, for a projection of a
            large side k; or "auto", a product where there are 2 k passages or more, and fewer than
            3 k², from which a dense R would learn noise. A product needs `pooling="matrix"`, as by
            default.
        seed: the seed of the draw, and of EK-FAC's passages and labels; 0 by default.
        directory: where tokens and gradients are stored; a killed call resumes if it is repeated
            with the same arguments. It serves several methods and corrections; methods with the
            same correction share their gradients. In memory if None.
        mesh: the devices that the search and batches of texts are split over, as
            `tda.runtime.sharding.make_mesh` gives it; one device if None. Batches of your own are
            encoded on the devices that they are on.
        quiet: whether to show no progress.

    Returns:
        The ranked passages of each query.

    Raises:
        ValueError: an argument is wrong, or has no effect beside another; the message names it and
            says what to do.
        KeyError: `scales` lacks a parameter.
    """
    if not isinstance(method, str):
        raise ValueError(f"method={method!r}; give the name of one, such as 'trackstar_train'")
    # Nothing is encoded yet: `query` checks the queries first.
    index = _open(
        model,
        passages,
        method,
        tokenizer=tokenizer,
        loss=loss,
        correction=correction,
        scales=scales,
        projection=projection,
        context=context,
        tokens_per_batch=tokens_per_batch,
        include=include,
        exclude=exclude,
        untapped=untapped,
        texts=texts,
        text_field=text_field,
        id_field=id_field,
        sample=sample,
        structure=structure,
        seed=seed,
        directory=directory,
        mesh=mesh,
        quiet=quiet,
    )
    return index.query(queries, method, k, damping, joiner, rerank, contrast, candidates)


def encode(
    model: nnx.Module,
    passages: str | os.PathLike | Iterable,
    *,
    method: str | Sequence[str] = "trackstar_train",
    **options: Any,
) -> Index:
    """Computes the gradients of passages once, for many questions.

    index = tda.encode(model, "corpus.jsonl", tokenizer=tokenizer, directory="gradients")
    print(index.query([("Paris lies in", "France")]))

    Args:
        model, passages: as for `trace`.
        method: the methods whose gradients are computed now. Those of other methods are computed
            when they are first asked.
        **options: tokenizer, loss, correction, scales, projection, context, tokens_per_batch,
            include, exclude, untapped, texts, text_field, id_field, sample, structure, seed,
            directory, mesh and quiet, as for `trace`.

    Raises:
        ValueError, KeyError: as for `trace`.
    """
    index = _open(model, passages, method, **options)
    index.encode()
    return index


def check_options(
    passages: Any, method: str | Sequence[str], *, has_tokenizer: bool = True, **optional: Any
) -> list[str]:
    """Checks arguments of `trace` that need no model; returns the methods' names.

    Args:
        passages, method: as for `trace`.
        has_tokenizer: whether passages and queries are texts.
        **optional: arguments of `trace` that only some calls may give; None: not given.

    Raises:
        ValueError: one is wrong, or has no effect beside another.
    """
    arguments = {name: x for name, x in optional.items() if x is not None}
    checks.check_names(**{n: arguments.get(n) for n in ("directory", "text_field", "id_field")})
    names = parse_names(method)
    idle_arguments.check(names, arguments, passages, has_tokenizer)
    if "scales" not in arguments and any(METHODS[name].corrected for name in names):
        check_full(arguments.get("correction", "factored"))
    return names


def _open(
    model: nnx.Module,
    passages: str | os.PathLike | Iterable,
    method: str | Sequence[str],
    *,
    tokenizer: Any = None,
    loss: str | Callable = "loss",
    correction: str | None = None,
    scales: dict[str, Scale] | SecondMoments | None = None,
    projection: Projection | None = None,
    context: int | None = None,
    tokens_per_batch: int | None = None,
    include: str | None = None,
    exclude: str | None = None,
    untapped: str = "leave",
    texts: Sequence[str] | None = None,
    text_field: str | None = None,
    id_field: str | None = None,
    sample: int | None = None,
    structure: str = "auto",
    seed: int | None = None,
    directory: str | os.PathLike | None = None,
    mesh: jax.sharding.Mesh | None = None,
    quiet: bool = False,
) -> Index:
    """Returns an index that has computed nothing yet; arguments as for `trace`."""
    names = check_options(
        passages,
        method,
        has_tokenizer=tokenizer is not None,
        correction=correction,
        scales=scales,
        sample=sample,
        structure=None if structure == "auto" else structure,
        seed=seed,
        context=context,
        tokens_per_batch=tokens_per_batch,
        texts=texts,
        text_field=text_field,
        id_field=id_field,
        directory=directory,
    )
    compilation_cache.use()
    settings = TraceSettings(
        model=model,
        loss=loss,
        corrected=any(METHODS[name].corrected for name in names),
        moments=MomentSettings(
            "factored" if correction is None else correction,
            scales,
            16 if sample is None else sample,
            0 if seed is None else seed,
        ),
        projection=Projection(side=16, pooling="matrix") if projection is None else projection,
        scope=dict(include=include, exclude=exclude, untapped=untapped),
        tokens_per_batch=4096 if tokens_per_batch is None else tokens_per_batch,
        structure=structure,
        mesh=mesh,
    )
    if tokenizer is None:
        batches = batch_inputs.BatchCorpus(passages, texts)
        return Index(settings, lambda s: batch_inputs.BatchInputs(s, batches), False, names, quiet)
    reading = TextSettings(
        tokenizer=PretrainedTokenizer.wrap(tokenizer),
        context=512 if context is None else context,
        text_field=text_field,
        id_field=id_field,
        directory=None if directory is None else pathlib.Path(directory),
    )
    corpus = inputs.TextCorpus(passages, reading)
    return Index(settings, lambda s: inputs.TextInputs(s, corpus), True, names, quiet)
