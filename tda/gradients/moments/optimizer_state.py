"""Where an optimizer's state keeps a parameter's second moments, and how the optimizer uses them.

States may be nested in any way (`optax.chain`, `masked`, `partition`, `inject_hyperparams`,
`MultiSteps`): a state of one transformation is recognised by its fields, whatever it lies in. No
index, order or shape decides what belongs to which parameter.

optax calls "nu" what many optimizers divide by, in different ways, so their rule goes by the name
of the optimizer in the checkpoint's description, and the state must have that optimizer's fields.
"""

import dataclasses

import jax
import jax.numpy as jnp

from tda.model.functional import flat_parameters
from tda.training import checkpoint

# What a state may keep of each parameter, as optax's transformations name it.
_FIELDS = ("nu", "nu_max", "v_row", "v_col", "v")
# Fields that mark a state of second moments; the others lie beside one of them.
_MARKS = ("nu", "v_row")
_CONSTANTS = ("b1", "b2", "eps", "eps_root", "decay")

# The fields of the states that the rules below know, by the optimizer's name.
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
    """What the state of one transformation holds of one parameter.

    Attributes:
        path: path name of the parameter.
        prefix: path name of the state, with "/" at its end unless it is empty.
        fields: the parameter's leaves by field, of "nu", "nu_max", "v_row", "v_col", "v", "mu", as
            far as they were loaded.
        siblings: the names of all fields of the state.
        count: steps taken, the state's own; None where it keeps none.
        constants: "name", "b2", "eps" and so on, for this very state.
    """

    path: str
    prefix: str
    fields: dict[str, jax.Array]
    siblings: frozenset[str]
    count: jax.Array | None
    constants: dict


def load(root, paths: set[str], step: int | None = None, fields=_FIELDS) -> dict:
    """The leaves of a checkpoint's optimizer state by path name; `...` for those not needed here.

    Args:
        root: the directory of checkpoints.
        paths: of the parameters whose moments are wanted.
        step: None for the last checkpoint.
        fields: what is wanted of each; by default all second moments.

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
    """The second moments of one parameter.

    Args:
        flat: the state's leaves by path name (`load`).
        path: of the parameter.
        described: the optimizer's constants as the checkpoint's description has them. Where parts
            of a partition differ, a dict under a part's label holds that part's.

    Raises:
        SecondMomentError: there are none, or more than one; the message lists what there is.
    """
    marks = [f"{mark}/{path}" for mark in _MARKS]
    states = {
        name[: -len(mark)]: name
        for name in flat
        for mark in marks
        if name == mark or name.endswith("/" + mark)
    }
    # A module may be called "nu" too: what lies inside of a state that was found is no state.
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
    # What `inject_hyperparams` keeps is what the last update used; the innermost is the state's.
    for i in range(len(parts)):
        inject = "".join(f"{p}/" for p in parts[:i]) + "hyperparams/"
        constants |= {k: flat[inject + k] for k in _CONSTANTS if inject + k in flat}
    return constants


def adam(nu, count, b2, eps, eps_root=0.0) -> jax.Array:
    """1 / (√(ν / (1 − b2ᵗ) + eps_root) + eps) in float32: Kingma & Ba 2015, algorithm 1."""
    nu_hat = jnp.asarray(nu, jnp.float32) / (1.0 - b2 ** jnp.asarray(count, jnp.float32))
    return 1.0 / (jnp.sqrt(nu_hat + eps_root) + eps)


def exact(moments: Moments) -> jax.Array:
    """What the optimizer itself multiplies every weight's gradient by.

    Adam's rule (`adam`) is that of Adam(W), NAdam(W) and Yogi. AMSGrad divides by the maximum of
    the bias-corrected moments (Reddi et al. 2018; optax corrects before it takes the maximum),
    RMSProp by √(ν + eps), or by √ν + eps if `eps_in_sqrt` is false.

    Returns:
        float32, in the parameter's shape.

    Raises:
        SecondMomentError: an optimizer of other rules, constants that are lacking, or a state that
            is not of the optimizer that the description names.
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
