"""Sweep files: the points of a grid, each a config with some keys changed.

A sweep file has `get_sweep()`, which returns a dict:

    "axes": {key: values}, the grid's axes. A key such as "model.size, train.learning_rate" stands
        for several keys that change together; its values are tuples. Figures are reported as mean
        and spread over the values of the key "seed".
    "fixed": {key: value}, set at every point.
    "plots": a list of {"name", "x", "y", "lines", "log_x", "where", "omit", "mark"}: see
        `tda.sweep.report`.
"""

import collections
import dataclasses
import difflib
import itertools
import re
import runpy
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from tda import methods
from tda.run import capturing, defaults, first_stage, train
from tda.run.run import projection_of
from tda.runtime.fingerprint import fingerprint, plain, python_value

# Sections that do not affect a training. Points that differ in any other section do not share one.
_AFTER_TRAINING = frozenset(
    (
        "methods gradients projection curvature several dense store search hessian rerank eval "
        "judge plan metrics"
    ).split()
)
# Keys of `counterfactual` that do not affect its retrainings.
_AFTER_RETRAINING = ("methods", "own_top", "fisher", "queries_at_once", "resamples", "together")
# Sections that do not affect the stores. (`rerank` does: candidates may come from other stores.)
_AFTER_STORES = ("hessian", "eval", "judge", "plan", "metrics")


@dataclasses.dataclass(frozen=True)
class Point:
    """One point of a grid."""

    name: str
    """The name of its directory, which does not depend on the other points."""
    values: dict[str, Any]
    """The values that the axes set at this point, by key."""
    config: ConfigDict
    """The complete config."""
    is_board: bool = False
    """Whether it is held against retraining (`tda.run.board`), or traced."""

    @property
    def training(self) -> str:
        """The name of this point's training, shared by all that train and retrain alike."""
        config = {k: v for k, v in self.config.to_dict().items() if k not in _AFTER_TRAINING}
        if self.is_board:
            for key in _AFTER_RETRAINING:
                del config["counterfactual"][key]
            if self.config.train.traced < 1:
                # The bank's training continues from the traced checkpoint.
                config["traced"] = self.config.train.traced
        if self._sums_over_steps:
            # Which checkpoints the first point keeps decides the figures of the others.
            config["saved"] = [self.config.train.save_every, self.config.train.keep]
        if self.config.train.capture:
            # The gradients of a training's steps are kept only while it runs.
            config["captured"] = [capturing.settings(self.config), self.config.store.root]
        return fingerprint(plain(config | {"train": train.settings(self.config)}))

    @property
    def _sums_over_steps(self) -> bool:
        """Whether figures depend on the checkpoints that the training keeps on its way."""
        if self.is_board:  # a bank saves the checkpoints of its own training
            return False
        chosen = first_stage.with_first(self.config, methods.parse(self.config.methods))
        return self.config.train.capture or any(m.several for m in chosen.values())

    @property
    def stores(self) -> str:
        """The name of this point's gradient stores, shared by all points that encode alike."""
        config = {k: v for k, v in self.config.to_dict().items() if k not in _AFTER_STORES}
        return fingerprint(plain(config))

    @property
    def encoding(self) -> str:
        """The name of the lock under which this point encodes.

        Points with other `stores` may still have one store in common (methods differ, say), so the
        lock must be wider than `stores`.
        """
        c = self.config
        scope = [c.gradients.include, c.gradients.exclude, c.gradients.untapped, c.store.dtype]
        projection = dataclasses.asdict(projection_of(c))
        return fingerprint(plain([self.training, c.train.traced, projection, scope]))


@dataclasses.dataclass(frozen=True)
class Sweep:
    """The checked contents of a sweep file."""

    axes: tuple[str, ...]
    """All keys that are swept."""
    points: list[Point]
    plots: list[dict]


