"""Finds a parameter's second moments in an optimizer's state and applies the optimizer's rule.

States may be nested in any way (`optax.chain`, `masked`, `partition`, `inject_hyperparams`,
`MultiSteps`): the state of a transformation is recognised by its fields, at any depth. Moments
are matched to parameters by name, never by index, order or shape: the shape of a square matrix does
not tell whether it is transposed.

Many optax optimizers call their second moments "nu" but divide by them in different ways, and no
state names its optimizer. So the caller or the checkpoint's description names it, and the
state must have the fields of that optimizer.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from tda.gradients.moments import leaf_names
from tda.model.functional import flat_parameters
from tda.runtime.differences import shorten
from tda.training import saved_state
from tda.training.checkpoint import CheckpointError

# The fields with a parameter's second moments, as optax's transformations name them.
_FIELDS = ("nu", "nu_max", "v_row", "v_col", "v")
# Every state with second moments has one of these fields; the other fields are its siblings.
_MARKS = ("nu", "v_row")
_CONSTANTS = ("b1", "b2", "eps", "eps_root", "decay")
# V counts as at least this share of its mean over the matrix (see `second_moments`).
FLOOR = 1e-6

# The fields of the states that `exact` supports, by the optimizer's name.
_STATES = {
    **dict.fromkeys(
        ("adam", "adamw", "nadam", "nadamw", "yogi", "adam_pax"), [{"count", "mu", "nu"}]
    ),
    "amsgrad": [{"count", "mu", "nu", "nu_max"}],
    "rmsprop": [{"nu"}, {"count", "nu"}],
}
_NOT_SECOND_MOMENTS = {
    "adamax": "its ν is an infinity norm",
    "adamaxw": "its ν is an infinity norm",
    "adabelief": "its ν is the variance about the mean gradient",
    **dict.fromkeys(("lion", "sgd", "muon", "sign_sgd"), "it keeps no second moments"),
}


class SecondMomentError(ValueError):
    """The optimizer's state does not hold what a correction needs."""


@dataclasses.dataclass(frozen=True)
class Moments:
    """One parameter's moments in the state of one transformation.

    Attributes:
        path: path name of the parameter.
        prefix: path name of the state, ending in "/" unless it is empty.
        fields: the parameter's loaded leaves by field: "nu", "nu_max", "v_row", "v_col", "v", "mu".
        siblings: the names of all fields of the state.
        count: the state's number of steps; None if it has no counter.
        constants: the optimizer's "name", "b2", "eps" and so on, as they apply to this state.
    """

    path: str
    prefix: str
    fields: dict[str, jax.Array]
    siblings: frozenset[str]
    count: jax.Array | None
    constants: dict


