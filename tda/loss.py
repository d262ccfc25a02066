"""Pure losses. Each takes logits, targets and weights and gives one number per example.

L = Σ_t w_t f(logits_t, target_t). The weights say which positions count: all tokens of a passage,
only the target tokens of a query, never padding.
"""

import jax
import jax.numpy as jnp


def cross_entropy(logits_BxTxV, targets_BxT, weights_BxT):
    """Next-token cross-entropy in nats, weighted and summed over positions: float32 [B]."""
    picked = jnp.take_along_axis(logits_BxTxV, targets_BxT[..., None], axis=-1)[..., 0]
    nats_BxT = jax.nn.logsumexp(logits_BxTxV, axis=-1) - picked
    return jnp.sum(nats_BxT * weights_BxT, axis=-1)


def margin(logits_BxTxV, targets_BxT, weights_BxT):
    """Minus the log-odds of the target, −log(p / (1 − p)): TRAK's output function: float32 [B]."""
    picked = jnp.take_along_axis(logits_BxTxV, targets_BxT[..., None], axis=-1)[..., 0]
    hit = jax.nn.one_hot(targets_BxT, logits_BxTxV.shape[-1], dtype=bool)
    others = jax.nn.logsumexp(jnp.where(hit, -jnp.inf, logits_BxTxV), axis=-1)
    return jnp.sum((others - picked) * weights_BxT, axis=-1)


def logit(logits_BxTxV, targets_BxT, weights_BxT):
    """Minus the target's logit: float32 [B]."""
    picked = jnp.take_along_axis(logits_BxTxV, targets_BxT[..., None], axis=-1)[..., 0]
    return jnp.sum(-picked * weights_BxT, axis=-1)


OUTPUTS = {"loss": cross_entropy, "margin": margin, "logit": logit}


def output(name: str):
    """The output function called `name`; all are losses, so that less is better.

    Raises:
        ValueError: no such output function.
    """
    if name not in OUTPUTS:
        raise ValueError(f"unknown output function {name!r}; use {', '.join(OUTPUTS)}")
    return OUTPUTS[name]
