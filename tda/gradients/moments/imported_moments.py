"""1/√V from the optimizer state that another program saved with a pretrained model.

Reads safetensors whose tensor names contain the parameters' names (Megatron, OLMo), or PyTorch's
`optimizer.pt`. Moments are matched to parameters by name only: PyTorch numbers the parameters in
an order that the training program chose, so a file without names needs a list of them.
"""

import collections
import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np

from tda.gradients import sites
from tda.gradients.moments import optimizer_state
from tda.gradients.moments.optimizer_state import SecondMomentError
from tda.gradients.moments.scales import Scale, check_full, finite, from_full
from tda.model.pretrained.description import Pretrained
from tda.model.pretrained.tensors import Safetensors
from tda.runtime.differences import shorten

# PyTorch's name for the running mean of squared gradients.
_FIELD = "exp_avg_sq"
_HOW_TO_NAME = (
    "json.dump([[name_of[p] for p in group['params']] for group in optimizer.param_groups], file) "
    "with name_of = {p: n for n, p in model.named_parameters()}"
)


def read(
    path,
    pretrained: Pretrained,
    chosen: list[sites.Site],
    correction: str,
    *,
    names: Sequence[Sequence[str]] | str | os.PathLike | None = None,
    rename: Callable[[str], str] = lambda name: name,
    allow_torch: bool = False,
    b2: float | None = None,
    eps: float | None = None,
    step: int | None = None,
) -> dict[str, Scale]:
    """Reads the scale of every site by Adam's rule, 1 / (√(ν / (1 − b2ᵗ)) + eps).

    ν has the floor of `tda.gradients.moments.second_moments`.

    Args:
        path: a .safetensors file, a directory of them (all are read), or PyTorch's `optimizer.pt`.
        pretrained: the description of the model's files (`tda.model.pretrained.loading.inspect`),
            which maps parameters to tensors.
        chosen: the sites.
        correction: "adam", "factored" or "low_rank(R)" (`tda.gradients.moments.second_moments`).
        names: for `optimizer.pt`, the parameters' names by group, in the optimizer's order, or the
            path of a JSON file with them; not needed if the file has `param_names`.
        rename: a function from a tensor's name in the model's files to its name in the optimizer's.
        allow_torch: allows PyTorch's format, a pickle, read by `torch.load(weights_only=True)`.
        b2, eps, step: Adam's constants and step count, if the file does not have them.

    Raises:
        SecondMomentError: moments are missing, ambiguous or of another shape, or constants are
            missing; the message names them.
    """
    check_full(correction)
    path = pathlib.Path(path)
    if not path.exists():
        raise SecondMomentError(f"{path}: no such file or directory")
    if path.is_dir() or path.suffix == ".safetensors":
        state = _of_safetensors(path)
    else:
        state = _of_torch(path, names, allow_torch)
    constants = {"b2": b2, "eps": eps, "step": step}
    scales = {}
    for site in chosen:
        parts = _parts(pretrained, site)
        layers = []
        for part in parts:
            moments = state(
                rename(part.tensor), {k: v for k, v in constants.items() if v is not None}
            )
            nu = optimizer_state.raise_to_floor(_slice(moments, part, site, path), axis=None)
            layers.append(optimizer_state.adam(nu, moments["step"], moments["b2"], moments["eps"]))
        full = layers[0] if site.stack is None else jnp.stack(layers)
        scales[site.path] = from_full(site.matrix(full), correction)
    return finite(scales)


def _parts(pretrained: Pretrained, site: sites.Site) -> list:
    names = [site.path] if site.stack is None else site.names()
    missing = [n for n in names if n not in pretrained.parts]
    if missing:
        raise SecondMomentError(f"{pretrained.path} has no tensor for {shorten(missing)}")
    return [pretrained.parts[n] for n in names]


def _slice(moments: dict, part, site: sites.Site, path) -> np.ndarray:
    shape = site.shape if site.stack is None else site.shape[1:]
    full_shape = moments["shape"]
    fits = part.take is None or full_shape[part.axis] > int(part.take.max())
    if len(full_shape) != len(shape) or not fits or part.shape(full_shape) != tuple(shape):
        raise SecondMomentError(
            f"{path}: the second moments of {moments['name']} have the shape {full_shape}, which "
            f"does not fit {site.path} {tuple(shape)}"
        )
    part = dataclasses.replace(part, tensor=moments["tensor"])
    return part.pick(moments["source"], tuple(slice(0, n) for n in shape))


def _of_safetensors(path: pathlib.Path):
    files = sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]
    source = Safetensors(files)
    shapes = source.shapes()
    if not any(_FIELD in name for name in shapes):
        raise SecondMomentError(
            f"{path} has no tensor with {_FIELD!r} in its name; it has {shorten(sorted(shapes))}"
        )

    def state(name, constants):
        field = _only(path, name, _FIELD, shapes)
        steps = [n for n in _candidates(name, "step", shapes)] or [
            n for n in shapes if n in ("step", "optimizer.step", "optim.step", "state.step")
        ]
        if "step" not in constants and steps:
            index = tuple(slice(0, n) for n in shapes[steps[0]])
            count = np.asarray(source.read(steps[0], index)).reshape(-1)[0]
            constants = constants | {"step": int(count)}
        _check_lacking(path, name, constants)
        return constants | {"name": name, "shape": shapes[field], "source": source, "tensor": field}

    return state


