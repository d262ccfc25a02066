"""Products with the inverse of the Gauss–Newton matrix, refined from EK-FAC's.

Two methods solve (H + D) x = g: conjugate gradients on one fixed batch, and ASTRA (Wang et al.,
2507.14740), a preconditioned descent with momentum on a small batch at a time. Both start from
EK-FAC's (F + λ)⁻¹ g and take (F + λ)⁻¹ as preconditioner. H is the mean over passages of the
Gauss–Newton matrix of a passage's nats, and D is EK-FAC's λ of each matrix.
"""

import dataclasses
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import optax

from tda.counterfactual import conjugate_gradients, eigenbasis
from tda.counterfactual.eigenbasis import Gradients
from tda.gradients import kronecker
from tda.gradients.kronecker import DAMPING, Curvature
from tda.gradients.sites import Site
from tda.model import functional
from tda.runtime import progress


def gauss_newton(
    model_fn: functional.Functional, params: dict, batch: dict, x: Gradients, count
) -> Gradients:
    """Returns H x, H the Gauss–Newton matrix of a batch's nats over `count`, for each row of x.

    Args:
        model_fn: the model's structure, through whose layers `jax.jvp` passes.
        params: the parameters at which H is taken.
        batch: {"tokens", "weights", …}.
        x: by path, [Q, …]; H is over these parameters alone.
        count: the divisor of the sum over positions.
    """
    flat = functional.flat_parameters(params)

    def logits(chosen):
        merged = jax.tree_util.tree_map_with_path(
            lambda path, p: chosen.get(functional.path_name(path), p), params
        )
        return model_fn.merge(merged)(batch["tokens"]).astype(jnp.float32)

    chosen = {p: flat[p] for p in x}
    logits_BxTxV, push = jax.linearize(logits, chosen)
    pull = jax.linear_transpose(push, chosen)
    p_BxTxV = jax.nn.softmax(logits_BxTxV)
    weights_BxTx1 = batch["weights"][..., None] / jnp.maximum(count, 1)

    def of_row(row):
        d_BxTxV = push(row)
        d_BxTxV = p_BxTxV * (d_BxTxV - jnp.sum(p_BxTxV * d_BxTxV, axis=-1, keepdims=True))
        return pull(d_BxTxV * weights_BxTx1)[0]

    return jax.lax.map(of_row, x)


@dataclasses.dataclass(frozen=True)
class DampedInverse:
    """(H + D)⁻¹ of the chosen matrices, by products with H.

    Raises:
        ValueError: all gradients of a matrix vanish, or the damping is not above 0.

    Raises (where a product is taken):
        TypeError: the model's layers have a backward pass of their own, which `jax.jvp` refuses;
            `tda.counterfactual.training.with_plain_attention` gives a decoder without.
    """

    model_fn: functional.Functional
    """The model's structure."""
    params: dict
    """The parameters at which H is taken."""
    chosen: list[Site]
    """The matrices."""
    curvature: dict[str, Curvature]
    """EK-FAC's eigenvectors and eigenvalues by path."""
    damping: float = DAMPING
    """λ over the mean of a matrix's eigenvalues, above 0."""

    def __post_init__(self):
        for site in self.chosen:
            kronecker.check_invertible(site, self.curvature[site.path], self.damping)

    def precondition(self, gradients: Gradients) -> Gradients:
        """Returns (F + λ)⁻¹ of gradients by path, [Q, …]: EK-FAC's solution."""

        def inverse(c):
            return 1 / kronecker.damped(c, self.damping)

        return eigenbasis.apply(self.chosen, self.curvature, inverse, gradients)

    def product(self, batch: dict, x: Gradients) -> Gradients:
        """Returns (H + D) x, H of a batch's passages: Jᵀ (diag p − p pᵀ) J x / passages."""
        passages = jnp.sum(jnp.any(batch["weights"] > 0, axis=1))
        products = gauss_newton(self.model_fn, self.params, batch, x, passages)
        means = {p: self.damping * c.values.mean((-1, -2)) for p, c in self.curvature.items()}
        return {
            p: products[p] + means[p].reshape(-1, *(1,) * (y.ndim - 2)) * y for p, y in x.items()
        }

    def by_conjugate_gradients(self, gradients: Gradients, batch: dict, steps: int = 20):
        """Returns (H + D)⁻¹ of gradients by path, H of one batch, after some steps."""

        @jax.jit
        def solve(target, batch):
            start = self.precondition(target)
            return conjugate_gradients.solve(
                lambda x: self.product(batch, x), self.precondition, target, start, steps
            )

        target = {s.path: gradients[s.path] for s in self.chosen}
        count, rows = len(next(iter(target.values()))), []
        # Query by query: each takes `steps` products, and together they would show no progress.
        with progress.bar(count, "conjugate gradients", "query") as bar:
            for q in range(count):
                row = solve({path: x[q : q + 1] for path, x in target.items()}, batch)
                rows.append(jax.block_until_ready(row))
                bar.update()
        return jax.tree.map(lambda *x: jnp.concatenate(x), *rows)

    def by_astra(self, gradients: Gradients, batches: Iterable[dict], rate: float = 0.01):
        """Returns (H + D)⁻¹ of gradients by path, after a step on each batch.

        x ← x − rate · momentum((F + λ)⁻¹ [(H_B + D) x − g]), with a momentum of 0.9 and a rate
        that falls by a tenth every 100 steps.

        Raises:
            FloatingPointError: the descent diverged: (F + λ)⁻¹ H_B has eigenvalues above 3.8 / rate
                where a batch is few passages of a model with many directions.
        """
        target = {s.path: gradients[s.path] for s in self.chosen}
        falling = optax.exponential_decay(rate, 100, 0.9, staircase=True)
        tx = optax.sgd(falling, momentum=0.9)

        @jax.jit
        def step(x, state, batch):
            residual = jax.tree.map(jnp.subtract, self.product(batch, x), target)
            updates, state = tx.update(self.precondition(residual), state)
            return optax.apply_updates(x, updates), state

        x = self.precondition(target)
        state = tx.init(x)
        with progress.bar(None, "ASTRA", "step") as bar:
            for batch in batches:
                x, state = jax.block_until_ready(step(x, state, batch))
                bar.update()
        if not all(bool(jnp.isfinite(leaf).all()) for leaf in x.values()):
            raise FloatingPointError(
                f"ASTRA diverged at a rate of {rate}; use a lower one, larger batches, or more "
                "curvature.damping"
            )
        return x
