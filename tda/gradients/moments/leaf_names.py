"""Reads the path name of an optimizer's leaf: its parameter, and the label of its part."""

import itertools

# The field in which `optax.partition` keeps the states of its parts, by label.
_PARTS = "inner_states"


def labels(prefix: str) -> list[str]:
    """Returns the components of a state's prefix that may be a part's label, outer ones first.

    Below `inner_states` that is the next component alone: what follows may be the index of a chain,
    and a label may be a number too. Where no component is `inner_states`, all of them may be.
    """
    parts = prefix.split("/")[:-1]
    return [label for field, label in itertools.pairwise(parts) if field == _PARTS] or parts


def parameter_paths(tail: str, anywhere: bool = False) -> set[str]:
    """Returns the parameter paths that a leaf's name may stand for.

    nnx saves an array under its variable's name and `value`, Linen all parameters under `params`.

    Args:
        tail: the name after the state's field.
        anywhere: whether the tail may begin anywhere in the name.
    """
    parts = tail.split("/")
    ends = [parts, parts[:-1]] if parts[-1] == "value" and len(parts) > 1 else [parts]
    if anywhere:
        return {"/".join(end[i:]) for end in ends for i in range(len(end))}
    starts = [0, 1] if parts[0] == "params" else [0]
    return {"/".join(end[i:]) for end in ends for i in starts}