@dataclasses.dataclass(frozen=True)
class OptimizerState:
    """The leaves of an optimizer's state by path name, in memory or in a checkpoint.

    Attributes:
        names: the path name of every leaf.
        load: returns the arrays of some of the names.
        described: the optimizer's constants. If the parts of a partition differ, a dict under a
            part's label holds the constants of that part.
    """

    names: frozenset[str]
    load: Callable[[Collection[str]], Mapping[str, Any]]
    described: dict

    def moments(self, paths: Iterable[str], fields=_FIELDS) -> dict[str, Moments]:
        """Loads the moments of some parameters.

        Args:
            paths: path names of the parameters.
            fields: the fields to load; by default all second moments.

        Raises:
            SecondMomentError: the state has no second moments of a parameter, or several; the
                message lists those that it has.
        """
        states = {path: self._locate(path) for path in paths}
        leaves: dict[str, dict[str, str]] = {}
        for path, (prefix, tail) in states.items():
            by_field = {f: f"{prefix}{f}/{tail}" for f in fields}
            leaves[path] = {f: n for f, n in by_field.items() if n in self.names}
        counts = {p: n for p, _ in states.values() if (n := self._leaf(f"{p}count"))}
        moment_names = {n for by_field in leaves.values() for n in by_field.values()}
        arrays = self.load({*moment_names, *counts.values(), *self._injected})
        return {
            path: Moments(
                path,
                prefix,
                {f: arrays[n] for f, n in leaves[path].items()},
                self._siblings[prefix],
                arrays[counts[prefix]] if prefix in counts else None,
                self._constants(prefix, arrays),
            )
            for path, (prefix, _) in states.items()
        }

    def check(self) -> None:
        """Checks that there are second moments, and that the constants of Adam's rule are known.

        Raises:
            SecondMomentError: otherwise; the message lists what the state has, or what to pass.
        """
        if not self._states:
            raise SecondMomentError(
                f"the optimizer's state has no second moments{self._reason()}, nothing under the "
                f"names {' and '.join(_MARKS)}; it has {shorten(sorted(self.names)) or 'nothing'}. "
                "Leave scales out, and second moments are estimated"
            )
        name = self.described.get("name")
        if name is not None and name not in {*_STATES, *_NOT_SECOND_MOMENTS, "adafactor"}:
            raise SecondMomentError(f"optimizer={name!r}: {_unknown_rule(name)}")
        for prefix, siblings in sorted(self._siblings.items()):
            if siblings >= {"count", "mu", "nu"}:
                constants = self._constants(prefix, dict.fromkeys(self._injected))
                _check_lacking(constants, siblings, f"the state {prefix.rstrip('/')!r}")

    def check_labels(self, labels: Iterable[str]) -> None:
        """Checks that the parts of a partition have second moments under their labels.

        Raises:
            SecondMomentError: the constants of a label would have no effect.
        """
        known = {label for prefix in self._siblings for label in leaf_names.labels(prefix)}
        if self._siblings and (absent := sorted(set(labels) - known)):
            raise SecondMomentError(
                f"parts has the label {absent[0]!r}, under which the optimizer's state has no "
                f"second moments; it has them under {', '.join(sorted(self._siblings)) or 'none'}"
            )

    @property
    def _injected(self) -> list[str]:
        return [n for n in self.names if "hyperparams" in n.split("/")]

    @functools.cached_property
    def _states(self) -> dict[str, dict[str, str]]:
        """By path of a parameter: the state's prefix, and the rest of the name after the field."""
        states: dict[str, dict[str, str]] = {}
        for name in self.names:
            parts = name.split("/")
            for i, part in enumerate(parts[:-1]):
                if part in _MARKS:
                    prefix = "".join(f"{p}/" for p in parts[:i])
                    tail = "/".join(parts[i + 1 :])
                    for path in leaf_names.parameter_paths(tail):
                        states.setdefault(path, {})[prefix] = tail
        return states

    @functools.cached_property
    def _siblings(self) -> dict[str, frozenset[str]]:
        """The fields of every state with second moments, by its prefix."""
        prefixes = {prefix for by_prefix in self._states.values() for prefix in by_prefix}
        fields: dict[str, set[str]] = {prefix: set() for prefix in prefixes}
        for name in self.names:
            parts = name.split("/")
            for i, part in enumerate(parts):
                prefix = "".join(f"{p}/" for p in parts[:i])
                if prefix in fields:
                    fields[prefix].add(part)
        return {prefix: frozenset(names) for prefix, names in fields.items()}

    def _leaf(self, name: str) -> str | None:
        """Returns the name of a leaf, with nnx's own ending if it has one."""
        return next((n for n in (name, f"{name}/value") if n in self.names), None)

    def _locate(self, path: str) -> tuple[str, str]:
        """Returns the prefix of a parameter's state, and the rest of its name after the field."""
        candidates = self._states.get(path, {})
        # A module may also be called "nu": a match inside another is a parameter, not a state.
        located = {
            prefix: tail
            for prefix, tail in candidates.items()
            if not any(prefix != outer and prefix.startswith(outer) for outer in candidates)
        }
        if len(located) > 1:
            listed = ", ".join(
                f"{p}{mark}/{tail}"
                for p, tail in sorted(located.items())
                for mark in _MARKS
                if f"{p}{mark}/{tail}" in self.names
            )
            raise SecondMomentError(
                f"the optimizer's state has second moments of {path} more than once: {listed}"
            )
        if not located:
            raise SecondMomentError(self._missing(path))
        return next(iter(located.items()))

    def _missing(self, path: str) -> str:
        of_it = sorted(
            n for n in self.names if path in leaf_names.parameter_paths(n, anywhere=True)
        )
        elsewhere = sorted(n for n in self.names if any(f"/{m}/" in f"/{n}" for m in _MARKS))
        return (
            f"the optimizer's state has no second moments of {path}{self._reason()}; of that "
            f"parameter it has {', '.join(of_it) or 'nothing'}; under the names "
            f"{' and '.join(_MARKS)} it has {shorten(elsewhere) or 'nothing'}. Names "
            "must agree as a whole; without second moments leave scales out, and they are estimated"
        )

    def _reason(self) -> str:
        name = self.described.get("name")
        return f" ({name}: {_NOT_SECOND_MOMENTS[name]})" if name in _NOT_SECOND_MOMENTS else ""

    def _constants(self, prefix: str, arrays: Mapping[str, Any]) -> dict:
        constants = {k: v for k, v in self.described.items() if not isinstance(v, dict)}
        for label in leaf_names.labels(prefix):
            if isinstance(self.described.get(label), dict):
                constants |= self.described[label]
        parts = prefix.split("/")
        # `inject_hyperparams` stores the constants of the last update, so these win over the
        # description's; of several, the innermost applies to this state.
        for i in range(len(parts)):
            inject = "".join(f"{p}/" for p in parts[:i]) + "hyperparams/"
            names = {k: self._leaf(inject + k) for k in _CONSTANTS}
            constants |= {k: arrays[n] for k, n in names.items() if n}
        return constants


