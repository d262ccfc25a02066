"""Attribution through a training: what each passage did to the model's answers."""

import contextlib
import dataclasses
import os
import pathlib
import tempfile
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from flax import nnx

from tda.answers import Answer, RankedPassage, TraceResult
from tda.counterfactual.adjoint import AdamRecursion
from tda.counterfactual.metagradients import Reverse
from tda.counterfactual.training import QueryLosses, Training, plan_batches
from tda.counterfactual.training_scores import (
    FISHER_NUMBERS,
    TITLES,
    ScoreSettings,
    TrainingScores,
)
from tda.data import tokens
from tda.data.batches import BatchLayout, buckets
from tda.data.pretrained_tokenizer import PretrainedTokenizer
from tda.data.rows import Query, parse_queries
from tda.data.tokens import PassageTexts, TokenTable
from tda.encoding import checks, provenance
from tda.encoding.inputs import TextCorpus
from tda.encoding.settings import MomentSettings, TextSettings, TraceSettings
from tda.gradients.projection import Projection
from tda.model import functional
from tda.runtime import compilation_cache, progress, sharding
from tda.runtime.fingerprint import fingerprint, plain
from tda.training.recipe import TrainingRecipe

# Ratio of neighbouring lengths of batches: several programs are compiled for each, so few of them.
_RATIO = 1.6
# Passages that EK-FAC is fitted to, and that the mean Fisher matrix is of, at most.
_SAMPLE, _FISHER = 4096, 256


def trace_training(
    model: nnx.Module,
    passages: str | os.PathLike | Iterable,
    queries: Iterable,
    *,
    tokenizer: Any,
    method: str = "adjoint",
    recipe: TrainingRecipe | None = None,
    k: int = 10,
    context: int = 512,
    text_field: str | None = None,
    id_field: str | None = None,
    joiner: str | None = None,
    directory: str | os.PathLike | None = None,
    quiet: bool = False,
) -> TraceResult:
    """Trains a model on passages, and finds those that made it say something, step by step.

    Where `tda.trace` looks at the trained model alone, this follows each query's loss back through
    the training. A score is the nats by which the loss would rise without the passage, to first
    order: exact for "metagradient" (MAGIC, 2504.16430), approximate for the adjoints; other
    methods' scores have scales of their own. Memory is that of a batch's whole gradients and of
    some copies of the parameters for every query, which suits models of up to some ten million
    parameters on a CPU host; the training takes place once to keep its states, and once more on
    the way back.

    Args:
        model: an NNX model from tokens [B, T] to logits [B, T, V], before the training, in float32
            and in evaluation mode. It is not changed.
        passages, queries: texts, as for `tda.trace`.
        tokenizer: the model's tokenizer, as for `tda.trace`.
        method: "metagradient"; "adjoint", the optimizer's own recursion with the mean Fisher matrix
            for a Hessian, "adjoint_ekfac" with EK-FAC's, "adjoint_none" without; "in_run_adam", the
            first-order effect of each step; "source"; or another name in
            `tda.counterfactual.training_scores.TITLES`, which take whole gradients at the end of
            the training.
        recipe: the training; `tda.TrainingRecipe()` by default.
        k: the number of proponents, and of opponents, of each query.
        context, text_field, id_field, joiner: as for `tda.trace`.
        directory: where tokens and the training's states are kept. Of a killed call that is
            repeated, the training and a pass of metagradients go on where they stopped; another
            method, or other queries, find the training done. If None, in a temporary folder.
        quiet: whether to show no progress.

    Returns:
        The ranked passages of each query.

    Raises:
        ValueError: an argument is wrong; the message names it and says what to do.
        TypeError: the method needs forward mode ("adjoint_batch", "ekfac_cg", "ekfac_astra"), and
            the model is no `tda.model.decoder.Decoder`.
        FloatingPointError: the training, or what is followed back through it, diverged.
    """
    if not isinstance(method, str) or method not in TITLES:
        raise ValueError(f"method={method!r}; give one of {', '.join(TITLES)}")
    checks.check_question(k, -1.0, joiner)
    checks.check_names(directory=directory, text_field=text_field, id_field=id_field)
    if recipe is not None and not isinstance(recipe, TrainingRecipe):
        raise ValueError(f"recipe={recipe!r}; give a tda.TrainingRecipe")
    recipe = recipe or TrainingRecipe()
    compilation_cache.use()
    settings = _settings(model, recipe)
    reading = TextSettings(
        PretrainedTokenizer.wrap(tokenizer),
        context,
        text_field,
        id_field,
        None if directory is None else pathlib.Path(directory),
    )
    checks.check_settings(settings)
    checks.check_reading(settings, reading)
    corpus, parsed = TextCorpus(passages, reading), parse_queries(queries)
    if not parsed:
        raise ValueError("there are no queries; give one or more")
    prompts = tokens.tokenise_queries(parsed, reading.tokenizer, context, joiner)
    with progress.hidden(quiet):
        # `corpus.table` holds the directory itself, so this cannot move into the block below.
        for table, label in ((prompts, "queries"), (corpus.table, "passages")):
            checks.check_token_ids(settings, table, label)
    keeping = contextlib.nullcontext(directory) if directory else tempfile.TemporaryDirectory()
    with corpus.holding(), keeping as place, progress.hidden(quiet):
        folder = pathlib.Path(place)
        pad = reading.tokenizer.pad
        training, layout = _make_training(model, recipe, corpus.table, pad)
        made_from = provenance.describe_gradients(settings, folder)
        made_from |= {"recipe": dataclasses.asdict(recipe), "corpus": corpus.table.fingerprint()}
        made_from |= {"lengths": list(layout.bucket_lengths)}
        states = folder / f"training-{fingerprint(plain(made_from))}"
        losses = QueryLosses(training.model_fn, prompts, _layout(prompts, recipe, pad))
        scores = _make_scores(Reverse(training, losses, states), recipe, layout)
        # Passes of several queries are kept apart; their states are one training's.
        found = scores.compute(method, queries_name=f"queries-{prompts.fingerprint()}")
    if not np.isfinite(found).all():
        raise FloatingPointError(
            f"the training or its derivatives diverge with learning_rate={recipe.learning_rate}; "
            "lower it"
        )
    texts = PassageTexts(corpus.table, reading.tokenizer)
    return TraceResult(
        TITLES[method],
        [
            _answer(query, scores_N, k, corpus.table, texts)
            for query, scores_N in zip(parsed, found, strict=True)
        ],
        corpus.read_labels,
    )


