"""Configs start from the defaults, and every key has a meaning."""

import pathlib
import runpy

import pytest

from tda import store as stores
from tda.gradients import projection
from tda.retrieval import hessian_settings
from tda.run import defaults
from tda.run.run import NO_STORE
from tda.training import optimizer

CONFIGS = sorted(pathlib.Path(__file__).parents[2].joinpath("configs").glob("[a-z]*.py"))


def test_every_key_has_a_meaning_in_one_line():
    for key, (_, meaning, *_) in defaults.KEYS.items():
        assert meaning and "\n" not in meaning and not meaning.endswith("."), key


@pytest.mark.parametrize("path", CONFIGS, ids=[p.stem for p in CONFIGS])
def test_a_config_has_the_keys_of_the_defaults(path):
    def keys(config, prefix=""):
        for name, value in config.items():
            yield from (
                keys(value, f"{prefix}{name}.") if hasattr(value, "items") else [prefix + name]
            )

    assert set(keys(runpy.run_path(str(path))["get_config"]())) == set(defaults.KEYS)


def test_the_defaults_and_the_packaged_configs_have_possible_values():
    for path in CONFIGS:
        defaults.check_values(runpy.run_path(str(path))["get_config"]())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train.optimizer": "sgd"}, "unknown train.optimizer='sgd'; use adam, adamw or adafactor"),
        ({"data.prompt": 3}, "unknown data.prompt=3; use 0, 1 or 2"),
        ({"projection.side": 0}, "projection.side=0 must be 1 or more"),
        ({"train.learning_rate": 0.0}, "train.learning_rate=0.0 must be above 0"),
        ({"data.n_queries": -1}, "data.n_queries=-1 must not be negative"),
        ({"train.traced": 1.5}, "train.traced=1.5 must be above 0, and 1 at most"),
        ({"hessian.weight": 1.5}, "hessian.weight=1.5 must be 1 at most, or -1"),
        ({"hessian.damping": float("nan")}, "hessian.damping=nan must be a finite number"),
        ({"train.epochs": float("inf")}, "train.epochs=inf must be a finite number"),
        ({"hessian.damping": -0.1}, "hessian.damping=-0.1 must not be negative, unless it is -1"),
    ],
)
def test_impossible_values_are_refused_by_key(changes, message):
    config = defaults.get_config()
    config.update_from_flattened_dict(changes)
    with pytest.raises(ValueError) as refused:
        defaults.check_values(config)
    assert str(refused.value) == message


@pytest.mark.parametrize("key", ["gradients.include", "gradients.exclude"])
def test_a_pattern_of_parameters_is_checked(key):
    """Guards: a traceback of `re` after the training."""
    config = defaults.get_config()
    config.update_from_flattened_dict({key: "mlp["})
    with pytest.raises(ValueError, match=rf"^{key}='mlp\[' is not a regular expression \("):
        defaults.check_values(config)


def test_choices_are_those_of_the_code():
    """Guards: a choice that the code has and a config may not name, or the other way round."""
    assert set(defaults.CHOICES["store.dtype"]) == {*stores.DTYPES, NO_STORE}
    assert defaults.CHOICES["train.optimizer"] == optimizer.OPTIMIZERS
    assert defaults.CHOICES["projection.family"] == projection.FAMILIES
    assert defaults.CHOICES["projection.pooling"] == projection.POOLINGS
    assert defaults.CHOICES["hessian.evaluation"] == hessian_settings.EVALUATIONS
    unset = {k for k, v in defaults.get_config().train.items() if v is None}
    assert unset == set(optimizer.CONSTANTS)
