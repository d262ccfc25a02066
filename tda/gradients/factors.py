"""The factors of examples' gradients: each layer's inputs x, and its outputs' gradients δ.

The gradient of a layer y = x W is G = Σ_t x_t δ_tᵀ. T·(M + N) numbers hold it exactly, where the
M × N of G itself are many more; `tda.gradients.pair_products` takes inner products from them. A
table that looks up rows has their numbers instead of x (`tda.gradients.outer_products`).
One backward pass gives the factors of all layers and examples, as it gives a tap's projections.
"""

import contextvars
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from tda import loss as losses
from tda.gradients import encoder as encoders
from tda.gradients import layers, taps, unseen
from tda.gradients import projection as projections
from tda.gradients.batch_mates import is_local
from tda.gradients.first_batch import TapsCheck
from tda.gradients.outer_products import Factors, Terms, einsum, multiply
from tda.gradients.sites import Site, module_at
from tda.model import functional
from tda.model.decoder import is_as_built
from tda.runtime import sharding


class GradientFactors:
    """Computes the factors of a batch's gradients, by path; compiled once for each shape.

    Args:
        model: any NNX model.
        sites: the matrices and tables, which must have taps.
        output: as in `tda.gradients.encoder.make_encoder`.
        mesh: devices that the parameters are laid out on; None leaves them where they are.

    Raises:
        ValueError: a site has no tap; with a batch, the factors do not give the gradient (a layer
            that is called twice, a parameter that no tap sees).

    Attributes:
        sites: the sites.
        tables: the paths of those that hold a table.
    """

    def __init__(
        self,
        model: nnx.Module,
        sites: Sequence[Site],
        output: str | Callable = "loss",
        mesh: jax.sharding.Mesh | None = None,
    ):
        check_sites(sites)
        self.sites = tuple(sites)
        watched = nnx.clone(model)
        modules = dict(nnx.iter_modules(watched))
        tables = {s.path: layers.table(type(modules[s.module])) for s in sites}
        tables = {path: table for path, table in tables.items() if table is not None}
        self.tables = frozenset(tables)
        for site in sites:
            self._watch(modules[site.module], site)
        self._graphdef, *states = nnx.split(watched, taps.Zeros, ...)
        self._templates, variables = map(nnx.to_pure_dict, states)
        if mesh is not None:
            variables = functional.place(variables, functional.logical_axes(states[1]), mesh)
        is_head = any(s.group == "head" for s in sites) or any(t.attend for t in tables.values())
        self._total = _make_total(output, is_head)
        self._search = unseen.make_search(model, list(sites))
        self._compiled, self._variables = jax.jit(self._factors), variables
        # The decoder calls each layer once, and so its factors are known to be right.
        is_known = isinstance(output, str) and is_as_built(model)
        self._check = None if is_known else _Check(model, sites, losses.of_examples(output))

    def _uses(self, site: Site) -> tuple[str, ...]:
        return ("look_up", "attend") if site.path in self.tables else ("product",)

    def _watch(self, module: nnx.Module, site: Site) -> None:
        """Wraps the calls of a site's layer, so that zeros beside it take its factors."""
        layers.wrap_calls(module, _watch_call)
        empty = jnp.zeros((*site.stack_shape, 1))
        module.tda_factors = nnx.Dict(
            {
                use: nnx.Dict(inputs=taps.Zeros(empty), deltas=taps.Zeros(empty))
                for use in self._uses(site)
            }
        )
        module.tda_path = site.path

    def _factors(self, variables: dict, batch) -> dict[str, Terms]:
        """Returns a batch's factors: the cotangents of zeros of the factors' shapes."""
        unseen.refuse(self._search(self._total, batch))

        def total_with(zeros: dict) -> jax.Array:
            return self._total(nnx.merge(self._graphdef, zeros, variables), batch)

        shapes = self._shapes(total_with, unseen.count_examples(batch))
        zeros = jax.tree.map(lambda x: x, self._templates)
        for site in self.sites:
            for use in self._uses(site):
                # A table that is looked up alone has no factors of its other use.
                if (site.path, use) in shapes:
                    leaves = module_at(zeros, site)["tda_factors"][use]
                    for name, shape in zip(Factors._fields, shapes[site.path, use], strict=True):
                        leaves[name] = jnp.zeros((*site.stack_shape, *shape), jnp.float32)
        cotangents = jax.grad(total_with)(zeros)
        return {
            s.path: tuple(
                _term(s, use, **module_at(cotangents, s)["tda_factors"][use])
                for use in self._uses(s)
                if (s.path, use) in shapes
            )
            for s in self.sites
        }

    def _shapes(self, total_with: Callable, examples: int) -> dict[tuple[str, str], tuple]:
        """Returns the shapes of the factors by path and use, from a trace of the loss."""
        token = _SHAPES.set({})
        try:
            jax.eval_shape(total_with, self._templates)
            shapes = _SHAPES.get()
        finally:
            _SHAPES.reset(token)
        for site in self.sites:
            first, *others = self._uses(site)
            if not any((site.path, use) in shapes for use in (first, *others)):
                # A layer that is not called has a gradient of zeros.
                rows = 1 if site.path in self.tables else site.rows
                shapes[site.path, first] = (examples, 1, rows), (examples, 1, site.columns)
        return shapes

    def shapes(self, batch) -> dict[str, Terms]:
        """Returns the shapes of a batch's factors; the batch may have shapes alone."""
        return jax.eval_shape(self._compiled, self._variables, batch)

    def __call__(self, batch) -> dict[str, Terms]:
        """Returns the factors of every site by path: one pair, or two of a tied table.

        Args:
            batch: a tree of arrays, the examples first; {"tokens", "targets", "weights"} for an
                output that has a name.
        """
        factors = self._compiled(self._variables, batch)
        if self._check is not None and is_local(batch):
            self._check(batch, factors)
            self._check = None
        return factors


