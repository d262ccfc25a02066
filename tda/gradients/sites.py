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
import warnings
from typing import Literal

import jax.numpy as jnp
import numpy as np
from flax import nnx

from tda.gradients import layers
from tda.model import functional
from tda.runtime import progress
from tda.runtime.differences import shorten
from tda.runtime.patterns import compile_pattern

# A stack's layers are numbered after the first of these in the path, else after its first part;
# within a layer that has a number, in what follows that.
_LAYERS = re.compile(r"(.*_)?(layers?|blocks?|stack|h)")

_GROUPS = {
    "attention": re.compile(r"attn|attention"),
    "mlp": re.compile(r"mlp|ffn|ffw|feed_?forward"),
    "head": re.compile(r"unembed|lm_head|(^|/)(head|output)(/|$)"),
    "embedding": re.compile(r"embed|(^|/)w[tp]e(/|$)"),
}

# How many of the parameters without gradients `coverage` names.
_NAMED = 8


@dataclasses.dataclass(frozen=True)
class Site:
    """A weight matrix, or a stack of them.

    Attributes:
        module: path of the module, such as ("layers", "attention", "query").
        parameter: name of the parameter in it, such as "kernel".
        rows, columns: M and N of one matrix. A vector is a matrix of one row.
        stack: number of stacked layers, or None.
        shape: the parameter's shape, the stack's axis first; None: [(L,) M, N].
        order: the axes of one layer's parameter, rows' before columns'; None: already in order.
        tapped: whether a tap gives the gradient; otherwise each example's full gradient is formed.
        group: "attention", "mlp", "embedding", "head" or "other"; None: decided by the path.
        by_reference: whether the full gradient may be formed if the tap turns out to miss a part
            of it (`tda.gradients.unseen`); otherwise that is an error.
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
            object.__setattr__(self, "shape", (*self.stack_shape, self.rows, self.columns))
        if self.group is None:
            object.__setattr__(self, "group", group_of(self.names()[0]))

    @property
    def stack_shape(self) -> tuple[int, ...]:
        """The leading shape of the site's arrays: (L,) of a stack, else ()."""
        return () if self.stack is None else (self.stack,)

    @property
    def path(self) -> str:
        """The parameter's path name in the tree of parameters."""
        return "/".join(map(str, (*self.module, self.parameter)))

    def names(self) -> list[str]:
        """Returns the name of the matrix, or of each matrix in the stack."""
        return _names(self.module, self.parameter, self.stack)

    def matrix(self, x):
        """Returns an array of the parameter's shape as a matrix or a stack of them: [(L,) M, N]."""
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
    """Returns the sites of `model`, sorted by path.

    Args:
        model: any NNX model.
        include: a regular expression to search for in a parameter's path name; by default all
            matrices of layers, without embeddings, the output head, norms and biases.
        exclude: a regular expression for parameters to exclude.
        untapped: treatment of matching parameters that cannot have a tap (norms, biases, layers of
            unknown classes, parameters that several layers share): "leave" them out (`left_out`
            names them), use the "reference" path (each example's full gradient is formed), or
            raise an "error". With "reference", that path also serves a matching parameter whose
            tap turns out to miss a part of the gradient; otherwise that is an error (`unseen`).

    Raises:
        ValueError: no parameter matches, none matches `exclude`, one of the two is not a regular
            expression, untapped="error" and a parameter cannot have a tap, or the model is in
            training mode.
    """
    training = [
        f"{'/'.join(map(str, path)) or 'the model'} ({type(module).__name__})"
        for path, module in nnx.iter_modules(model)
        if layers.is_training(module)
    ]
    if training:
        raise ValueError(
            f"{', '.join(training)}: in training mode, where an example's loss depends on chance "
            "or on the other examples of its batch; call model.eval() first"
        )
    if untapped not in ("leave", "reference", "error"):
        raise ValueError(f"untapped is {untapped!r}; use leave, reference or error")
    for name, pattern in (("include", include), ("exclude", exclude)):
        compile_pattern(name, pattern or "")
    everything = _sites(model)
    if exclude and not any(re.search(exclude, s.path) for s in everything):
        listed = ", ".join(s.path for s in everything)
        raise ValueError(
            f"exclude={exclude!r} has no effect: no parameter matches it; leave it out, or choose "
            f"from {listed}"
        )
    sites = [s for s in everything if _selected(s, include, exclude)]
    without = [s.path for s in sites if not s.tapped]
    if untapped == "error" and without:
        raise ValueError(
            f"no tap can be put on {', '.join(without)}; exclude them, or pass "
            "untapped='reference' to form their full gradients"
        )
    if untapped == "reference":
        sites = [dataclasses.replace(s, by_reference=True) for s in sites]
    else:
        sites = [s for s in sites if s.tapped]
    _check_dtypes(model, sites)
    if not sites:
        listed = ", ".join(s.path + ("" if s.tapped else " (no tap)") for s in everything)
        raise ValueError(
            f"no weight matrix matches include={include!r}, exclude={exclude!r}; "
            f"the model has {listed or 'none'}"
        )
    return sorted(sites, key=lambda s: s.path)


