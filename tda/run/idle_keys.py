"""Finds the keys of a config that a run's methods never read."""

from collections.abc import Callable, Iterable

from ml_collections import ConfigDict

from tda import methods
from tda.methods import Method
from tda.run import first_stage
from tda.run.registry import is_of_package

Methods = list[Method]
Rule = tuple[tuple[str, ...], Callable[[ConfigDict, Methods], bool], str]


def _have(has: Callable[[Method], bool]) -> Callable[[ConfigDict, Methods], bool]:
    return lambda config, chosen: any(map(has, chosen))


_has_second_stage = _have(lambda m: m.retriever == "rerank")


def _is_trained(config: ConfigDict, chosen: Methods) -> bool:
    return not config.model.pretrained or config.train.epochs > 0


# Keys, or sections of keys, whether they are read, and why not. A key may be in several rules.
_RULES: tuple[Rule, ...] = (
    (("data.name", "data.dir"), lambda c, _: not c.data.sentences, "data.sentences names files"),
    (("data.name",), lambda c, _: not c.data.corpus, "data.corpus names documents"),
    (
        ("data.text_field", "data.id_field", "data.share"),
        lambda c, _: bool(c.data.corpus or c.data.also_train_on),
        "no data.corpus or data.also_train_on is named",
    ),
    (("data.statements_of",), lambda c, _: c.data.statements > 0, "data.statements is 0"),
    (
        ("tokenizer.vocab_size", "model.size"),
        lambda c, _: not c.model.pretrained,
        "model.pretrained has its own",
    ),
    (
        tuple(
            f"train.{name}"
            for name in (
                *("optimizer", "learning_rate", "schedule", "warmup", "final", "b1", "b2", "eps"),
                *("eps_root", "weight_decay", "clip", "save_every", "keep", "traced", "capture"),
            )
        ),
        _is_trained,
        "train.epochs is 0",
    ),
    (
        ("train.final",),
        lambda c, _: c.train.schedule != "constant",
        "train.schedule is constant",
    ),
    (
        ("projection", "store", "search"),
        _have(lambda m: m.takes_query_gradients),
        "no method takes projected gradients",
    ),
    (
        ("gradients.include", "gradients.exclude", "gradients.untapped"),
        _have(lambda m: m.compares_gradients),
        "no method takes gradients",
    ),
    (
        ("gradients.correction", "gradients.second_moments", "gradients.estimate_batches"),
        _have(lambda m: m.compares_gradients and m.corrected),
        "no method corrects gradients",
    ),
    (
        ("gradients.estimate_batches",),
        lambda c, _: c.gradients.second_moments != "optimizer",
        "gradients.second_moments is optimizer",
    ),
    (
        ("gradients.output",),
        _have(lambda m: m.compares_gradients and not m.output),
        "every method has an output of its own",
    ),
    (
        ("projection.blocks",),
        lambda c, _: c.projection.pooling == "blocks",
        "projection.pooling is not blocks",
    ),
    (
        ("store.shard_bytes", "store.rank"),
        lambda c, _: c.store.dtype != "none",
        "store.dtype is none",
    ),
    (
        ("search.depth", "search.recall_queries", "search.scann"),
        lambda c, _: c.search.index != "none",
        "search.index is none",
    ),
    (
        ("search.memory_gib",),
        lambda c, chosen: c.search.index != "none" or _has_second_stage(c, chosen),
        "search.index is none",
    ),
    (("hessian",), _have(lambda m: m.hessian != "none"), "no method has R"),
    (
        ("hessian.component", "hessian.weight"),
        _have(lambda m: m.hessian == "mixed"),
        "no method mixes in R of the queries",
    ),
    (
        ("hessian.evaluation",),
        _have(lambda m: m.hessian == "mixed" and not m.evaluation),
        "no method leaves it to the config",
    ),
    (("hessian.seed",), lambda c, _: c.hessian.sample > 0, "hessian.sample is 0"),
    (("several",), _have(lambda m: m.several), "no method uses several checkpoints"),
    (("rerank",), _have(lambda m: m.takes_candidates), "no method is of the second stage"),
    (("rerank.candidates",), lambda c, _: c.rerank.passages > 0, "rerank.passages is 0"),
    (
        ("rerank.candidates",),
        _have(lambda m: m.takes_candidates and not m.candidates),
        "no method leaves it to the config",
    ),
    (
        ("curvature",),
        _have(lambda m: m.curvature != "none" or (m.retriever == "rerank" and m.hessian != "none")),
        "no method uses Kronecker factors",
    ),
    (("curvature.damping",), _have(lambda m: m.curvature == "ekfac"), "no method is EK-FAC"),
    (("dense",), _have(lambda m: m.retriever == "dense"), "no method is dense retrieval"),
    (
        ("eval.tail_patch_learning_rate", "eval.tail_patch_state"),
        lambda c, _: c.eval.tail_patch_queries > 0,
        "eval.tail_patch_queries is 0",
    ),
    (
        ("eval.frequency_edges",),
        lambda c, _: not c.data.corpus,
        "the documents of data.corpus have no labels",
    ),
    (("eval.sampled_queries",), lambda c, _: c.eval.samples > 0, "eval.samples is 0"),
    (
        ("judge.model", "judge.sentences", "judge.threshold"),
        lambda c, _: bool(c.judge.name),
        "judge.name is empty",
    ),
    (
        ("judge.batch", "judge.tokens"),
        lambda c, _: c.judge.name not in ("", "lexical"),
        "no judge has a model",
    ),
    (("counterfactual",), lambda *_: False, "it is for the command counterfactual"),
    (("plan",), lambda *_: False, "it is for the command plan"),
)  # fmt: skip


def describe(config: ConfigDict, keys: Iterable[str]) -> list[str]:
    """Returns a line for each key that was set by hand and that the run never reads.

    They are no errors: a run may be continued by the same command line with other methods.

    Args:
        config: the config of a run.
        keys: the keys that the command line sets, such as "hessian.damping". Those of a config
            file do not count, since the command line may choose other methods.
    """
    named = methods.parse(config.methods)
    chosen = list(first_stage.with_first(config, named).values())
    if not all(map(is_of_package, chosen)):
        return []  # a plugin may read any key
    lines = {}
    for key in keys:
        for names, is_read, reason in _RULES:
            concerns = any(key == name or key.startswith(f"{name}.") for name in names)
            if concerns and not is_read(config, chosen):
                lines[key] = f"--config.{key} has no effect: {reason}"
    return list(lines.values())