def load(path: str, config: ConfigDict, is_board: bool = False) -> Sweep:
    """Reads a sweep file and applies its grid to a config.

    Args:
        path: the sweep file.
        config: the config that its values are set in.
        is_board: whether the points are held against retraining.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it has no `get_sweep`, has something else in place of an axis, or sets a key
            that the config lacks; the message names the file and the key.
    """
    contents = _read(path)
    fixed = _with_values(config, contents["fixed"], path)
    axes = [_parse_axis(key, values, path) for key, values in contents["axes"].items()]
    names = tuple(key for keys, _ in axes for key in keys)
    if len(set(names)) < len(names):
        raise ValueError(f"{path}: a key is on two axes; there are {', '.join(names)}")
    points = []
    for choice in itertools.product(*(values for _, values in axes)):
        values = {
            key: value
            for (keys, _), axis_values in zip(axes, choice, strict=True)
            for key, value in zip(keys, axis_values, strict=True)
        }
        point_config = _with_values(fixed, values, path)
        name = _name_point(values, contents["fixed"])
        name = f"board,{name}" if is_board else name
        points.append(Point(name, values, point_config, is_board))
    counts = collections.Counter(p.name for p in points)
    if twice := [p.values for p in points if counts[p.name] > 1]:
        raise ValueError(f"{path}: an axis has a value twice, so that {twice[0]} is two points")
    return Sweep(names, points, list(contents["plots"]))


def _read(path: str) -> dict:
    """Returns what a sweep file's `get_sweep` returns, with "fixed" and "plots" if it has none."""
    module = runpy.run_path(path)
    if "get_sweep" not in module:
        raise ValueError(f"{path} has no function get_sweep()")
    returned = module["get_sweep"]()
    _check_keys(returned, "get_sweep()", path)
    contents = {"fixed": {}, "plots": []} | dict(returned)
    unknown = set(contents) - {"axes", "fixed", "plots"}
    if unknown or not contents.get("axes"):
        problem = f"unknown {', '.join(sorted(unknown))}" if unknown else "no axes"
        raise ValueError(f"{path}: {problem}; get_sweep() returns axes, fixed and plots")
    for name in ("axes", "fixed"):
        _check_keys(contents[name], name, path)
    contents["fixed"] = {key: python_value(value) for key, value in contents["fixed"].items()}
    return contents


def _check_keys(value, name: str, path: str) -> None:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ValueError(f"{path}: {name} is {value!r}; give a dict by key")


def _parse_axis(key: str, values, path: str) -> tuple[list[str], list[tuple]]:
    keys = [k.strip() for k in key.split(",")]
    rows = _python_values(values)
    if rows is not None and len(keys) > 1:
        rows = [_python_values(row) for row in rows]
    elif rows is not None:
        rows = [(value,) for value in rows]
    if not rows or any(row is None or len(row) != len(keys) for row in rows):
        of_each = f", each a tuple of {len(keys)}" if len(keys) > 1 else ""
        raise ValueError(f"{path}: axis {key!r} needs a list of values{of_each}, not {values!r}")
    return keys, [tuple(row) for row in rows]


def _python_values(values) -> list | None:
    """Returns the values of a list, a tuple or an array; None if it is something else."""
    if isinstance(values, str | Mapping) or not isinstance(values, Iterable):
        return None
    if isinstance(values, np.ndarray) and not values.ndim:  # it is Iterable, and cannot be iterated
        return None
    return [python_value(value) for value in values]


def _with_values(config: ConfigDict, values: dict[str, Any], path: str) -> ConfigDict:
    config = config.copy_and_resolve_references()
    for key, value in values.items():
        known = list(defaults.flat(config))
        if key not in known:
            close = difflib.get_close_matches(key, known, n=3)
            hint = f"; did you mean {' or '.join(close)}?" if close else ""
            raise ValueError(f"{path}: the config has no key {key!r}{hint}")
        try:
            config.update_from_flattened_dict({key: value})
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: cannot set {key}={value!r}: {error}") from error
    return config


def _name_point(values: dict[str, Any], fixed: dict[str, Any]) -> str:
    """Returns a readable name with a digest, since points of other sweeps fix other keys."""
    text = ",".join(f"{key.split('.')[-1]}={value}" for key, value in values.items())
    # File systems limit a name to 255 bytes, and some characters have a meaning in them.
    readable = re.sub(r"[^\w.=,+-]+", "_", text)[:80]
    return f"{readable}-{fingerprint(plain(fixed | values))[:6]}"
