"""First-order in-run influence: the effect of each training step on the queries' losses.

Σ_t η_t ⟨∇ℓ_i(θ_t), P_t ∇L_q(θ_t)⟩ / tokens_t over the steps that a passage is in, P_t the identity
or Adam's 1 / (√ν̂ + eps) (data Shapley in one training run, 2406.11011, its first order). Momentum,
clipping and the effect of later steps on a change are left out. The gradients of a step's passages
and of all queries are taken at the parameters of that step.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from tda.counterfactual.adjoint import AdamRecursion, inverse_root, no_rate, second_moment
from tda.counterfactual.example_gradients import as_rows
from tda.counterfactual.metagradients import Reverse
from tda.runtime import progress, sharding


def in_run(reverse: Reverse, recursion: AdamRecursion, is_preconditioned: bool) -> np.ndarray:
    """Returns the sum over steps of every query and passage, float32 [Q, N].

    Args:
        reverse: the training with its kept states, and the queries.
        recursion: the optimizer.
        is_preconditioned: whether P is Adam's; else it is the identity.
    """
    training, queries = reverse.training, reverse.queries
    scores_QxN = np.zeros((len(queries), len(training.table)), np.float32)
    constants = dataclasses.replace(recursion, learning_rate=no_rate)
    products = jax.jit(_products, static_argnames=("recursion", "is_preconditioned"))
    with progress.bar(training.steps, "in-run", "step") as bar:
        for step, before, after in reverse.backwards():
            batch = training.batches[step]
            product_QxB = products(
                as_rows(queries.all_gradients(before["params"])),
                as_rows(training.example_gradients(before["params"], batch.arrays)),
                second_moment(after),
                jnp.float32(step),
                constants,
                is_preconditioned,
            )
            rate, tokens = recursion.learning_rate(step), batch.arrays["weights"].sum()
            product_QxB = sharding.to_host(product_QxB)[:, : len(batch.rows)]
            scores_QxN[:, batch.rows] += float(rate) / max(float(tokens), 1.0) * product_QxB
            bar.update(1)
    return scores_QxN


def _products(queries_QxP, rows_BxP, nu_P, step, recursion, is_preconditioned):
    if is_preconditioned:
        queries_QxP = queries_QxP * inverse_root(nu_P, step, recursion)
    return jnp.matmul(queries_QxP, rows_BxP.T, precision="highest")
