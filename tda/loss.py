"""Pure losses. Each takes logits, targets and weights and returns one number per example.

L = Σ_t w_t f(logits_t, target_t). The weights select positions: all tokens of a passage, only the
target tokens of a query, never padding. Logits of any dtype are cast to float32, since in bfloat16
the log of a sum over the vocabulary keeps two or three digits.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def cross_entropy(logits_BxTxV, targets_BxT, weights_BxT):
    """Returns next-token cross-entropy in nats, weighted and summed over positions: float32 [B]."""
    logits_BxTxV = logits_BxTxV.astype(jnp.float32)
    nats_BxT = jax.nn.logsumexp(logits_BxTxV, axis=-1) - _picked(logits_BxTxV, targets_BxT)
    return jnp.sum(nats_BxT * weights_BxT, axis=-1)


def margin(logits_BxTxV, targets_BxT, weights_BxT):
    """Returns minus the target's log-odds, −log(p / (1 − p)), as in TRAK: float32 [B]."""
    logits_BxTxV = logits_BxTxV.astype(jnp.float32)
    other_logits = jnp.where(_hit(logits_BxTxV, targets_BxT), -jnp.inf, logits_BxTxV)
    odds_BxT = jax.nn.logsumexp(other_logits, axis=-1) - _picked(logits_BxTxV, targets_BxT)
    return jnp.sum(odds_BxT * weights_BxT, axis=-1)


def logit(logits_BxTxV, targets_BxT, weights_BxT):
    """Returns minus the target's logit: float32 [B]."""
    picked_BxT = _picked(logits_BxTxV.astype(jnp.float32), targets_BxT)
    return jnp.sum(-picked_BxT * weights_BxT, axis=-1)


def _hit(logits_BxTxV, targets_BxT):
    """Returns whether each logit is the target's: bool [B, T, V]."""
    return targets_BxT[..., None] == jnp.arange(logits_BxTxV.shape[-1])


def _picked(logits_BxTxV, targets_BxT):
    """Returns the target's logit: float32 [B, T].

    Sums over the vocabulary: the gradient of a look-up would be a scatter into zeros.
    """
    return jnp.sum(jnp.where(_hit(logits_BxTxV, targets_BxT), logits_BxTxV, 0.0), axis=-1)


OUTPUTS = {"loss": cross_entropy, "margin": margin, "logit": logit}


def output(name: str):
    """Returns the output function of that name; all are losses, where lower is better.

    Raises:
        ValueError: no such output function.
    """
    if name not in OUTPUTS:
        raise ValueError(f"unknown output function {name!r}; use {', '.join(OUTPUTS)}")
    return OUTPUTS[name]


def of_examples(loss: str | Callable) -> Callable:
    """Returns `output(loss)` as a function of a model and a batch, [B]; `loss` if it is one."""
    if callable(loss):
        return loss
    output_fn = output(loss)

    def example_losses(model, batch: dict):
        logits_BxTxV = model(batch["tokens"])
        if not hasattr(logits_BxTxV, "shape"):
            raise ValueError(
                f"the model returns a {type(logits_BxTxV).__name__}, not logits [B, T, V]; pass "
                "loss= as a function of the model and a batch"
            )
        return output_fn(logits_BxTxV, batch["targets"], batch["weights"])

    return example_losses


def check_shape(loss_B, count: int) -> None:
    """Checks that a batch's loss is one number for each of `count` examples.

    Raises:
        ValueError: it is not.
    """
    if not hasattr(loss_B, "shape"):
        raise ValueError(
            f"the loss returns a {type(loss_B).__name__}, not an array of shape ({count},); return "
            "only the losses"
        )
    if loss_B.shape != (count,):
        raise ValueError(
            f"the loss of {count} examples has the shape {loss_B.shape}, not ({count},): it "
            "must be one number for each example, summed over its positions and neither summed nor "
            "averaged over the batch"
        )


def has_separate_head(model) -> bool:
    """Returns whether `model(tokens)` is `model.logits(model.hidden(tokens))`.

    `hidden` maps tokens [B, T] to states [B, T, D] and `logits` states to float32 [B, T, V], each
    position and each example by itself. Methods of these names may do anything in a user's model,
    so its class must state it: `has_separate_head = True`. A subclass that overrides one of the
    three methods must state it again.
    """
    methods = {"__call__", "hidden", "logits"}
    latest = next((kind for kind in type(model).__mro__ if methods & vars(kind).keys()), object)
    return vars(latest).get("has_separate_head", False)


# The number of logits held at once: 64 MiB of float32 on CPUs, 512 MiB elsewhere, where a small
# product with the output matrix leaves most of the device idle.
_CHUNK, _CHUNK_ACCELERATED = 2**24, 2**27


