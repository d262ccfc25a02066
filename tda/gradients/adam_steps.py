"""The projected step that Adam would take on each example alone: P·(m̂ / (√v̂ + ε)).

m = b1 m₀ + (1 − b1)∇ℓ and v = b2 v₀ + (1 − b2)(∇ℓ)² are the moments after the step, m₀ and v₀ those
of the checkpoint, ℓ the mean loss of the example's tokens (Xia et al. 2024, section 3.1; Kingma &
Ba 2015, algorithm 1). The step is not linear in ∇ℓ, so no tap can compute it: each example's full
gradient is formed, a few examples at a time. So this works for all parameters of any model.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from tda import loss as losses
from tda.gradients import encoder as encoders
from tda.gradients import full_gradients, sites
from tda.gradients import projection as projections
from tda.gradients.moments import optimizer_state
from tda.gradients.moments.optimizer_state import SecondMomentError
from tda.model import functional
from tda.runtime import sharding
from tda.store import codec

# Numbers of weight gradients that a device holds at once (at least one example's): 256 MiB.
_AT_ONCE = 2**26
OPTIMIZERS = ("adam", "adamw")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """Adam's state of one parameter.

    Attributes:
        mu, nu: the moments, float32 in the parameter's shape.
        count: number of steps taken.
        b1, b2, eps, eps_root: Adam's constants.
    """

    mu: jax.Array
    nu: jax.Array
    count: jax.Array
    b1: jax.Array
    b2: jax.Array
    eps: jax.Array
    eps_root: jax.Array


def read(root, chosen: list[sites.Site], step: int | None = None) -> dict[str, State]:
    """Reads Adam's state of every site, by path.

    Args:
        root: the directory of checkpoints. Its description's `optimizer` gives `name` (adam or
            adamw), `b1`, `b2`, `eps` and `eps_root`; constants that `optax.inject_hyperparams`
            stores in the state take precedence.
        chosen: the sites.
        step: the checkpoint's step; None for the last checkpoint.

    Raises:
        SecondMomentError: the optimizer is not Adam(W), or its state or constants are incomplete.
        tda.training.checkpoint.CheckpointError: no checkpoint, or one without optimizer state.
    """
    state = optimizer_state.open_state(root, step)
    moments = state.moments([s.path for s in chosen], ("mu", "nu"))
    return {s.path: _state(s, moments[s.path]) for s in chosen}


def _state(site: sites.Site, moments: optimizer_state.Moments) -> State:
    name, constants = moments.constants.get("name"), moments.constants
    if name not in OPTIMIZERS:
        raise SecondMomentError(
            f"{site.path} was trained with {name!r}; Adam's step is defined for "
            f"{' and '.join(OPTIMIZERS)} only"
        )
    lacking = [k for k in ("b1", "b2", "eps") if k not in constants]
    if lacking:
        raise SecondMomentError(
            f"the checkpoint's description lacks optimizer.{' and '.join(lacking)}, which Adam's "
            f"step of {site.path} needs"
        )
    absent = [k for k in ("mu", "nu") if k not in moments.fields]
    absent += ["count"] * (moments.count is None)
    if absent:
        raise SecondMomentError(
            f"the optimizer's state has no {' and no '.join(absent)} of {site.path}, which Adam's "
            "step needs"
        )
    mu, nu = (jnp.asarray(moments.fields[k], jnp.float32) for k in ("mu", "nu"))
    for field, x in (("mu", mu), ("nu", nu)):
        if x.shape != site.shape:
            raise SecondMomentError(
                f"{field} of {site.path} has shape {x.shape}, the model {site.shape}"
            )
    values = {k: constants.get(k, 0.0) for k in ("b1", "b2", "eps", "eps_root")}
    scalars = {k: jnp.asarray(x, jnp.float32) for k, x in values.items()}
    return State(mu, nu, jnp.asarray(moments.count, jnp.float32), **scalars)


def adam_step(state: State, gradient) -> jax.Array:
    """Returns Adam's step on a gradient, before learning rate and weight decay: float32."""
    s, steps = state, state.count + 1
    mu = s.b1 * s.mu + (1 - s.b1) * gradient
    nu = s.b2 * s.nu + (1 - s.b2) * jnp.square(gradient)
    mu_hat, nu_hat = mu / (1 - s.b1**steps), nu / (1 - s.b2**steps)
    return mu_hat / (jnp.sqrt(nu_hat + s.eps_root) + s.eps)


def make_encoder(
    model: nnx.Module,
    chosen: list[sites.Site],
    projection: projections.Projection,
    states: dict[str, State],
    output: str = "loss",
    mesh: jax.sharding.Mesh | None = None,
) -> encoders.Encoder:
    """Makes an encoder of Adam's steps.

    Args:
        model: an NNX model that maps tokens [B, T] to logits [B, T, V].
        chosen: the sites; they need not be tapped.
        projection: P.
        states: Adam's state by path, from `read`.
        output: the function whose mean over an example's tokens is ℓ: "loss", "margin" or "logit".
        mesh: if given, moments are sharded over it as their parameters are.
    """
    plan, output_fn = projections.layout(chosen, projection), losses.output(output)
    graphdef, state = nnx.split(model)
    parameters, axes = nnx.to_pure_dict(state), functional.logical_axes(state)
    moments = {s.path: (states[s.path].mu, states[s.path].nu) for s in chosen}
    constants = {p: dataclasses.replace(states[p], mu=None, nu=None) for p in moments}
    matrices = {
        s.path: tuple(map(jnp.asarray, projections.matrices(s, projection))) for s in chosen
    }
    axes = {f"model/{p}": a for p, a in axes.items()} | {
        f"moments/{p}/{i}": axes[p] for p in moments for i in range(2)
    }

    def total_loss(parameters, rest, example, scored):
        own_model = nnx.merge(graphdef, full_gradients.join_parameters(rest, parameters))
        return losses.total(own_model, example, output_fn, scored)

    def encode(arrays, batch, scored=None, forms=None):
        variables, (constants, matrices) = arrays
        rest, parameters = full_gradients.split_parameters(variables["model"], chosen)

        def encode_example(example):
            example = jax.tree.map(lambda x: x[None], example)
            gradients = jax.grad(total_loss)(parameters, rest, example, scored)
            weight = jnp.sum(example["weights"])
            weight = jnp.where(weight == 0, 1.0, weight)
            projected = {}
            for site in chosen:
                mu, nu = variables["moments"][site.path]
                before = dataclasses.replace(constants[site.path], mu=mu, nu=nu)
                gradient = gradients[(*site.module, site.parameter)].astype(jnp.float32)
                # ℓ is a mean, divided here: float16 would round small gradients of it to 0.
                step = adam_step(before, gradient / weight)
                projected[site] = full_gradients.project(
                    site, step[None], *matrices[site.path], None, projection.side
                )
            return projections.pool(plan, projected)[0]

        weights = sum(x.size for x in parameters.values())
        encode_portion = jax.vmap(jax.vmap(encode_example))
        steps = sharding.map_in_portions(encode_portion, batch, weights, _AT_ONCE)
        return codec.encode_all((steps,), forms)

    arrays = {"model": parameters, "moments": moments}, (constants, matrices)
    compiled = jax.jit(encode, static_argnums=(2, 3))
    encoder = encoders.Encoder((plan,), arrays, axes, compiled)
    return encoder if mesh is None else encoder.place(mesh)
