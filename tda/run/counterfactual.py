"""The stage that retrains: a training on the corpus, continued from the run's model, and its bank.

The run's own training is the pretraining; the bank's training continues from it on the corpus, with
a fresh optimizer, and its final model is compared with its retrainings.
"""

import dataclasses
import functools

import jax
import numpy as np
from ml_collections import ConfigDict

from tda.counterfactual.bank import Bank, Retraining, draw_subsets
from tda.counterfactual.metagradients import Forward, Reverse
from tda.counterfactual.training import (
    QueryLosses,
    Training,
    plan_batches,
    sum_by_unit,
    tokens_as_units,
    units_of_tokens,
)
from tda.data import corpora
from tda.data.batches import BatchLayout, buckets, draw
from tda.data.rows import Query
from tda.data.tokens import tokenise_queries
from tda.facts.records import Fact
from tda.model import functional
from tda.reports import formats
from tda.run import checkpoints, train
from tda.run.defaults import flat
from tda.run.run import Corpus, Run, Trained
from tda.run.workdir import Workdir
from tda.runtime import processes, sharding
from tda.runtime.array_tasks import Unfinished
from tda.runtime.atomic_file import write_arrays, write_json
from tda.runtime.fingerprint import fingerprint, plain
from tda.runtime.groups import Groups
from tda.training import checkpoint

# Units that every corpus has; any other is a field of the lines of data.sentences.
_UNITS = ("passage", "document", "relation", "subject", "token")
# Ratio of neighbouring lengths of batches: seven programs are compiled for each, so few of them.
_RATIO = 1.6
# Largest allowed difference of reverse and forward mode, relative to the largest slope of a query.
_AGREEMENT = 1e-3


class DisagreementError(FloatingPointError):
    """Reverse and forward mode give a query different derivatives."""


def check(config: ConfigDict) -> None:
    """Checks the keys of the bank.

    Raises:
        ValueError: a value is impossible; the message names the key.
    """
    fractions(config)
    if config.data.corpus:
        raise ValueError(
            f"data.corpus={config.data.corpus}: the bank keeps its corpus in memory; give the "
            "passages as data.sentences, which need no annotations"
        )
    unit = config.counterfactual.unit
    if unit not in _UNITS and not config.data.sentences:
        raise ValueError(
            f"unknown counterfactual.unit={unit!r}; use {', '.join(_UNITS)}, or a field of the "
            "lines of data.sentences, which names no file here"
        )
    if train.computing_dtype(config) != "float32":
        raise ValueError(
            f"model.dtype={config.model.dtype} would compute in bfloat16: retrainings that differ "
            "in a few passages need model.dtype=float32"
        )
    if config.counterfactual.held_out and config.data.train_on != "rest":
        raise ValueError(
            f"counterfactual.held_out={config.counterfactual.held_out} takes sentences outside the "
            f"bank's corpus as queries, and data.train_on={config.data.train_on} has none; use "
            "data.train_on=rest"
        )
    if config.train.optimizer not in ("adam", "adamw"):
        raise ValueError(
            f"train.optimizer={config.train.optimizer}: the bank is trained by adam or adamw"
        )


def fractions(config: ConfigDict) -> list[float]:
    """Returns the shares of units to drop.

    Raises:
        ValueError: one is not a number above 0 and below 1.
    """
    text = config.counterfactual.fractions
    try:
        shares = [float(x) for x in text.split(",")]
    except ValueError:
        shares = []
    if not shares or not all(0 < x < 1 for x in shares):
        raise ValueError(
            f"counterfactual.fractions={text}: give shares above 0 and below 1, such as 0.05,0.5"
        )
    return shares


def config_of_bank(config: ConfigDict) -> ConfigDict:
    """Returns the config of the bank's training: the keys of `counterfactual` replace `train`'s."""
    c = ConfigDict(config.to_dict())
    settings = config.counterfactual
    for name in ("epochs", "tokens_per_batch", "learning_rate", "warmup", "eps_root"):
        c.train[name] = settings[name]
    return c