def open_state(source: Any, step: int | None = None, /, **constants: Any) -> OptimizerState:
    """Opens an optimizer's state.

    Args:
        source: the path of an Orbax checkpoint, of any layout (`tda.training.saved_state`), or a
            state in memory: an `nnx.Optimizer`, an optax state, or a tree that holds one.
        step: which checkpoint of a directory by step; None for the last.
        **constants: the optimizer's constants, as `OptimizerState.described`.

    Raises:
        SecondMomentError: a constant contradicts the checkpoint's description, or there is a step
            for a state in memory.
        tda.training.checkpoint.CheckpointError: no checkpoint, or one without optimizer state.
    """
    if not isinstance(source, str | os.PathLike):
        if step is not None:
            raise SecondMomentError(
                f"step={step} has no effect on a state in memory, which is of one step; leave it "
                "out, or give the path of the checkpoints"
            )
        tree = nnx.state(source) if isinstance(source, nnx.Pytree) else source
        arrays = flat_parameters(tree)
        return OptimizerState(_of_optimizers(arrays), lambda names: arrays, constants)
    saved = saved_state.open_checkpoint(source, step)
    names = _of_optimizers(saved.names)
    if not names:
        held = ", ".join(sorted({n.split("/")[0] for n in saved.names}))
        raise CheckpointError(
            f"{saved.path} has no optimizer state (it holds {held}); give a checkpoint that was "
            "saved with it, or none, and second moments are estimated (in a run, by "
            "gradients.second_moments=estimate)"
        )
    described = saved.description.get("optimizer")
    if not isinstance(described, dict):  # another program's metadata may say anything here
        described = {}
    different = [k for k in constants.keys() & described.keys() if constants[k] != described[k]]
    if different:
        listed = ", ".join(f"{k}={constants[k]} and {described[k]}" for k in sorted(different))
        raise SecondMomentError(
            f"the arguments and the description of {saved.path} differ: {listed}; leave these "
            "arguments out"
        )
    return OptimizerState(names, saved.load, described | constants)


def _of_optimizers(names: Iterable[str]) -> frozenset[str]:
    """Returns the names of optimizers' leaves: those under `opt_state`, or all but `params`."""
    by_name = {n: n.split("/") for n in names}
    inside = frozenset(n for n, parts in by_name.items() if "opt_state" in parts)
    return inside or frozenset(n for n, parts in by_name.items() if parts[0] != "params")


