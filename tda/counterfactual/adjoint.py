"""The surrogate adjoint: reverse mode through Adam's recursion, without second derivatives.

The exact cotangent passes a step's Hessian and the path through Adam's second moment. Here the
second moment's path is left out, and the Hessian is one of four: the Gauss–Newton matrix of the
step's batch, by products; the mean Fisher matrix of labels drawn from the model,
H̄ = Σ_i g_i g_iᵀ / tokens over a sample, the same at every step; EK-FAC's form of it; or nothing.
With u the cotangent of a step's gradient, dL/dw_i = ⟨g_i(θ_t), u⟩ / tokens_t: that leaves the
passages' gradients at each step, which all queries share. (With the batch's own labels in H̄ the
recursion diverges.)
"""

import dataclasses
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tda.counterfactual import eigenbasis
from tda.counterfactual.example_gradients import ExampleGradients, as_rows, by_path
from tda.counterfactual.inverse import gauss_newton
from tda.counterfactual.loss_products import LossProducts
from tda.counterfactual.metagradients import Reverse
from tda.counterfactual.training import State
from tda.gradients import kronecker
from tda.gradients.sampled_labels import sampled_loss
from tda.gradients.sites import Site
from tda.model import functional
from tda.runtime import progress


@dataclasses.dataclass(frozen=True)
class AdamRecursion:
    """Adam's or AdamW's constants, as for `tda.training.optimizer.make_optimizer`."""

    learning_rate: Callable[[int], float]
    """By step, from 0."""
    clip: float = 1.0
    """Largest global norm of a gradient; 0 for none."""
    b1: float = 0.9
    b2: float = 0.99
    eps: float = 1e-8
    eps_root: float = 0.0
    weight_decay: float = 0.0


def fisher_rows(
    model_fn: functional.Functional, params: dict, batches: Iterable[dict], limit: int
) -> jax.Array:
    """Returns gradients of sampled labels whose Gram matrix is the mean Fisher: float32 [S, P].

    Args:
        model_fn: the model's structure.
        params: the parameters.
        batches: passages with sampled labels (`tda.gradients.sampled_labels.batches`).
        limit: the largest S · P.

    Returns:
        g_i / √tokens, with the scored tokens of the sample: H̄ u = rowsᵀ (rows u).

    Raises:
        ValueError: S · P is above the limit.
    """
    gradients_of = ExampleGradients(model_fn, sampled_loss)
    size = sum(x.size for x in jax.tree.leaves(params))
    rows, tokens = [], 0.0
    for batch in batches:
        scored = (batch["weights"] > 0).any(axis=1)
        rows.append(as_rows(gradients_of(params, batch))[scored])
        tokens += float(batch["weights"].sum())
        if sum(map(len, rows)) * size > limit:
            raise ValueError(
                f"{sum(map(len, rows))} or more gradients of {size:,} parameters exceed the "
                f"{limit:,} numbers of the mean Fisher matrix; sample fewer passages"
            )
    return jnp.concatenate(rows) / jnp.float32(tokens) ** 0.5


# Maps a batch's arrays, the parameters before its step, and u [Q, P], to H u.
Hessian = Callable[[dict, dict, jax.Array], jax.Array]


def mean_fisher(fisher_SxP: jax.Array) -> Hessian:
    """Returns products with the mean Fisher matrix, given the rows of `fisher_rows`."""

    @jax.jit
    def product(u_QxP, fisher_SxP):
        product_QxS = jnp.matmul(u_QxP, fisher_SxP.T, precision="highest")
        return jnp.matmul(product_QxS, fisher_SxP, precision="highest")

    return lambda batch, params, u_QxP: product(u_QxP, fisher_SxP)


def ekfac(chosen: list[Site], curvature: dict[str, kronecker.Curvature], tokens: float) -> Hessian:
    """Returns products with EK-FAC's mean Fisher matrix; of other parameters they are 0.

    Args:
        chosen: the matrices, from `tda.gradients.kronecker.factored`.
        curvature: EK-FAC's eigenvectors and eigenvalues by path, which are means over passages.
        tokens: scored tokens of a passage, on average.
    """

    @jax.jit
    def product(params, u_QxP):
        x = by_path(u_QxP, params)
        products = eigenbasis.apply(chosen, curvature, lambda c: c.values / tokens, x)
        return as_rows({path: products.get(path, jnp.zeros_like(y)) for path, y in x.items()})

    return lambda batch, params, u_QxP: product(params, u_QxP)


