"""Finds a parameter's second moments in an optimizer's state and applies the optimizer's rule.

States may be nested in any way (`optax.chain`, `masked`, `partition`, `inject_hyperparams`,
`MultiSteps`): the state of a transformation is recognised by its fields, at any depth. Moments
are matched to parameters by name, never by index, order or shape.

Many optax optimizers call their second moments "nu" but divide by them in different ways. So the
optimizer's name in the checkpoint's description selects the rule, and the state must have the
fields of that optimizer.
"""

import dataclasses

import jax
import jax.numpy as jnp

from tda.model.functional import flat_parameters
from tda.training import checkpoint

# The fields with a parameter's second moments, as optax's transformations name them.
_FIELDS = ("nu", "nu_max", "v_row", "v_col", "v")
# Every state with second moments has one of these fields; the other fields are its siblings.
_MARKS = ("nu", "v_row")
# V counts as at least this share of its mean over the matrix (see `second_moments`).
FLOOR = 1e-6
_CONSTANTS = ("b1", "b2", "eps", "eps_root", "decay")

# The fields of the states that `exact` supports, by the optimizer's name.
_STATES = {
    **dict.fromkeys(("adam", "adamw", "nadam", "nadamw", "yogi"), [{"count", "mu", "nu"}]),
    "amsgrad": [{"count", "mu", "nu", "nu_max"}],
    "rmsprop": [{"nu"}, {"count", "nu"}],
}
_NOT_SECOND_MOMENTS = {
    "adamax": "its ν is an infinity norm",
    "adamaxw": "its ν is an infinity norm",
    "adabelief": "its ν is the variance about the mean gradient",
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


def load(root, paths: set[str], step: int | None = None, fields=_FIELDS) -> dict:
    """Loads the leaves of a checkpoint's optimizer state by path name; `...` for unneeded leaves.

    Args:
        root: the directory of checkpoints.
        paths: path names of the parameters whose moments to load.
        step: the checkpoint's step; None for the last checkpoint.
        fields: the fields to load of each parameter; by default all second moments.

    Raises:
        tda.training.checkpoint.CheckpointError: no checkpoint, or one without optimizer state.
    """

    def keep(name: str) -> bool:
        parts = name.split("/")
        return (
            parts[-1] == "count"
            or "hyperparams" in parts
            or any(p in fields and "/".join(parts[i + 1 :]) in paths for i, p in enumerate(parts))
        )

    return flat_parameters(checkpoint.restore_optimizer(root, keep, step))


def find(flat: dict, path: str, described: dict) -> Moments:
    """Finds the second moments of one parameter.

    Args:
        flat: the state's leaves by path name, from `load`.
        path: path name of the parameter.
        described: the optimizer's constants in the checkpoint's description. If the parts of a
            partition differ, a dict under a part's label holds the constants of that part.

    Raises:
        SecondMomentError: the state has no second moments of the parameter, or several; the
            message lists those that it has.
    """
    marks = [f"{mark}/{path}" for mark in _MARKS]
    states = {
        name[: -len(mark)]: name
        for name in flat
        for mark in marks
        if name == mark or name.endswith("/" + mark)
    }
    # A module may also be called "nu": a match inside another match is a parameter, not a state.
    states = {
        prefix: name
        for prefix, name in states.items()
        if not any(prefix != outer and prefix.startswith(outer) for outer in states)
    }
    if len(states) > 1:
        raise SecondMomentError(
            f"the optimizer's state has second moments of {path} more than once: "
            f"{', '.join(states.values())}"
        )
    if not states:
        raise SecondMomentError(_missing(flat, path))
    (prefix,) = states
    return Moments(
        path,
        prefix,
        {f: x for f in (*_FIELDS, "mu") if (x := flat.get(f"{prefix}{f}/{path}", ...)) is not ...},
        frozenset(n[len(prefix) :].split("/")[0] for n in flat if n.startswith(prefix)),
        flat.get(f"{prefix}count"),
        _constants(flat, prefix, described),
    )


def _missing(flat: dict, path: str) -> str:
    of_it = [n for n in flat if n == path or n.endswith("/" + path)]
    elsewhere = [n for n in flat if any(f"/{mark}/" in f"/{n}" for mark in _MARKS)]
    more = f" and {len(elsewhere) - 6} more" if len(elsewhere) > 6 else ""
    return (
        f"the optimizer's state has no second moments of {path}; of that parameter it has "
        f"{', '.join(of_it) or 'nothing'}; under the names {' and '.join(_MARKS)} it has "
        f"{', '.join(elsewhere[:6]) or 'nothing'}{more}"
    )


def _constants(flat: dict, prefix: str, described: dict) -> dict:
    constants = {k: v for k, v in described.items() if not isinstance(v, dict)}
    parts = prefix.split("/")
    for part in parts:
        if isinstance(described.get(part), dict):
            constants |= described[part]
    # `inject_hyperparams` stores the constants of the last update, so these win over the
    # description's; of several, the innermost applies to this state.
    for i in range(len(parts)):
        inject = "".join(f"{p}/" for p in parts[:i]) + "hyperparams/"
        constants |= {k: flat[inject + k] for k in _CONSTANTS if inject + k in flat}
    return constants


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

    Adam(W), NAdam(W) and Yogi use Adam's rule (`adam`). AMSGrad divides by the maximum of
    the bias-corrected moments (Reddi et al. 2018; optax corrects before it takes the maximum),
    RMSProp by √(ν + eps), or by √ν + eps if `eps_in_sqrt` is false.

    Returns:
        float32, in the parameter's shape.

    Raises:
        SecondMomentError: the optimizer's rule is not supported, constants are missing, or the
            state does not belong to the optimizer that the description names.
    """
    constants = moments.constants
    name, count = constants.get("name"), moments.count
    needed = {"rmsprop": {"name", "eps"} | ({"decay"} if count is not None else set())}
    missing = needed.get(name, {"name", "b2", "eps"}) - constants.keys()
    if name is None or (name in _STATES and missing):
        raise SecondMomentError(
            f"the checkpoint's description lacks optimizer.{' and '.join(sorted(missing))}, which "
            f"the correction of {moments.path} needs"
        )
    if name not in _STATES:
        why = _NOT_SECOND_MOMENTS.get(name, "how it divides by ν is not known here")
        raise SecondMomentError(
            f"{moments.path} was trained with {name!r}: {why}; known are {', '.join(_STATES)} and "
            "adafactor"
        )
    if moments.siblings not in _STATES[name]:
        raise SecondMomentError(
            f"the description says that {moments.path} was trained with {name!r}, whose state has "
            f"{_listed(_STATES[name][0])}; the state at {moments.prefix!r} has "
            f"{_listed(moments.siblings)}"
        )
    nu, eps, eps_root = moments.fields["nu"], constants["eps"], constants.get("eps_root", 0.0)
    if name == "amsgrad":
        return adam(moments.fields["nu_max"], 1, 0.0, eps, eps_root)
    if name == "rmsprop":
        within, after = (eps, 0.0) if constants.get("eps_in_sqrt", True) else (0.0, eps)
        decay, count = (0.0, 1) if count is None else (constants["decay"], count)
        return adam(nu, count, decay, after, within)
    return adam(nu, count, constants["b2"], eps, eps_root)


def _listed(names) -> str:
    return ", ".join(sorted(names))
