"""Where a model's weight matrices are: one site per linear layer or embedding module.

A module whose parameter has one axis more than the layer's own is a stack of layers (scanned). Its
layers get the names that a list of layers would give them: `layers/attention/query/kernel` of layer
3 is `layers/3/attention/query/kernel`. So a scanned model and an unrolled one agree by name.
"""

import dataclasses
import re

from flax import nnx

_OWN_NDIM = {nnx.Linear: ("kernel", 2), nnx.Embed: ("embedding", 2)}

# A stack's layers are numbered after the first of these in the path, else after its first part.
_LAYERS = re.compile(r"(.*_)?(layers?|blocks?|stack|h)")

_GROUPS = {
    "attention": re.compile(r"attn|attention"),
    "mlp": re.compile(r"mlp|ffn|feed_?forward"),
    "head": re.compile(r"unembed|lm_head|(^|/)(head|output)(/|$)"),
    "embedding": re.compile(r"embed"),
}


@dataclasses.dataclass(frozen=True)
class Site:
    """A weight matrix, or a stack of them, that the model multiplies by.

    Attributes:
        module: path of the module, such as ("layers", "attention", "query").
        parameter: name of the parameter in it: "kernel" or "embedding".
        rows, columns: M and N of one matrix.
        stack: number of stacked layers, or None.
    """

    module: tuple
    parameter: str
    rows: int
    columns: int
    stack: int | None

    @property
    def path(self) -> str:
        """Path name of the parameter in the tree of parameters."""
        return "/".join(map(str, (*self.module, self.parameter)))

    def names(self) -> list[str]:
        """The name of each layer's matrix: one, or one for each stacked layer."""
        if self.stack is None:
            return [self.path]
        parts = [str(p) for p in (*self.module, self.parameter)]
        named = (i for i, p in enumerate(parts) if _LAYERS.fullmatch(p))
        at = next(named, 0) + 1
        return ["/".join((*parts[:at], str(i), *parts[at:])) for i in range(self.stack)]


def find(model: nnx.Module, include: str | None = None, exclude: str | None = None) -> list[Site]:
    """The sites of `model`, sorted by path.

    Args:
        model: any NNX model.
        include: a regular expression that a parameter's path name must match (searched); by default
            every matrix but embeddings, the output head and norms.
        exclude: one that it must not match.

    Raises:
        ValueError: no matrix matches.
    """
    found = []
    for path, module in nnx.iter_modules(model):
        for kind, (parameter, ndim) in _OWN_NDIM.items():
            if isinstance(module, kind):
                shape = getattr(module, parameter).shape
                stack = shape[0] if len(shape) == ndim + 1 else None
                found.append(Site(tuple(path), parameter, *shape[-2:], stack))
    chosen = [
        s
        for s in found
        if (re.search(include, s.path) if include else group_of(s.path) in ("attention", "mlp"))
        and not (exclude and re.search(exclude, s.path))
    ]
    if not chosen:
        raise ValueError(
            f"no weight matrix matches include={include!r}, exclude={exclude!r}; "
            f"the model has {', '.join(s.path for s in found) or 'none'}"
        )
    return sorted(chosen, key=lambda s: s.path)


def left_out(model: nnx.Module, chosen: list[Site]) -> dict[str, int]:
    """Sizes of the parameters whose gradients the chosen sites do not cover, by path name."""
    covered = {s.path for s in chosen}
    sizes = {
        "/".join(map(str, path)): variable[...].size
        for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))
    }
    return {path: size for path, size in sizes.items() if path not in covered}


def group_of(path: str) -> str:
    """The kind of layer that a parameter belongs to, by its path name; "other" if none fits."""
    for group, pattern in _GROUPS.items():
        if pattern.search(path.lower()):
            return group
    return "other"


def layer_of(name: str) -> int | None:
    """The layer's number in a matrix's name: its first component that is a number."""
    return next((int(part) for part in name.split("/") if part.isdigit()), None)