def _check_dtypes(model: nnx.Module, sites: list[Site]) -> None:
    """Checks that sites are of real numbers; others have no gradient, or one of complex numbers."""
    arrays = functional.flat_parameters(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    dtypes = {s.path: jnp.result_type(arrays[s.path]) for s in sites}
    wrong = [f"{path} ({x})" for path, x in dtypes.items() if not jnp.issubdtype(x, jnp.floating)]
    if wrong:
        raise ValueError(
            f"gradients are of floating-point parameters, not of {', '.join(wrong)}; use exclude= "
            "to leave out what is named"
        )


def _selected(site: Site, include: str | None, exclude: str | None) -> bool:
    if exclude and re.search(exclude, site.path):
        return False
    if include:
        return re.search(include, site.path) is not None
    return site.group not in ("embedding", "head") and site.rows > 1


def _sites(model: nnx.Module) -> list[Site]:
    """Returns a site for every parameter of the model."""
    modules = {tuple(path): m for path, m in nnx.iter_modules(model)}
    # A tap on one of the layers that share a parameter would miss the gradient from the others.
    shared = {tuple(p) for paths in nnx.find_duplicates(model, only=nnx.Param) for p in paths}
    all_sites = []
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        *module, parameter = path
        # A scalar may be a number of Python's.
        shape, alone = np.shape(variable.get_value()), tuple(path) not in shared
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
    layer_shape = shape if stack is None else shape[1:]
    product = None if holder is None else layers.product(holder)
    above = (modules.get(module[:i]) for i in range(len(module)))
    tapped = alone and not any(map(layers.changes_parameters, above))
    if product is not None and product.parameter == parameter and len(layer_shape) == product.ndim:
        order = (*product.rows, *product.columns)
        rows = math.prod(layer_shape[i] for i in product.rows)
        columns = math.prod(layer_shape[i] for i in product.columns)
        changed_order = None if order == tuple(range(len(order))) else order
        return Site(module, parameter, rows, columns, stack, shape, changed_order, tapped, group)
    columns = layer_shape[-1] if layer_shape else 1
    rows = math.prod(layer_shape[:-1])
    return Site(module, parameter, rows, columns, stack, shape, None, False, group)


def _group(module: tuple, parameter: str, stack: int | None, modules: dict) -> str:
    """Returns the group by the path name, or else by the classes of the modules on the path."""
    name = _names(module, parameter, stack)[0]
    group = group_of(name)
    if group == "other" and layers.table(type(modules.get(module))) is not None:
        # Inside a numbered layer the name alone is not enough: the class must be a table too.
        group = "embedding" if _GROUPS["embedding"].search(name.lower()) else group
    for i in range(len(module), 0, -1):
        if group != "other":
            break
        # The class's name (MultiHeadAttention, FeedForward) may tell more than the attribute's.
        by_class = group_of(type(modules.get(module[:i])).__name__)
        group = by_class if by_class in ("attention", "mlp") else group
    return group


def left_out(model: nnx.Module, sites: list[Site]) -> dict[str, int]:
    """Returns the size of each parameter that the sites do not cover, by path name."""
    covered = {s.path for s in sites}
    return {s.path: math.prod(s.shape) for s in _sites(model) if s.path not in covered}


def coverage(model: nnx.Module, sites: list[Site]) -> str:
    """Returns a line with the share of the parameters that gradients cover and those left out."""
    covered, out = sum(math.prod(s.shape) for s in sites), left_out(model, sites)
    total = covered + sum(out.values())
    return (
        f"gradients of {covered:,} of {total:,} parameters ({covered / total:.0%}); "
        f"left out: {shorten(list(out), _NAMED) or 'none'}"
    )


def has_numbered_layers(model: nnx.Module) -> bool:
    """Returns whether the path of any parameter has a layer's number."""
    return any(layer_of(name) is not None for site in _sites(model) for name in site.names())


def tell_coverage(model: nnx.Module, sites: list[Site], is_default: bool = True) -> None:
    """Prints what share of the parameters the gradients cover, and warns below a half.

    Args:
        model: the model.
        sites: the sites whose gradients are taken.
        is_default: whether the caller selected no sites; there is no warning otherwise.
    """
    described = coverage(model, sites)
    progress.tell(described)
    covered = sum(math.prod(s.shape) for s in sites)
    if is_default and covered < sum(left_out(model, sites).values()):
        warnings.warn(
            f"{described}. That is less than half: include='.' takes embeddings and the head too, "
            "and with untapped='reference' all other parameters; tda.gradients.left_out(model) "
            "names all that is left out",
            stacklevel=3,
        )


def group_of(name: str) -> str:
    """Returns the group of a matrix by its name; "other" if no group fits.

    A name inside a numbered layer never means the model's head or embedding (each of BERT's layers
    has an `output`), but the name of the list of layers may: `lm_head/0/kernel` is a head.
    """
    name = name.lower()
    parts = name.split("/")
    # Only numbers behind a name for layers count: in a model of numbered stages, the last stage
    # holds the head.
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
    at = _index_of_number(parts)
    return ["/".join((*parts[:at], str(i), *parts[at:])) for i in range(stack)]


def _index_of_number(parts: list[str]) -> int:
    """Returns the place of a stacked layer's number in a path."""
    named = (i for i, p in enumerate(parts) if _LAYERS.fullmatch(p))
    at = next(named, 0) + 1
    if at == len(parts) or not parts[at].isdigit():
        return at
    # The stack is inside a layer that has a number already, as its experts are.
    inside = parts[at + 1 :]
    return at + 1 + min(_index_of_number(inside), len(inside) - 1)


def module_at(tree: dict, site: Site) -> dict:
    """Returns the part of a nested dict of variables that belongs to a site's module."""
    return functools.reduce(operator.getitem, site.module, tree)


def layer_of(name: str) -> int | None:
    """Returns the layer's number in a matrix's name: the first component that is a number."""
    return next((int(part) for part in name.split("/") if part.isdigit()), None)