def raise_to_floor(V, axis=(-1, -2), floor: float = FLOOR) -> jax.Array:
    """Returns V, where each entry is raised to at least `floor` times the mean over `axis`.

    Args:
        V: second moments of one or several matrices, of any float type.
        axis: the axes of one matrix; None for all.
        floor: relative to the matrix's mean; 0 for none.

    Returns:
        float32, in V's shape.
    """
    V = jnp.asarray(V, jnp.float32)
    return jnp.maximum(V, floor * jnp.mean(V, axis=axis, keepdims=True))


def adam(nu, count, b2, eps, eps_root=0.0) -> jax.Array:
    """Returns 1 / (√(ν / (1 − b2ᵗ) + eps_root) + eps), float32 (Kingma & Ba 2015, algorithm 1)."""
    nu_hat = jnp.asarray(nu, jnp.float32) / (1.0 - b2 ** jnp.asarray(count, jnp.float32))
    return 1.0 / (jnp.sqrt(nu_hat + eps_root) + eps)


def exact(moments: Moments) -> jax.Array:
    """Returns the factor by which the optimizer multiplies each weight's gradient.

    Adam(W), NAdam(W) and Yogi use Adam's rule (`adam`), MaxText's adam_pax without the correction
    for bias, which its ν has already. AMSGrad divides by the maximum of the bias-corrected moments
    (Reddi et al. 2018; optax corrects before it takes the maximum), RMSProp by √(ν + eps), or by
    √ν + eps if `eps_in_sqrt` is false.

    Returns:
        float32, in the parameter's shape.

    Raises:
        SecondMomentError: the optimizer's rule is not supported, constants are missing, or the
            state does not belong to the optimizer that the description names.
    """
    constants = moments.constants
    name, count = constants.get("name"), moments.count
    _check_lacking(constants, moments.siblings, moments.path)
    if name not in _STATES:
        raise SecondMomentError(f"{moments.path} was trained with {name!r}: {_unknown_rule(name)}")
    if moments.siblings not in _STATES[name]:
        raise SecondMomentError(
            f"the description says that {moments.path} was trained with {name!r}, whose state has "
            f"{_listed(_STATES[name][0])}; the state at {moments.prefix!r} has "
            f"{_listed(moments.siblings)}"
        )
    nu, eps, eps_root = moments.fields["nu"], constants["eps"], constants.get("eps_root", 0.0)
    if name == "amsgrad":
        return adam(moments.fields["nu_max"], 1, 0.0, eps, eps_root)
    if name == "adam_pax":
        # MaxText's and Praxis' Adam corrects its decay rates for bias, and so ν itself.
        return adam(nu, 1, 0.0, eps, eps_root)
    if name == "rmsprop":
        within, after = (eps, 0.0) if constants.get("eps_in_sqrt", True) else (0.0, eps)
        decay, count = (0.0, 1) if count is None else (constants["decay"], count)
        return adam(nu, count, decay, after, within)
    return adam(nu, count, constants["b2"], eps, eps_root)


def _unknown_rule(name) -> str:
    why = _NOT_SECOND_MOMENTS.get(name, "how it divides by ν is not known here")
    return f"{why}; known are {', '.join(_STATES)} and adafactor"


def _check_lacking(constants: dict, siblings: frozenset[str], subject: str) -> None:
    """Checks that the optimizer's name and the constants of its rule are known."""
    name = constants.get("name")
    if name in _STATES or name is None:
        needed = {"name", "eps"} | ({"b2"} if "mu" in siblings and name != "adam_pax" else set())
        if name == "rmsprop":
            needed = {"eps"} | ({"decay"} if "count" in siblings else set())
        lacking = sorted(needed - constants.keys(), key=("name", "b2", "decay", "eps").index)
        if lacking:
            arguments = [{"name": "optimizer"}.get(k, k) for k in lacking]
            raise SecondMomentError(
                f"{subject} does not say its optimizer's {', '.join(lacking)}, which the division "
                f"by √ν needs: pass {', '.join(f'{a}=' for a in arguments)} to tda.second_moments "
                f"(optimizer: {', '.join(_STATES)})"
            )


def _listed(names) -> str:
    return ", ".join(sorted(names))
