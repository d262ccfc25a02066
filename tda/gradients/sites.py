"""Where a model's weights are: one site per parameter that the encoder takes gradients of.

A parameter with one axis more than its layer's own is a stack of layers (scanned). Its layers get
the names that a list of layers would give them: `layers/attention/query/kernel` of layer 3 is
`layers/3/attention/query/kernel`. So a scanned model and an unrolled one agree by name.
"""

import dataclasses
import functools
import math
import operator
import re
from typing import Literal

from flax import nnx

from tda.gradients import layers

# A stack's layers are numbered after the first of these in the path, else after its first part.
_LAYERS = re.compile(r"(.*_)?(layers?|blocks?|stack|h)")

_GROUPS = {
    "attention": re.compile(r"attn|attention"),
    "mlp": re.compile(r"mlp|ffn|ffw|feed_?forward"),
    "head": re.compile(r"unembed|lm_head|(^|/)(head|output)(/|$)"),
    "embedding": re.compile(r"embed|(^|/)w[tp]e(/|$)"),
}

# Parameters without gradients that `coverage` names.
_NAMED = 8


@dataclasses.dataclass(frozen=True)
class Site:
    """A weight matrix, or a stack of them.

    Attributes:
        module: path of the module, such as ("layers", "attention", "query").
        parameter: name of the parameter in it, such as "kernel".
        rows, columns: M and N of one matrix. A vector is a matrix of one row.
        stack: number of stacked layers, or None.
        shape: of the parameter, the stack's axis first; None: [(L,) M, N].
        order: the parameter's own axes, those of the rows before those of the columns; None: as is.
        tapped: whether a tap gives its gradient; otherwise it is formed whole for every example.
        group: "attention", "mlp", "embedding", "head" or "other"; None: by the path.
        by_reference: whether the full gradient may be formed where the tap turns out to miss a part
            of it (`tda.gradients.unseen`); else that is an error.
    """

    module: tuple
    parameter: str
    rows: int
    columns: int
    stack: int | None = None
    shape: tuple[int, ...] | None = None
    order: tuple[int, ...] | None = None
    tapped: bool = True
    group: str | None = None
    by_reference: bool = dataclasses.field(default=False, compare=False)

    def __post_init__(self):
        if self.shape is None:
            stack = () if self.stack is None else (self.stack,)
            object.__setattr__(self, "shape", (*stack, self.rows, self.columns))
        if self.group is None:
            object.__setattr__(self, "group", group_of(self.names()[0]))

    @property
    def path(self) -> str:
        """Path name of the parameter in the tree of parameters."""
        return "/".join(map(str, (*self.module, self.parameter)))

    def names(self) -> list[str]:
        """The name of each layer's matrix: one, or one for each stacked layer."""
        return _names(self.module, self.parameter, self.stack)

    def matrix(self, x):
        """An array of the parameter's shape as a matrix or a stack of them: [(L,) M, N]."""
        first = 0 if self.stack is None else 1
        if self.order is not None:
            x = x.transpose(*range(first), *(first + i for i in self.order))
        return x.reshape(*x.shape[:first], self.rows, self.columns)


def find_sites(
    model: nnx.Module,
    include: str | None = None,
    exclude: str | None = None,
    untapped: Literal["leave", "reference", "error"] = "leave",
) -> list[Site]:
    """The sites of `model`, sorted by path.

    Args:
        model: any NNX model.
        include: a regular expression that a parameter's path name must match (searched); by default
            every matrix of a layer, which leaves out embeddings, the output head, norms and biases.
        exclude: one that it must not match.
        untapped: what becomes of parameters that match and that no tap can be put on (norms,
            biases, layers of unknown classes, parameters that several layers share): "leave" them
            out (`left_out` names them), take them by the "reference" path (each example's whole
            gradient is formed), or "error". With "reference" that path is open to all that match,
            where a tap turns out to miss a part of the gradient; else that is an error (`unseen`).

    Raises:
        ValueError: nothing matches, or, with untapped="error", something cannot be tapped.
    """
    if untapped not in ("leave", "reference", "error"):
        raise ValueError(f"untapped is {untapped!r}; use leave, reference or error")
    everything = _sites(model)
    chosen = [s for s in everything if _selected(s, include, exclude)]
    without = [s.path for s in chosen if not s.tapped]
    if untapped == "error" and without:
        raise ValueError(
            f"no tap can be put on {', '.join(without)}; exclude them, or take them with "
            "untapped='reference'"
        )
    if untapped == "reference":
        chosen = [dataclasses.replace(s, by_reference=True) for s in chosen]
    else:
        chosen = [s for s in chosen if s.tapped]
    if not chosen:
        listed = ", ".join(s.path + ("" if s.tapped else " (no tap)") for s in everything)
        raise ValueError(
            f"no weight matrix matches include={include!r}, exclude={exclude!r}; "
            f"the model has {listed or 'none'}"
        )
    return sorted(chosen, key=lambda s: s.path)