def layout_of(config: ConfigDict, corpus: Corpus) -> BatchLayout:
    """Returns the batch layout of passages and queries, in the training and the bank's methods."""
    lengths = buckets(config.model.context, _RATIO)
    return BatchLayout(lengths, config.counterfactual.tokens_per_batch, corpus.tokenizer.pad)


@dataclasses.dataclass(frozen=True)
class Retrained:
    """The bank's training, in each order of the data, and its banks by fraction."""

    run: Run
    """A run whose trained model is that of the bank's training in its first order."""
    trainings: list[Training]
    """One for each order of the data."""
    queries: QueryLosses
    unit_C: np.ndarray
    """The unit of each token; −1 for none."""
    units: list
    """Their names."""
    banks: dict[float, list[Bank]]
    """By fraction, a bank for each order."""
    directory: Workdir

    @functools.cached_property
    def reverse(self) -> Reverse:
        """Reverse mode through the training in its first order."""
        at_once = self.run.config.counterfactual.queries_at_once
        return Reverse(self.trainings[0], self.queries, self.directory / "states", at_once)

    def retraining(self, order: int = 0) -> Retraining:
        """Returns the object that runs and keeps retrainings in an order of the data."""
        settings = self.run.config.counterfactual
        return Retraining(
            self.trainings[order],
            self.queries,
            self.unit_C,
            _identity(self.run, order),
            Groups(self.directory / "retrainings", engine=self.run.engine),
            settings.together,
        )

    def by_unit(self, scores: np.ndarray) -> np.ndarray:
        """Returns sums of scores over units, float64 [Q, U].

        Args:
            scores: of the table's tokens, [Q, C]; or of its passages, [Q, N]. Where a unit is a
                token, a passage's score is shared evenly by its scored tokens.
        """
        table, units = self.trainings[0].table, len(self.units)
        if scores.shape[1] == len(table.tokens):
            return sum_by_unit(scores, self.unit_C, units)
        if self.run.config.counterfactual.unit == "token":
            shares_QxN = scores / np.maximum(table.scored_lengths, 1)
            return sum_by_unit(np.repeat(shares_QxN, table.lengths, axis=1), self.unit_C, units)
        return sum_by_unit(scores, self.unit_C[table.starts[:-1]], units)


def retrain(run: Run) -> Retrained:
    """Trains on the run's corpus, and again without each set of units; finished work is reused.

    The run's engine decides who computes which retrainings.

    Args:
        run: the run, whose trained model the training starts from.

    Raises:
        Unfinished: other tasks of an array have not retrained yet; or several processes have
            finished the retrainings, and a single one has to score the methods.
    """
    check(run.config)
    config, corpus = config_of_bank(run.config), run.corpus
    settings = config.counterfactual
    if settings.held_out:
        corpus = ask_held_out(corpus, settings.held_out, settings.seed)
    directory = Workdir(run.workdir / "counterfactual")
    layout = layout_of(config, corpus)
    model_fn, params = functional.split(run.trained.model)
    params = jax.tree.map(sharding.to_host, params)
    trainings = []
    for order in range(settings.orders):
        batches = plan_batches(corpus.passages, layout, settings.epochs, settings.seed + order)
        if settings.warmup > len(batches):
            raise ValueError(
                f"counterfactual.warmup={settings.warmup} is longer than the training of "
                f"{len(batches)} steps; give a shorter warm-up or more counterfactual.epochs"
            )
        tx = train.make_optimizer(config, len(batches))
        trainings.append(Training(model_fn, params, tx, corpus.passages, batches))
    queries = QueryLosses(model_fn, corpus.prompts, layout)
    if settings.unit == "token":
        unit_C, units = tokens_as_units(corpus.passages)
    else:
        unit_C, units = units_of_tokens(corpus.passages, _unit_names(run, settings.unit))
    if len(units) < 2:
        raise ValueError(
            f"counterfactual.unit={settings.unit}: the corpus has {len(units)} of them, and a bank "
            "needs two or more; give another unit"
        )
    bank_run = Run(config, directory, corpus, run.trained, engine=run.engine)
    retrained = Retrained(bank_run, trainings, queries, unit_C, units, {}, directory)
    made_from = {**_identity(bank_run, 0), "start": plain(run.trained.fingerprint)}
    directory.claim("bank", made_from, config)
    for fraction in fractions(config):
        removed = draw_subsets(len(units), fraction, settings.subsets, settings.seed)
        drawn = {"fraction": fraction, "seed": settings.seed, "units": len(units)}
        retrained.banks[fraction] = [
            retrained.retraining(order).bank(
                removed, f"retrain without {formats.share(fraction)}", drawn
            )
            for order in range(settings.orders)
        ]
    processes.on_first_process("describe the bank", lambda: write_bank(retrained, made_from))
    directory.finish("bank")
    if jax.process_count() > 1:
        raise Unfinished(
            "the retrainings are finished; one process scores the methods",
            "Without the flags that join processes:",
            status=0,
        )
    return dataclasses.replace(retrained, run=_finished_run(retrained))


