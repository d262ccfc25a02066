"""1/√V where a checkpoint has no optimizer state: second moments from a sample of batches.

Adam's ν is a running mean of squared gradients, each gradient the mean over a batch (Kingma & Ba
2015, algorithm 1). The same quantity at the checkpoint's parameters is the plain mean of squared
batch gradients over a sample; batches should be of the size that the model was trained with, since
a larger one has smaller squares. Clipping, which scales whole gradients, is left out.
"""

import functools
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
from flax import nnx

from tda.gradients import sites
from tda.gradients.moments import second_moments
from tda.gradients.moments.optimizer_state import SecondMomentError
from tda.model import functional


def squared_gradients(
    model: nnx.Module, loss: Callable, batches: Iterable, chosen: list[sites.Site]
) -> dict[str, jax.Array]:
    """V: the mean over batches of the squared gradient of each batch's mean loss.

    A batch's loss is the sum over its examples divided by the sum of its weights, as
    `tda.training.loop.batch_loss` has it; a batch without scored tokens is left out. Of a batch
    that has no "weights", the loss is the mean over its examples.

    Args:
        model: any NNX model.
        loss: of the model and a batch, one number for each example, summed over its positions:
            float32 [B]. Compiled once for every shape of batch.
        batches: trees of arrays that `loss` takes; of language models dicts with "weights" [B, T]
            ("tokens", "targets").
        chosen: the sites.

    Returns:
        float32 [(L,) M, N] by the site's path, summed in float32 whatever the model's dtype.

    Raises:
        SecondMomentError: no batch has a scored token.
    """
    model_fn, params = functional.split(model)

    def mean_loss(params, batch):
        total_B = loss(model_fn.merge(params), batch)
        scored = jnp.sum(batch["weights"]) if _has_weights(batch) else total_B.shape[0]
        return jnp.sum(total_B) / jnp.maximum(scored, 1.0)

    @functools.partial(jax.jit, donate_argnums=0)
    def add(sums, params, batch):
        gradients = functional.flat_parameters(jax.grad(mean_loss)(params, batch))
        return {p: x + jnp.square(gradients[p].astype(jnp.float32)) for p, x in sums.items()}

    sums, count = {s.path: jnp.zeros(s.shape, jnp.float32) for s in chosen}, 0
    for batch in batches:
        if not _has_weights(batch) or batch["weights"].any():
            # Waited for: who counts the batches as they are taken tells what is done.
            sums, count = jax.block_until_ready(add(sums, params, batch)), count + 1
    if not count:
        raise SecondMomentError("second moments need at least one batch with a scored token")
    return {s.path: s.matrix(sums[s.path] / count) for s in chosen}


def _has_weights(batch) -> bool:
    return isinstance(batch, dict) and "weights" in batch


def estimate(
    model: nnx.Module,
    loss: Callable,
    batches: Iterable,
    chosen: list[sites.Site],
    correction: str,
    eps: float = 1e-8,
    floor: float = 1e-6,
) -> dict[str, second_moments.Scale]:
    """1/√V from a sample of batches: 1 / (√max(V, floor · mean V) + eps).

    A weight that no batch of the sample reaches has V = 0 by chance, and a sample is shorter than
    the optimizer's memory. So V counts as no less than `floor` times its mean over the matrix: no
    weight is scaled to more than 1/√floor, a thousand, times what the matrix's mean would give
    (1/floor in a "factored" scale, where neither a weight's row nor its column is reached). A
    matrix that no batch reaches at all has the scale 1/eps.

    Args:
        model, loss, batches, chosen: see `squared_gradients`.
        correction: "adam", "factored" or "low_rank(R)" (`tda.gradients.moments.second_moments`).
        eps: Adam's epsilon, outside the root.
        floor: of V, relative to its mean over each matrix.

    Returns:
        A `Scale` by the site's path.

    Raises:
        SecondMomentError: another correction, no batch with scored tokens, or gradients that are
            not finite.
    """
    # Refused before the gradients are worked for.
    second_moments.check_full(correction)
    scales = {}
    for path, V in squared_gradients(model, loss, batches, chosen).items():
        scales[path] = second_moments.from_full(_inverse_root(V, eps, floor), correction)
    return second_moments.finite(scales)


@jax.jit
def _inverse_root(V, eps: float, floor: float):
    least = floor * jnp.mean(V, axis=(-1, -2), keepdims=True)
    return 1.0 / (jnp.sqrt(jnp.maximum(V, least)) + eps)