def _selected(site: Site, include: str | None, exclude: str | None) -> bool:
    if exclude and re.search(exclude, site.path):
        return False
    if include:
        return re.search(include, site.path) is not None
    return site.group not in ("embedding", "head") and site.rows > 1


def _sites(model: nnx.Module) -> list[Site]:
    """A site for every parameter of the model."""
    modules = {tuple(path): m for path, m in nnx.iter_modules(model)}
    # A tap at one of its layers would miss what the others do with it.
    shared = {tuple(p) for paths in nnx.find_duplicates(model, only=nnx.Param) for p in paths}
    all_sites = []
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        *module, parameter = path
        shape, alone = tuple(variable.shape), tuple(path) not in shared
        all_sites.append(_site(tuple(module), parameter, shape, modules, alone))
    return all_sites


def _site(
    module: tuple, parameter: str, shape: tuple[int, ...], modules: dict, alone: bool
) -> Site:
    holder = modules.get(module)
    layer_ndim = None if holder is None else layers.own_ndim(holder, parameter)
    stacked = layer_ndim is not None and len(shape) == layer_ndim + 1
    stack = shape[0] if stacked else None
    group = _group(module, parameter, stack, modules)
    one = shape if stack is None else shape[1:]
    product = None if holder is None else layers.product(holder)
    above = (modules.get(module[:i]) for i in range(len(module)))
    tapped = alone and not any(map(layers.changes_parameters, above))
    if product is not None and product.parameter == parameter and len(one) == product.ndim:
        order = (*product.rows, *product.columns)
        rows = math.prod(one[i] for i in product.rows)
        columns = math.prod(one[i] for i in product.columns)
        turned = None if order == tuple(range(len(order))) else order
        return Site(module, parameter, rows, columns, stack, shape, turned, tapped, group)
    columns = one[-1] if one else 1
    rows = math.prod(one[:-1])
    return Site(module, parameter, rows, columns, stack, shape, None, False, group)


def _group(module: tuple, parameter: str, stack: int | None, modules: dict) -> str:
    """The group by the path's name, else by the classes of the modules on the way to it."""
    name = _names(module, parameter, stack)[0]
    group = group_of(name)
    if group == "other" and layers.table(type(modules.get(module))) is not None:
        # A table in a layer is called one by its class, not by its name alone.
        group = "embedding" if _GROUPS["embedding"].search(name.lower()) else group
    for i in range(len(module), 0, -1):
        if group != "other":
            break
        # MultiHeadAttention, FeedForward: the class says what the attribute's name does not.
        by_class = group_of(type(modules.get(module[:i])).__name__)
        group = by_class if by_class in ("attention", "mlp") else group
    return group


def left_out(model: nnx.Module, chosen: list[Site]) -> dict[str, int]:
    """Sizes of the parameters whose gradients the chosen sites do not cover, by path name."""
    covered = {s.path for s in chosen}
    return {s.path: math.prod(s.shape) for s in _sites(model) if s.path not in covered}


def coverage(model: nnx.Module, chosen: list[Site]) -> str:
    """In a line: how much of the model gradients are taken of, and what is left out."""
    covered, out = sum(math.prod(s.shape) for s in chosen), left_out(model, chosen)
    total = covered + sum(out.values())
    named = ", ".join(list(out)[:_NAMED]) or "none"
    more = f" and {len(out) - _NAMED} more" if len(out) > _NAMED else ""
    return (
        f"gradients of {covered:,} of {total:,} parameters ({covered / total:.0%}); "
        f"left out: {named}{more}"
    )


def group_of(name: str) -> str:
    """The kind of layer that a matrix belongs to, by its name; "other" if none fits.

    In a numbered layer nothing is called the model's head or embedding (BERT's layers each have an
    `output`), but for the list of them itself: `lm_head/0/kernel` is a head.
    """
    name = name.lower()
    parts = name.split("/")
    # Only a list of layers has layers: a model in stages has its head in the last.
    number = next(
        (i for i, p in enumerate(parts) if i and p.isdigit() and _LAYERS.fullmatch(parts[i - 1])),
        None,
    )
    ends = name if number is None else parts[number - 1]
    for group, pattern in _GROUPS.items():
        if pattern.search(ends if group in ("head", "embedding") else name):
            return group
    return "other"


def _names(module: tuple, parameter: str, stack: int | None) -> list[str]:
    parts = [str(p) for p in (*module, parameter)]
    if stack is None:
        return ["/".join(parts)]
    named = (i for i, p in enumerate(parts) if _LAYERS.fullmatch(p))
    at = next(named, 0) + 1
    return ["/".join((*parts[:at], str(i), *parts[at:])) for i in range(stack)]


def module_at(tree: dict, site: Site) -> dict:
    """What a nested dict of variables holds of a site's module."""
    return functools.reduce(operator.getitem, site.module, tree)


def layer_of(name: str) -> int | None:
    """The layer's number in a matrix's name: its first component that is a number."""
    return next((int(part) for part in name.split("/") if part.isdigit()), None)