def ask_held_out(corpus: Corpus, count: int, seed: int) -> Corpus:
    """Returns the corpus with left-out sentences as its queries, which have no labels.

    Args:
        corpus: a corpus whose model is trained on the rest of the text.
        count: the number of sentences, drawn from that rest.
        seed: the seed of the draw.

    Raises:
        ValueError: the rest has fewer sentences.
    """
    if count > len(corpus.training):
        raise ValueError(
            f"counterfactual.held_out={count}: only {len(corpus.training)} passages are outside "
            "the bank's corpus; ask fewer, or give a smaller data.n_sentences"
        )
    rows, table = draw(len(corpus.training), count, seed), corpus.training
    sequences = {table.ids[i]: table.sequence(i)[0].tolist() for i in rows}
    # The loss counts every token but the first, as in training.
    asked = [Query(i, "", "", (tokens[:1], tokens[1:])) for i, tokens in sequences.items()]
    prompts = tokenise_queries(asked, corpus.tokenizer, max(corpus.buckets))
    texts = (corpus.text_of(i, table) for i in rows)
    facts = [
        Fact(i, "", "", text, "", "", "", (), (), (), prompt0="")
        for i, text in zip(sequences, texts, strict=True)
    ]
    fingerprint = corpus.fingerprint | {"queries": prompts.fingerprint(), "labels": ""}
    return dataclasses.replace(
        corpus, queries=facts, prompts=prompts, correct={}, fingerprint=fingerprint
    )


def _unit_names(run: Run, unit: str) -> list:
    """Returns the name of each passage's unit; None for a passage without a unit."""
    table, corpus = run.corpus.passages, run.corpus
    if unit == "passage":
        return list(range(len(table)))
    if unit == "document":
        return list(table.documents)
    if unit not in _UNITS:
        labels = corpora.Corpus(run.config.data.sentences, id_field="sentence_id").labels(unit)
        return [labels[d] for d in table.documents]
    key = {"relation": "predicate_uri", "subject": "entity0_uri"}[unit]
    # A triple that only names its fact has no URIs: an empty one is no unit.
    of_sentence = {
        s.sentence_id: (s.fact_triples and getattr(s.fact_triples[0], key)) or None
        for s in corpus.sentences
    }
    return [of_sentence[d] for d in table.documents]


def _identity(run: Run, order: int) -> dict:
    """Returns what decides the training in an order of the data, as JSON values."""
    c = run.config
    keys = ("epochs", "tokens_per_batch", "unit", "seed")
    unit = c.counterfactual.unit
    # The fingerprint of the passages does not cover other fields of their lines.
    fields = {} if unit in _UNITS else {"units": fingerprint(_unit_names(run, unit))}
    return plain(
        {
            **fields,
            "start": run.trained.fingerprint,
            "step": run.trained.step,
            "optimizer": {k: v for k, v in train.settings(c).items() if k != "epochs"},
            "denominator": "the batch's scored tokens, whatever their weights",
            "order": c.counterfactual.seed + order,
            "buckets": list(buckets(c.model.context, _RATIO)),
            "passages": run.corpus.fingerprint["corpus"],
            "queries": run.corpus.fingerprint["queries"],
            **{k: c.counterfactual[k] for k in keys},
        }
    )