def batch_gauss_newton(model_fn: functional.Functional) -> Hessian:
    """Returns products with the Gauss–Newton matrix of each step's batch, at its parameters.

    Args:
        model_fn: the model's structure, through whose layers `jax.jvp` passes
            (`tda.counterfactual.training.with_plain_attention`).
    """

    @jax.jit
    def product(batch, params, u_QxP):
        x, tokens = by_path(u_QxP, params), jnp.sum(batch["weights"])
        return as_rows(gauss_newton(model_fn, params, batch, x, tokens))

    return product


def surrogate(
    reverse: Reverse,
    recursion: AdamRecursion,
    hessian: Hessian | None,
    by_token: bool = False,
) -> np.ndarray:
    """Returns −dL/dw of every query and passage, by the surrogate: float32 [Q, N], or by token.

    Args:
        reverse: the training with its kept states, and the queries.
        recursion: the optimizer.
        hessian: `batch_gauss_newton`, `mean_fisher` or `ekfac`; None for no Hessian.
        by_token: whether the scores are of the table's tokens, [Q, C].

    Raises:
        FloatingPointError: the recursion diverged.
    """
    training, queries = reverse.training, reverse.queries
    theta_QxP = as_rows(queries.all_gradients(reverse.final_state()["params"]))
    mu_QxP = jnp.zeros_like(theta_QxP)
    step_back = jax.jit(_step_back, static_argnames="recursion", donate_argnums=(0, 1))
    products = LossProducts(training, by_token)
    scores = products.zeros(len(queries))
    with progress.bar(training.steps, "surrogate adjoint", "step") as bar:
        for step, before, after in reverse.backwards():
            batch = training.batches[step]
            theta_QxP, mu_QxP, u_QxP = step_back(
                theta_QxP,
                mu_QxP,
                training.gradient_norm(before["params"], batch.arrays) if recursion.clip else 0.0,
                second_moment(after),
                jnp.float32(step),
                jnp.float32(recursion.learning_rate(step)),
                recursion=dataclasses.replace(recursion, learning_rate=_no_rate),
            )
            if hessian is not None:
                theta_QxP = theta_QxP + hessian(batch.arrays, before["params"], u_QxP)
            tokens = max(float(batch.arrays["weights"].sum()), 1.0)
            products.add(scores, before["params"], batch, u_QxP, -1 / tokens)
            bar.update(1)
    if not np.isfinite(scores).all():
        raise FloatingPointError("the surrogate adjoint diverged; lower the learning rate")
    return scores


def _no_rate(step: int) -> float:
    """Replaces the schedule in constants that jit hashes; the rate is an argument of its own."""
    return 0.0


def second_moment(state: State) -> jax.Array:
    """Returns Adam's ν of a state as a row, [P]."""
    nu = functional.flat_parameters(optax.tree.get(state["opt_state"], "nu"))
    return jnp.concatenate([x.reshape(-1) for x in nu.values()])


def inverse_root(nu_P, step, recursion: AdamRecursion):
    """Returns Adam's 1 / (√ν̂ + eps) of a step, [P], from ν after the step."""
    r = recursion
    return 1 / (jnp.sqrt(nu_P / (1 - r.b2 ** (step + 1)) + r.eps_root) + r.eps)


def _step_back(theta, mu, gradient_norm, nu_P, step, rate, recursion):
    """Returns cotangents before a step, without its Hessian.

    They are those of the parameters, of the first moment, and of the step's gradient (u), [Q, P].
    """
    r = recursion
    mu = mu - rate / (1 - r.b1 ** (step + 1)) * inverse_root(nu_P, step, r) * theta
    # The clipping's factor, taken as a constant.
    factor = jnp.minimum(1.0, r.clip / jnp.maximum(gradient_norm, 1e-30)) if r.clip else 1.0
    u_QxP = (1 - r.b1) * factor * mu
    return theta * (1 - rate * r.weight_decay), r.b1 * mu, u_QxP