def total(model, batch: dict, output_fn, scored: int | None = None, chunk: int | None = None):
    """Sums an output function over a batch's examples without holding all logits at once.

    A model that `has_separate_head` has its output matrix applied to a few positions at a time.
    Each piece's gradient is computed with its value, so that its logits can be freed. Any other
    model is called directly, with all logits at once.

    Args:
        model: maps tokens [B, T] to logits [B, T, V].
        batch: {"tokens", "targets", "weights"}, each [B, T].
        output_fn: one of `OUTPUTS`.
        scored: an upper bound on an example's positions of nonzero weight; if it is less than T,
            logits are computed at this many positions only. None for T.
        chunk: the largest number of logits in one piece (a piece has at least one position);
            None for the device's default.

    Returns:
        A float32 scalar.
    """
    targets_BxT, weights_BxT = batch["targets"], batch["weights"]
    if not has_separate_head(model):
        return jnp.sum(output_fn(model(batch["tokens"]), targets_BxT, weights_BxT))
    h_BxTxD = model.hidden(batch["tokens"])
    if scored is not None and scored < targets_BxT.shape[1]:
        # Scored positions come first; the stable sort keeps their order.
        at_BxS = jnp.argsort(weights_BxT == 0, axis=1, stable=True)[:, :scored]
        h_BxTxD = jnp.take_along_axis(h_BxTxD, at_BxS[..., None], axis=1)
        targets_BxT = jnp.take_along_axis(targets_BxT, at_BxS, axis=1)
        weights_BxT = jnp.take_along_axis(weights_BxT, at_BxS, axis=1)

    def piece(h_BxSxD, targets_BxS, weights_BxS):
        return jnp.sum(output_fn(model.logits(h_BxSxD), targets_BxS, weights_BxS))

    if chunk is None:
        chunk = _CHUNK if jax.default_backend() == "cpu" else _CHUNK_ACCELERATED
    B, T = targets_BxT.shape
    vocabulary = jax.eval_shape(model.logits, h_BxTxD).shape[-1]
    pieces = -(-T // max(1, chunk // (B * vocabulary)))
    if pieces == 1:
        return piece(h_BxTxD, targets_BxT, weights_BxT)
    return _sum_of_pieces(piece, pieces, h_BxTxD, targets_BxT, weights_BxT)


def _sum_of_pieces(piece, pieces: int, h_BxTxD, targets_BxT, weights_BxT):
    """Sums `piece` over slices of the positions, with each slice's gradient beside its value.

    The backward pass only scales the forward pass's gradients, as fused cross-entropies do.
    """
    size = -(-targets_BxT.shape[1] // pieces)
    short = pieces * size - targets_BxT.shape[1]

    def cut(x):
        x = jnp.pad(x, [(0, 0), (0, short)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], pieces, size, *x.shape[2:]), 1, 0)

    slices = cut(h_BxTxD), cut(targets_BxT), cut(weights_BxT)
    # The differentiable arrays that `piece` closes over: taps and, in training, the output matrix.
    piece, closed_over = jax.closure_convert(piece, *(x[0] for x in slices))

    def sum_dtype(x):
        # A sum of hundreds of pieces in bfloat16 would keep two digits.
        return jnp.promote_types(x.dtype, jnp.float32)

    @jax.custom_vjp
    def summed(h_SxBxPxD, closed_over, targets, weights):
        def step(so_far, x):
            return so_far + piece(*x, *closed_over), None

        return jax.lax.scan(step, jnp.float32(0), (h_SxBxPxD, targets, weights))[0]

    def forward(h_SxBxPxD, closed_over, targets, weights):
        def step(so_far, x):
            h, t, w = x
            value, (d_h, *d_closed) = jax.value_and_grad(
                lambda h, *closed: piece(h, t, w, *closed), argnums=tuple(range(len(so_far[1]) + 1))
            )(h, *closed_over)
            return (so_far[0] + value, jax.tree.map(jnp.add, so_far[1], d_closed)), d_h

        start = jnp.float32(0), [jnp.zeros(x.shape, sum_dtype(x)) for x in closed_over]
        (value, d_closed), d_h = jax.lax.scan(step, start, (h_SxBxPxD, targets, weights))
        d_closed = [d.astype(x.dtype) for d, x in zip(d_closed, closed_over, strict=True)]
        return value, (d_h, d_closed)

    def backward(residuals, g):
        d_h, d_closed = jax.tree.map(lambda d: (g * d).astype(d.dtype), residuals)
        return d_h, d_closed, None, None

    summed.defvjp(forward, backward)
    h, targets, weights = slices
    return summed(h, closed_over, targets, weights)