def write_bank(retrained: Retrained, made_from: dict) -> None:
    """Writes the bank's manifest and its losses: `bank.json` and `bank.npz`.

    Args:
        retrained: the bank.
        made_from: JSON values that identify the training.
    """
    settings, directory = retrained.run.config.counterfactual, retrained.directory
    manifest = {"made_from": made_from, "settings": flat(settings), "units": len(retrained.units)}
    # The columns of `removed` and of `losses`, so that other scores can be compared with them.
    corpus, by_passage = retrained.run.corpus, settings.unit == "passage"
    manifest["unit names"] = list(corpus.passages.ids) if by_passage else retrained.units
    manifest["query names"] = [f.fact_id for f in corpus.queries]
    manifest |= {"steps": retrained.trainings[0].steps, "masks": "numpy default_rng([seed, i])"}
    write_json(directory / "bank.json", plain(manifest))
    arrays = {}
    for fraction, banks in retrained.banks.items():
        for order, bank in enumerate(banks):
            name = f"{fraction}/{order}"
            arrays |= {f"{name}/removed": bank.removed_MxU, f"{name}/base": bank.base_Q}
            arrays[f"{name}/losses"] = bank.losses_MxQ
    write_arrays(directory / "bank.npz", arrays)


def _finished_run(retrained: Retrained) -> Run:
    """Returns the run of the final model, after saving its checkpoint and earlier ones."""
    run, reverse, config = retrained.run, retrained.reverse, retrained.run.config
    steps = retrained.trainings[0].steps
    root = str(retrained.directory / "checkpoints")
    arguments = train.model_arguments(config, run.corpus.tokenizer.vocab_size)
    description = {
        "optimizer": {"name": config.train.optimizer, **train.adam_constants(config)},
        "tokenizer": run.corpus.tokenizer.fingerprint(),
        "model": arguments,
    }
    saved = range(reverse.stride, steps, reverse.stride)
    chosen = [*checkpoints.steps_before_last(saved, config.several.checkpoints), steps]
    with run.engine.alone():
        reverse.keep_states()
        for step in sorted({*chosen} - {*checkpoint.steps(root)}):
            checkpoint.save(root, step, reverse.state_at(step), description, keep=0)
    mesh = train.working_mesh(config)
    identity = {**_identity(run, 0), "steps": steps}
    trained = Trained(
        train.restore_model(arguments, root, steps, mesh),
        root,
        steps,
        train.make_optimizer(config, steps),
        mesh,
        plain(identity),
        (layout_of(config, run.corpus), config.counterfactual.seed),
        # Other configs of this bank may have saved others.
        tuple(chosen),
    )
    corpus = dataclasses.replace(run.corpus, training=run.corpus.passages)
    return dataclasses.replace(run, corpus=corpus, trained=trained)


def check_modes_agree(retrained: Retrained, by_token_QxC: np.ndarray) -> float:
    """Checks reverse mode by forward mode along a random direction, for every query.

    Args:
        retrained: the bank's training.
        by_token_QxC: reverse mode's scores.

    Returns:
        The largest difference over the largest slope.

    Raises:
        DisagreementError: it is above 1e-3.
    """
    settings = retrained.run.config.counterfactual
    rng = np.random.default_rng([settings.seed, 7])
    direction_C = rng.normal(size=by_token_QxC.shape[1]).astype(np.float32)
    slopes_Q = Forward(retrained.trainings[0], retrained.queries).along(direction_C)
    difference_Q = np.abs(-by_token_QxC.astype(np.float64) @ direction_C - slopes_Q)
    relative_Q = difference_Q / np.abs(slopes_Q).max()
    worst = int(relative_Q.argmax())
    if not relative_Q[worst] < _AGREEMENT:
        raise DisagreementError(
            f"query {worst}: reverse and forward mode differ by {relative_Q[worst]:.1e} of the "
            f"largest slope, more than {_AGREEMENT}; use counterfactual.queries_at_once=1, another "
            "version of jax, or a lower counterfactual.learning_rate"
        )
    return float(relative_Q[worst])
