"""1/√V of a checkpoint without optimizer state: second moments from a sample of batches.

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
from tda.gradients.moments import optimizer_state
from tda.gradients.moments.optimizer_state import SecondMomentError
from tda.gradients.moments.scales import Scale, check_full, finite, from_full
from tda.model import functional


def squared_gradients(
    model: nnx.Module, loss: Callable, batches: Iterable, chosen: list[sites.Site]
) -> dict[str, jax.Array]:
    """Returns V: the mean over batches of the squared gradient of each batch's mean loss.

    A batch's mean loss is the sum over its examples divided by the sum of its weights, as in
    `tda.training.loop.batch_loss`; a batch without scored tokens is left out. If a batch has no
    "weights", it is the mean over the examples.

    Args:
        model: any NNX model.
        loss: a function of the model and a batch to each example's loss, summed over its positions:
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

    def total_and_weight(params, batch):
        total_B = loss(model_fn.merge(params), batch)
        weight = jnp.sum(batch["weights"]) if _has_weights(batch) else total_B.shape[0]
        return jnp.sum(total_B), jnp.asarray(weight, jnp.float32)

    @functools.partial(jax.jit, donate_argnums=0)
    def add(sums, params, batch):
        gradients, weight = jax.grad(total_and_weight, has_aux=True)(params, batch)
        gradients = functional.flat_parameters(gradients)
        # Divided in float32, after the gradient: the mean loss of thousands of tokens has gradients
        # that float16 rounds to 0.
        weight = jnp.where(weight == 0, 1.0, weight)
        return {
            p: x + jnp.square(gradients[p].astype(jnp.float32) / weight) for p, x in sums.items()
        }

    sums, count = {s.path: jnp.zeros(s.shape, jnp.float32) for s in chosen}, 0
    for batch in batches:
        if not _has_weights(batch) or batch["weights"].any():
            # Without this wait the batches would be read, and counted, long before they are summed.
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
    floor: float = optimizer_state.FLOOR,
) -> dict[str, Scale]:
    """Returns 1/√V from a sample of batches: 1 / (√max(V, floor · mean V) + eps).

    V has the same floor as the optimizer's moments (`tda.gradients.moments.second_moments`). A
    matrix that no batch reaches at all has the scale 1/eps.

    Args:
        model, loss, batches, chosen: see `squared_gradients`.
        correction: "adam", "factored" or "low_rank(R)" (`tda.gradients.moments.scales`).
        eps: Adam's epsilon, outside the root.
        floor: of V, relative to its mean over each matrix.

    Returns:
        A `Scale` by the site's path.

    Raises:
        SecondMomentError: another correction, no batch with scored tokens, or gradients that are
            not finite.
    """
    # Checked before any gradient is computed.
    check_full(correction)
    scales = {}
    for path, V in squared_gradients(model, loss, batches, chosen).items():
        scales[path] = from_full(_inverse_root(V, floor, eps), correction)
    return finite(scales)


# Compiled as one: a program for each operation takes longer to compile.
@jax.jit
def _inverse_root(V, floor, eps):
    return 1.0 / (jnp.sqrt(optimizer_state.raise_to_floor(V, floor=floor)) + eps)
