"""Keys that a command line sets and a run never reads are told by name."""

import re

import pytest

from tda.run import defaults, idle_keys

PRETRAINED = {"model.pretrained": "a", "train.epochs": 0.0}


def config_of(**changes):
    config = defaults.get_config()
    config.update_from_flattened_dict(changes)
    return config


@pytest.mark.parametrize(
    ("methods", "key", "changes"),
    [
        ("bm25", "hessian.damping", {}),
        ("bm25", "projection.side", {}),
        ("bm25,random", "store.dtype", {}),
        ("grad_cos,exp3", "hessian.damping", {}),
        ("grad_cos,exp4", "gradients.correction", {}),
        ("exp5", "hessian.weight", {}),
        ("trackstar_all", "hessian.evaluation", {}),
        ("trackstar", "hessian.seed", {}),
        ("trackstar", "search.depth", {}),
        ("trackstar", "search.memory_gib", {}),
        ("trackstar", "rerank.passages", {}),
        ("trackstar", "search.scann.leaves", {}),
        ("trackstar", "several.checkpoints", {}),
        ("trackstar", "curvature.sample", {}),
        ("logra", "curvature.damping", {}),
        ("trackstar", "dense.model", {}),
        ("trackstar_margin", "gradients.output", {}),
        ("grad_cos", "projection.blocks", {"projection.pooling": "matrix"}),
        ("grad_cos", "data.name", {"data.sentences": "a", "data.facts": "b"}),
        ("grad_cos", "data.statements_of", {}),
        ("grad_cos", "train.learning_rate", PRETRAINED),
        ("grad_cos", "model.size", PRETRAINED),
        ("grad_cos", "eval.tail_patch_state", {"eval.tail_patch_queries": 0}),
        ("grad_cos", "judge.threshold", {}),
        ("grad_cos", "judge.batch", {"judge.name": "lexical"}),
        ("grad_cos", "plan.tokens", {}),
        ("grad_cos", "train.final", {"train.schedule": "constant"}),
        ("grad_cos", "train.capture", PRETRAINED),
        ("exp3", "gradients.estimate_batches", {"gradients.second_moments": "optimizer"}),
        ("grad_cos", "eval.frequency_edges", {"data.corpus": "a", "data.queries": "b"}),
    ],
)
def test_a_key_that_no_method_reads_is_told(methods, key, changes):
    (line,) = idle_keys.describe(config_of(methods=methods, **changes), ["seed", key])
    assert re.fullmatch(rf"--config\.{re.escape(key)} has no effect: .+", line)


@pytest.mark.parametrize(
    ("methods", "changes"),
    [
        ("trackstar,dense,ekfac,trak,rerank_cos,hidden_last",
         {"search.index": "scann", "hessian.sample": 9, "data.statements": 1}),
        ("trackstar,dense,ekfac,trak,rerank_cos", {"data.sentences": "a", "data.facts": "b"}),
        ("trackstar,dense,ekfac,trak,rerank_cos", {"data.corpus": "a", "data.queries": "b"}),
    ],
)  # fmt: skip
def test_keys_that_are_read_are_not_told(methods, changes):
    config = config_of(methods=methods, **{"judge.name": "nli"}, **changes)
    idle = {"plan", "counterfactual"}
    if config.search.index == "none":
        idle |= {"search.depth", "search.recall_queries", "search.scann"}
        idle |= {"hessian.seed", "data.name", "data.statements_of"}
    # TFDS's directory is that of a corpus without labels too.
    idle |= {"data.dir"} if config.data.sentences else set()
    idle |= {"eval.frequency_edges"} if config.data.corpus else {
        "data.text_field", "data.id_field", "data.share"
    }  # fmt: skip
    keys = [k for k in defaults.KEYS if not any(f"{k}.".startswith(f"{name}.") for name in idle)]
    assert idle_keys.describe(config, keys) == []


def test_rules_name_keys_that_exist():
    """Guards: a rule about a key that was renamed."""
    for names, _, _ in idle_keys._RULES:
        for name in names:
            assert any(f"{key}.".startswith(f"{name}.") for key in defaults.KEYS), name
