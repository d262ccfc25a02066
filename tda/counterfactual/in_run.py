"""First-order in-run influence: the effect of each training step on the queries' losses.

Σ_t η_t ⟨∇ℓ_i(θ_t), P_t ∇L_q(θ_t)⟩ / tokens_t over the steps that a passage is in, P_t the identity
or Adam's 1 / (√ν̂ + eps) (data Shapley in one training run, 2406.11011, its first order). Momentum,
clipping and the effect of later steps on a change are left out. The gradients of a step's passages
and of all queries are taken at the parameters of that step.
"""

import numpy as np

from tda.counterfactual.adjoint import AdamRecursion, inverse_root, second_moment
from tda.counterfactual.example_gradients import as_rows
from tda.counterfactual.loss_products import LossProducts
from tda.counterfactual.metagradients import Reverse
from tda.runtime import progress


def in_run(
    reverse: Reverse,
    recursion: AdamRecursion,
    is_preconditioned: bool,
    by_token: bool = False,
) -> np.ndarray:
    """Returns the sum over steps of every query and passage, float32 [Q, N], or token, [Q, C].

    Args:
        reverse: the training with its kept states, and the queries.
        recursion: the optimizer.
        is_preconditioned: whether P is Adam's; else it is the identity.
        by_token: whether the scores are of tokens.
    """
    training, queries = reverse.training, reverse.queries
    products = LossProducts(training, by_token)
    scores = products.zeros(len(queries))
    with progress.bar(training.steps, "in-run", "step") as bar:
        for step, before, after in reverse.backwards():
            batch = training.batches[step]
            u_QxP = as_rows(queries.all_gradients(before["params"]))
            if is_preconditioned:
                u_QxP = u_QxP * inverse_root(second_moment(after), step, recursion)
            tokens = max(float(batch.arrays["weights"].sum()), 1.0)
            rate = float(recursion.learning_rate(step))
            products.add(scores, before["params"], batch, u_QxP, rate / tokens)
            bar.update(1)
    return scores