def _make_total(output: str | Callable, is_head: bool) -> Callable:
    """Returns a function from a model and a batch to the sum of its examples' losses."""
    if isinstance(output, str) and not is_head:
        output_fn = losses.output(output)
        return lambda own_model, batch: losses.total(own_model, batch, output_fn)
    # A head's factors are of the whole sequence, not of pieces of it.
    example_losses = losses.of_examples(output)

    def total(own_model: nnx.Module, batch) -> jax.Array:
        loss_B = example_losses(own_model, batch)
        losses.check_shape(loss_B, unseen.count_examples(batch))
        return jnp.sum(loss_B)

    return total


def check_sites(sites: Sequence[Site]) -> None:
    """Checks that the gradient of every site has factors; see `GradientFactors`."""
    refused = [s.path for s in sites if not s.tapped]
    if refused:
        raise ValueError(
            f"{', '.join(refused)}: gradients without projection are those of layers that "
            "multiply their input by a matrix, or look up its rows; leave these parameters out "
            "(exclude=, include=, untapped='leave')"
        )


def _term(site: Site, use: str, inputs, deltas) -> Factors:
    """Returns the factors that one use of a parameter gave."""
    if use == "attend":
        # y = x Wᵀ has the gradient Σ_t δ_t x_tᵀ.
        return Factors(deltas, inputs)
    if use == "product":
        return Factors(inputs, deltas)
    numbers = inputs.astype(jnp.int32)
    numbers = jnp.where(numbers < 0, numbers + site.rows, numbers)
    # A number beyond the table (of padding, say) looks up no row, so no row has its gradient.
    is_row = (numbers >= 0) & (numbers < site.rows)
    return Factors(jnp.where(is_row, numbers, 0), jnp.where(is_row, deltas, 0))


# Shapes of the watched layers' inputs and outputs by path, while a trace collects them.
_SHAPES: contextvars.ContextVar = contextvars.ContextVar("shapes")
_keep_both = taps.identity_with_rule(lambda d, x: (x, d.astype(jnp.float32)))


def _watch_call(layer, use: str, call, inputs):
    """Calls a layer and keeps its input and its output's gradient (`layers.wrap_calls`)."""

    def change(y_BxSxN, x_BxSxM):
        shapes = _SHAPES.get(None)
        if shapes is not None:
            pair, key = (x_BxSxM.shape, y_BxSxN.shape), (layer.tda_path, use)
            if shapes.setdefault(key, pair) != pair:
                raise ValueError(
                    f"{layer.tda_path} is called several times, with inputs of "
                    f"{list(shapes[key][0])} and {list(pair[0])}: its gradient has "
                    "no single pair of factors; leave it out (exclude=)"
                )
            return y_BxSxN
        zeros = tuple(layer.tda_factors[use][name][...] for name in Factors._fields)
        return _keep_both(y_BxSxN, zeros, jax.lax.stop_gradient(x_BxSxM).astype(jnp.float32))

    if use == "look_up":
        # As cotangents, numbers of rows are float32, which is exact up to 2²⁴ rows.
        numbers_BxSx1 = inputs.reshape(inputs.shape[0], -1, 1).astype(jnp.float32)
        return layers.change_rows(layer, call, inputs, lambda y: change(y, numbers_BxSx1))
    return layers.change_product(layer, call, inputs, change)


class _Check:
    """Compares the first batch's factors with gradients of the parameters themselves.

    A layer that is called twice has the sum of two products as its gradient, which the sums of its
    inputs and of its outputs' gradients do not give.
    """

    def __init__(self, model: nnx.Module, sites: Sequence[Site], example_losses: Callable):
        self._sites = sites
        self._projection = projections.Projection(side=4, pooling="matrix")
        self._taps = encoders.make_taps(sites, self._projection, None)
        self._check = TapsCheck(model, example_losses, self._projection, self._taps)

    def __call__(self, batch, factors: dict[str, Terms]) -> None:
        projected = {
            site: sum(
                einsum("...sp,...sq->...pq", multiply(x, tap.left), multiply(d, tap.right))
                for x, d in factors[site.path]
            )
            for site, tap in self._taps.items()
        }
        layout = projections.layout(list(self._sites), self._projection)
        encodings_BxE = sharding.to_host(projections.pool(layout, projected))
        if wrong := self._check.wrong_paths(batch, encodings_BxE):
            raise ValueError(
                f"the inputs and output gradients of {', '.join(wrong)} do not give its gradient: "
                "the layer is called several times, or the loss changes its parameters before it "
                "uses them; leave it out (exclude=)"
            )