def _candidates(name: str, field: str, names) -> list[str]:
    """Returns the tensors that may hold a parameter's field: NAME.FIELD or FIELD.NAME."""
    ends = (f"{name}.{field}", f"{field}.{name}", f"{name}/{field}", f"{field}/{name}")
    # Further components may come before, but the match must start at a component's start.
    return [n for n in names for end in ends if n == end or n.endswith(("." + end, "/" + end))]


def _only(path, name: str, field: str, names) -> str:
    matches = _candidates(name, field, names)
    if len(matches) != 1:
        occurrence = f"more than once: {shorten(matches)}" if matches else "not at all"
        similar = [n for n in names if field in n]
        raise SecondMomentError(
            f"{path} has {field} of {name} {occurrence}; it has {shorten(similar)}; if the names "
            "differ, pass rename"
        )
    return matches[0]


def _of_torch(path: pathlib.Path, names, allow_torch: bool):
    if not allow_torch:
        raise SecondMomentError(
            f"{path} is a PyTorch file, a pickle; allow_torch=True reads it by "
            "torch.load(weights_only=True), which runs no code from the file"
        )
    try:
        import torch
    except ImportError as error:
        raise SecondMomentError(f"reading {path} needs the package torch; install it") from error
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # unpickling raises many types
        raise SecondMomentError(f"{path} cannot be read as tensors only: {error}") from error
    if not isinstance(loaded, dict) or not {"state", "param_groups"} <= loaded.keys():
        raise SecondMomentError(f"{path} is not an optimizer's state_dict")
    groups = loaded["param_groups"]
    by_name = _numbered(path, groups, names)

    def state(name, constants):
        if name not in by_name:
            raise SecondMomentError(
                f"{path}: no parameter is called {name}; it has {shorten(sorted(by_name))}"
            )
        number, group = by_name[name]
        entry = loaded["state"].get(number)
        if entry is None or _FIELD not in entry:
            raise SecondMomentError(
                f"{path}: parameter {number} ({name}) has no {_FIELD}; it has "
                f"{', '.join(entry or ()) or 'no state'}"
            )
        if group.get("amsgrad"):
            raise SecondMomentError(f"{path}: AMSGrad's state is not supported")
        nu = entry[_FIELD].float().numpy()
        constants = _stated_by_torch(entry, group) | constants
        _check_lacking(path, name, constants)
        moments = {"name": name, "shape": nu.shape, "source": _Array(nu), "tensor": name}
        return constants | moments

    return state


def _stated_by_torch(entry: dict, group: dict) -> dict[str, float]:
    """Returns those of Adam's constants that a parameter's entry or its group has."""
    # PyTorch counts the steps of each parameter, Apex's and DeepSpeed's FusedAdam those of a group.
    both = group | entry
    stated = {"step": int(both["step"])} if both.get("step") is not None else {}
    if both.get("betas") is not None:
        stated["b2"] = both["betas"][1]
    return stated | ({"eps": both["eps"]} if both.get("eps") is not None else {})


def _check_lacking(path: pathlib.Path, name: str, constants: dict) -> None:
    """Checks that all constants of Adam's rule are known."""
    if lacking := sorted({"b2", "eps", "step"} - constants.keys()):
        raise SecondMomentError(
            f"{path} does not say Adam's {', '.join(lacking)} for {name}; pass "
            f"{', '.join(f'{k}=' for k in lacking)}"
        )


class _Array:
    """A source with a single tensor, given as an array."""

    def __init__(self, x: np.ndarray):
        self._x = x

    def read(self, tensor, index):
        return self._x[index]


def _numbered(path, groups, names) -> dict[str, tuple[int, dict]]:
    """Returns the number and the group of every parameter by its name."""
    if names is None:
        names = [g.get("param_names") for g in groups]
        if any(n is None for n in names):
            raise SecondMomentError(
                f"{path} numbers its parameters and does not name them; pass names, in the "
                f"optimizer's order: {_HOW_TO_NAME}"
            )
    elif isinstance(names, str | os.PathLike):
        names = json.loads(pathlib.Path(names).read_text(encoding="utf-8"))
    counts = [len(g["params"]) for g in groups]
    if [len(n) for n in names] != counts:
        raise SecondMomentError(
            f"{path} has groups of {counts} parameters, but names has groups of "
            f"{[len(n) for n in names]}"
        )
    flat = [n for group in names for n in group]
    twice = [n for n, count in collections.Counter(flat).items() if count > 1]
    if twice:
        raise SecondMomentError(f"names has {shorten(twice)} twice")
    pairs = zip(groups, names, strict=True)
    return {
        name: (number, group)
        for group, group_names in pairs
        for number, name in zip(group["params"], group_names, strict=True)
    }
