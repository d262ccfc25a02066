"""Configs start from the defaults, and every key has a meaning."""

import pathlib
import runpy

import pytest

from tda.run import defaults

CONFIGS = sorted(pathlib.Path(__file__).parents[2].joinpath("configs").glob("[a-z]*.py"))


def test_every_key_has_a_meaning_in_one_line():
    for key, (_, meaning) in defaults.KEYS.items():
        assert meaning and "\n" not in meaning and not meaning.endswith("."), key


@pytest.mark.parametrize("path", CONFIGS, ids=[p.stem for p in CONFIGS])
def test_a_config_has_the_keys_of_the_defaults(path):
    def keys(config, prefix=""):
        for name, value in config.items():
            yield from (
                keys(value, f"{prefix}{name}.") if hasattr(value, "items") else [prefix + name]
            )

    assert set(keys(runpy.run_path(str(path))["get_config"]())) == set(defaults.KEYS)