def _settings(model: nnx.Module, recipe: TrainingRecipe) -> TraceSettings:
    """Returns the arguments of a trace of the model by raw gradients, for its checks."""
    return TraceSettings(
        model=model,
        loss="loss",
        corrected=False,
        moments=MomentSettings("factored", None, 1, recipe.seed),
        projection=Projection(side=1, pooling="matrix"),
        scope=dict(include=None, exclude=None, untapped="leave"),
        tokens_per_batch=recipe.tokens_per_batch,
        mesh=None,
    )


def _layout(table: TokenTable, recipe: TrainingRecipe, pad: int) -> BatchLayout:
    longest = int(table.lengths_of(np.array(table.longest)))
    return BatchLayout(buckets(max(1, longest - 1), _RATIO), recipe.tokens_per_batch, pad)


def _make_training(
    model: nnx.Module, recipe: TrainingRecipe, table: TokenTable, pad: int
) -> tuple[Training, BatchLayout]:
    """Returns the training, and the layout of its batches."""
    computing = getattr(getattr(model, "settings", None), "dtype", "float32")
    if computing != "float32":
        raise ValueError(
            f"the model computes in {computing}, which rounds away what single passages do to a "
            "training; load it with dtype='float32'"
        )
    layout = _layout(table, recipe, pad)
    batches = plan_batches(table, layout, recipe.epochs, recipe.seed)
    model_fn, params = functional.split(model)
    params = jax.tree.map(sharding.to_host, params)
    return Training(model_fn, params, recipe.make_optimizer(len(batches)), table, batches), layout


def _make_scores(reverse: Reverse, recipe: TrainingRecipe, layout: BatchLayout) -> TrainingScores:
    recursion = AdamRecursion(
        recipe.learning_rates(reverse.training.steps),
        clip=recipe.clip,
        weight_decay=recipe.weight_decay,
        **recipe.adam_constants,
    )
    parameters = sum(x.size for x in jax.tree.leaves(reverse.training.params))
    fisher = min(_FISHER, max(1, FISHER_NUMBERS // parameters))
    settings = ScoreSettings(layout, _SAMPLE, fisher, seed=recipe.seed)
    return TrainingScores(reverse, recursion, settings)


def _answer(
    query: Query, scores_N: np.ndarray, k: int, table: TokenTable, texts: PassageTexts
) -> Answer:
    """Returns a query's first and last passages; of equal scores, the earlier passage first."""

    def ranked(order_N: np.ndarray) -> tuple[RankedPassage, ...]:
        rows = np.argsort(order_N, kind="stable")[:k]
        return tuple(RankedPassage(table.ids[i], float(scores_N[i]), texts[int(i)]) for i in rows)

    proponents, opponents = ranked(-scores_N), ranked(scores_N)
    return Answer(query.id, query.prompt, query.target, proponents, opponents)
