"""What a sweep file says: the points of a grid, each a config with some keys changed.

A sweep file has `get_sweep()`, which returns a dict:

    "axes": {key: values}, the grid's axes. A key such as "model.size, train.learning_rate" stands
        for several that change together; its values are tuples. The key "seed" makes figures be
        told as mean and spread over its values.
    "fixed": {key: value}, set at every point.
    "plots": a list of {"name", "x", "y", "lines", "log_x", "omit", "mark"}: see `sweep_report`.
"""

import dataclasses
import difflib
import itertools
import re
import runpy
from typing import Any

from ml_collections import ConfigDict

from tda.runtime.fingerprint import fingerprint, plain

# Keys that leave a training as it is. What else differs is another training.
_AFTER_TRAINING = (
    "methods",
    "gradients",
    "projection",
    "curvature",
    "several",
    "dense",
    "store",
    "search",
    "hessian",
    "eval",
    "plan",
)
_OF_TRAIN = ("save_every", "keep", "traced")
# Keys that leave the stores as they are.
_AFTER_STORES = ("hessian", "eval", "plan")


@dataclasses.dataclass(frozen=True)
class Point:
    """One point of a grid.

    Attributes:
        name: of its directory; the same whatever other points there are.
        values: by key, what the axes set here.
        config: the whole config.
    """

    name: str
    values: dict[str, Any]
    config: ConfigDict

    @property
    def training(self) -> str:
        """Names the training that this point uses: points that agree share it."""
        config = self.config.to_dict()
        config = {k: v for k, v in config.items() if k not in _AFTER_TRAINING}
        config["train"] = {k: v for k, v in config["train"].items() if k not in _OF_TRAIN}
        return fingerprint(plain(config))

    @property
    def stores(self) -> str:
        """Names the gradient stores that this point uses: points that agree share them."""
        config = {k: v for k, v in self.config.to_dict().items() if k not in _AFTER_STORES}
        return fingerprint(plain(config))

    @property
    def encoding(self) -> str:
        """Names what no two points may encode at a time: points that differ may share a store."""
        c = self.config
        scope = [c.gradients.include, c.gradients.exclude, c.gradients.untapped, c.store.dtype]
        return fingerprint(plain([self.training, c.train.traced, dict(c.projection), scope]))


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A sweep file's contents, checked.

    Attributes:
        axes: every key that is swept.
        points: of the grid.
        plots: what to draw.
    """

    axes: tuple[str, ...]
    points: list[Point]
    plots: list[dict]


def load(path: str, config: ConfigDict) -> Sweep:
    """Reads a sweep file, and lays its grid over a config.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it has no `get_sweep`, or says something that the config has no place for; the
            message names the file and the key.
    """
    found = runpy.run_path(path)
    if "get_sweep" not in found:
        raise ValueError(f"{path} has no function get_sweep()")
    told = dict(found["get_sweep"]())
    unknown = set(told) - {"axes", "fixed", "plots"}
    if unknown or not told.get("axes"):
        wrong = f"unknown {', '.join(sorted(unknown))}" if unknown else "no axes"
        raise ValueError(f"{path}: {wrong}; get_sweep() returns axes, fixed and plots")
    fixed = _changed(config, told.get("fixed", {}), path)
    axes = [_axis(key, values, path) for key, values in told["axes"].items()]
    names = tuple(key for keys, _ in axes for key in keys)
    if len(set(names)) < len(names):
        raise ValueError(f"{path}: a key is on two axes; there are {', '.join(names)}")
    points = []
    for choice in itertools.product(*(values for _, values in axes)):
        values = {
            key: value
            for (keys, _), chosen in zip(axes, choice, strict=True)
            for key, value in zip(keys, chosen, strict=True)
        }
        name = _name(values, told.get("fixed", {}))
        points.append(Point(name, values, _changed(fixed, values, path)))
    return Sweep(names, points, list(told.get("plots", [])))


def _axis(key: str, values, path: str) -> tuple[list[str], list[tuple]]:
    keys = [k.strip() for k in key.split(",")]
    rows = [tuple(v) if len(keys) > 1 else (v,) for v in values]
    if not rows or any(len(row) != len(keys) for row in rows):
        raise ValueError(f"{path}: axis {key!r} needs values, each of {len(keys)}")
    return keys, rows


def _changed(config: ConfigDict, values: dict[str, Any], path: str) -> ConfigDict:
    config = config.copy_and_resolve_references()
    for key, value in values.items():
        known = _keys(config)
        if key not in known:
            close = difflib.get_close_matches(key, known, n=3)
            hint = f"; did you mean {' or '.join(close)}?" if close else ""
            raise ValueError(f"{path}: the config has no key {key!r}{hint}")
        try:
            config.update_from_flattened_dict({key: value})
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: cannot set {key}={value!r}: {error}") from error
    return config


def _keys(config: ConfigDict, prefix: str = "") -> list[str]:
    out = []
    for key, value in config.items():
        out += _keys(value, f"{prefix}{key}.") if isinstance(value, ConfigDict) else [prefix + key]
    return out


def _name(values: dict[str, Any], fixed: dict[str, Any]) -> str:
    """Tells the values; those of sweeps that fix other keys are other points."""
    told = ",".join(f"{key.split('.')[-1]}={value}" for key, value in values.items())
    readable = re.sub(r"[^\w.=,+-]+", "_", told)[:80]
    return f"{readable}-{fingerprint(plain(fixed | values))[:6]}"
