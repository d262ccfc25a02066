"""Kronecker-factored curvature: covariances of activations and their gradients, and EK-FAC.

A linear layer y = x W has the gradient G = Σ_t x_t δ_tᵀ. K-FAC takes its Fisher matrix to be A ⊗ S,
A = E[x xᵀ] and S = E[δ δᵀ]; EK-FAC (George et al. 2018) keeps the eigenvectors Q_A and Q_S, and
estimates the eigenvalues from the gradients directly: Λ = E[(Q_Aᵀ G Q_S)²]. Grosse et al. (2023),
section 2.2, use it for influence functions: ∇L_qᵀ (F + λ)⁻¹ ∇L_p, with labels that are drawn from
the model's own predictions and λ = 0.1 mean Λ.

(F + λ)^(−1/2) is G ↦ Q_A ((Q_Aᵀ G Q_S) ∘ (Λ + λ)^(−1/2)) Q_Sᵀ. Applied to the gradients of queries
and of passages before the projection, it makes every inner product of encodings an unbiased
estimate of the influence, at the cost of the exact Adam correction and two changes of basis. LoGra
(Choe et al. 2024) needs only the covariances: their leading eigenvectors replace the projection.
"""

import dataclasses
import functools
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tda import loss as losses
from tda.gradients import layers, sampled_labels, sites, taps, unseen
from tda.gradients import projection as projections
from tda.runtime import host_blas, sharding

DAMPING = 0.1


@dataclasses.dataclass(frozen=True)
class Curvature:
    """The eigenvectors, and perhaps eigenvalues, of one site's curvature; stacked if the site is.

    Attributes:
        left, right: Q_A and Q_S, float32 [(L,) M, M] and [(L,) N, N]: eigenvectors in columns,
            those of the largest eigenvalues first.
        values: Λ, float32 [(L,) M, N]; None if only the eigenvectors are needed.
    """

    left: np.ndarray
    right: np.ndarray
    values: np.ndarray | None = None


def factored(chosen: list[sites.Site]) -> list[sites.Site]:
    """Returns the sites that have Kronecker factors: tapped, and neither embedding nor head.

    Raises:
        ValueError: there is none.
    """
    factored_sites = [s for s in chosen if s.tapped and s.group not in ("embedding", "head")]
    if not factored_sites:
        listed = ", ".join(s.path for s in chosen)
        raise ValueError(f"no linear layer is among {listed}: Kronecker factors need one")
    return factored_sites


def covariances(
    model: nnx.Module, chosen: list[sites.Site], batches: Iterable[dict], labels: str
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Returns A and S of every site: means over positions of x xᵀ and δ δᵀ.

    Args:
        model: any NNX model of tokens to logits.
        chosen: the sites, from `factored`.
        batches: from `sampled_labels.batches`; positions of weight 0 do not count.
        labels: "sampled" or "data", as the batches have them.

    Returns:
        float32 [(L,) M, M] and [(L,) N, N] by path.

    Raises:
        ValueError: no position counts, or the loss uses a parameter where no tap sees it.
    """
    empty = {s: (_zeros(s, s.rows, s.rows), _zeros(s, s.columns, s.columns)) for s in chosen}
    sums, count = _sum_over_batches(model, empty, {}, batches, labels)
    positions = count["positions"]
    if not positions:
        raise ValueError("no position of the sample is scored, so A and S cannot be computed")
    return {s.path: tuple(x / positions for x in sums[s]) for s in chosen}


def _zeros(site: sites.Site, *shape: int) -> jax.Array:
    return jnp.zeros((*site.stack_shape, *shape), jnp.float32)


def eigenvectors(
    factors: dict[str, tuple[jax.Array, jax.Array]], keep: int | None = None
) -> dict[str, Curvature]:
    """Returns the eigenvectors of A and S by path, largest eigenvalue first.

    Args:
        factors: A and S by path, from `covariances`.
        keep: the number of leading eigenvectors to return; None for all.
    """

    @jax.jit
    def decompose(x):
        # Scaled to a mean eigenvalue of 1, so that float32 serves layers of any magnitude.
        mean = jnp.trace(x, axis1=-1, axis2=-2)[..., None, None] / x.shape[-1]
        return jnp.linalg.eigh(x / jnp.where(mean > 0, mean, 1.0))[1][..., ::-1]

    with host_blas.one_thread():
        return {
            p: Curvature(*(sharding.to_host(decompose(x))[..., :keep] for x in pair))
            for p, pair in factors.items()
        }


def corrected(
    model: nnx.Module,
    chosen: list[sites.Site],
    batches: Iterable[dict],
    labels: str,
    bases: dict[str, Curvature],
) -> dict[str, Curvature]:
    """Returns `bases` with EK-FAC's eigenvalues: Λ = mean over examples of (Q_Aᵀ G Q_S)².

    Args:
        model, chosen, batches, labels: as for `covariances`; an example's gradient is the sum over
            its positions, and one without scored positions does not count.
        bases: all eigenvectors, from `eigenvectors` without `keep`.

    Raises:
        ValueError: no example counts, the loss uses a parameter where no tap sees it, or a layer is
            called several times.
    """
    by_site = {
        s: (jnp.asarray(bases[s.path].left), jnp.asarray(bases[s.path].right)) for s in chosen
    }
    empty = {s: (_zeros(s, s.rows, s.columns), _zeros(s)) for s in chosen}
    sums, count = _sum_over_batches(model, empty, by_site, batches, labels)
    examples = count["examples"]
    if not examples:
        raise ValueError("no example of the sample is scored, so Λ cannot be computed")
    return {
        s.path: dataclasses.replace(
            bases[s.path], values=sharding.to_host(sums[s][0] / np.float32(examples))
        )
        for s in chosen
    }


def ekfac_taps(
    chosen: list[sites.Site],
    projection: projections.Projection,
    curvature: dict[str, Curvature],
    damping: float = DAMPING,
) -> dict[sites.Site, taps.Tap]:
    """Makes taps of P·(F + λ)^(−1/2) ∇L: see the module's docstring.

    Args:
        chosen: the sites, from `factored`.
        projection: P.
        curvature: eigenvectors and eigenvalues by path, from `corrected`.
        damping: λ over the mean of a matrix's Λ (Grosse et al. 2023 use 0.1), above 0.

    Raises:
        ValueError: all gradients of a matrix vanish, or the damping is not above 0.
    """
    by_site = {}
    for site in chosen:
        c = curvature[site.path]
        scale = inverse_root_values(site, c, damping)
        A, B = projections.matrices(site, projection)
        left, right = (
            jnp.einsum("...mn,...mp->...np", Q, X, precision="highest")
            for Q, X in ((c.left, A), (c.right, B))
        )
        bases = jnp.asarray(c.left), jnp.asarray(c.right)
        by_site[site] = taps.Tap(left, right, projection.side, scale, bases=bases)
    return by_site


def damped(curvature: Curvature, damping: float) -> np.ndarray:
    """Returns Λ + λ, λ the damping times the mean of each matrix's eigenvalues."""
    return curvature.values + damping * curvature.values.mean(axis=(-1, -2), keepdims=True)


def inverse_root_values(site: sites.Site, curvature: Curvature, damping: float) -> jax.Array:
    """Returns (Λ + λ)^(−1/2) of a site: float32 [(L,) M, N]; see `ekfac_taps`."""
    check_invertible(site, curvature, damping)
    return jnp.asarray(damped(curvature, damping) ** -0.5, jnp.float32)


def check_invertible(site: sites.Site, curvature: Curvature, damping: float) -> None:
    """Checks that Λ + λ of a site has an inverse; raises as `ekfac_taps` does."""
    if not damping > 0:
        raise ValueError(
            f"damping={damping} of EK-FAC must be above 0, such as {DAMPING}: without it, "
            "directions that no gradient of the sample has would be scaled without bound"
        )
    if not (curvature.values.mean(axis=(-1, -2)) > 0).all():
        raise ValueError(f"{site.path} has no curvature: all gradients of the sample vanish")


def logra_taps(
    chosen: list[sites.Site], side: int, curvature: dict[str, Curvature]
) -> dict[sites.Site, taps.Tap]:
    """Makes taps of U_Aᵀ ∇L U_S, U the leading `side` eigenvectors (Choe et al. 2024).

    If a matrix has fewer rows or columns than `side`, its U is padded with zeros.
    """

    def leading(Q):
        Q = Q[..., :side]
        return jnp.asarray(np.pad(Q, [(0, 0)] * (Q.ndim - 1) + [(0, side - Q.shape[-1])]))

    return {
        s: taps.Tap(leading(curvature[s.path].left), leading(curvature[s.path].right), side)
        for s in chosen
    }


def _moments(d_BxTxN, x_BxTxM, mask_BxT):
    """Returns Σ x xᵀ and Σ δ δᵀ over the batch's positions: float32 [M, M] and [N, N].

    Positions of weight 0 are left out of both. Their δ need not be 0: attention carries the losses
    of later positions back to them.
    """
    repeats, left_over = divmod(x_BxTxM.shape[1], mask_BxT.shape[1])
    if left_over or not repeats:
        raise ValueError(
            f"a layer of shape {x_BxTxM.shape[2]} × {d_BxTxN.shape[2]} has {x_BxTxM.shape[1]} "
            f"positions, not a multiple of the sequence's {mask_BxT.shape[1]}; use exclude= to "
            "leave it out of the curvature"
        )
    mask = jnp.repeat(mask_BxT, repeats, axis=1)[..., None]
    x, d = x_BxTxM.astype(jnp.float32) * mask, d_BxTxN.astype(jnp.float32) * mask
    return _einsum("btm,btn->mn", x, x), _einsum("btm,btn->mn", d, d)


def _squares(d_BxTxN, x_BxTxM, left_MxM, right_NxN):
    """Returns Σ_i (Q_Aᵀ G_i Q_S)² over the batch's examples, float32 [M, N], and 1 for this call.

    G_i is the gradient by one call of the layer, so the squares of several calls must not be added:
    their sum lacks the products of one call with another.
    """
    xQ_BxTxM = _einsum("btm,mk->btk", x_BxTxM.astype(jnp.float32), left_MxM)
    dQ_BxTxN = _einsum("btn,nk->btk", d_BxTxN.astype(jnp.float32), right_NxN)

    def add(total, example):
        # One example at a time: the full gradients of a batch would not fit in memory.
        return total + jnp.square(_einsum("tm,tn->mn", *example)), None

    empty = jnp.zeros((xQ_BxTxM.shape[-1], dQ_BxTxN.shape[-1]), jnp.float32)
    return jax.lax.scan(add, empty, (xQ_BxTxM, dQ_BxTxN))[0], jnp.ones((), jnp.float32)


# A covariance of lower precision has other eigenvectors, so products keep full float32.
_einsum = functools.partial(jnp.einsum, precision="highest")
_watch_moments = taps.identity_with_rule(_moments)
_watch_squares = taps.identity_with_rule(_squares)


def _watch_call(layer, use, call, inputs):
    """Calls a layer and watches its product (`tda.gradients.layers.wrap_calls`)."""
    del use  # always a product: tables of tokens have no Kronecker factors
    watch = {name: variable[...] for name, variable in layer.tda_watch.items()}

    def change(y_BxTxN, x_BxTxM):
        x_BxTxM = jax.lax.stop_gradient(x_BxTxM)
        sums = watch["sum0"], watch["sum1"]
        if "left_basis" in watch:
            bases = watch["left_basis"], watch["right_basis"]
            return _watch_squares(y_BxTxN, sums, x_BxTxM, *bases)
        mask_BxT = (watch["weights"] > 0).astype(jnp.float32)
        return _watch_moments(y_BxTxN, sums, x_BxTxM, mask_BxT)

    return layers.change_product(layer, call, inputs, change)


def _sum_over_batches(
    model,
    empty: dict[sites.Site, tuple],
    bases: dict[sites.Site, tuple],
    batches: Iterable[dict],
    labels: str,
) -> tuple[dict[sites.Site, list], dict[str, int]]:
    """Sums each site's statistics, `_moments` or `_squares`, over batches.

    Args:
        model: any NNX model.
        empty: zeros in the shapes of each site's two sums.
        bases: Q_A and Q_S of each site, for `_squares`; empty for `_moments`.
        batches, labels: see `covariances`.

    Returns:
        The sums by site, and the numbers of "positions" and "examples" that count.
    """
    if labels not in ("sampled", "data"):
        raise ValueError(f"unknown labels {labels!r}; use sampled or data")
    output_fn = sampled_labels.sampled_loss if labels == "sampled" else losses.cross_entropy
    watched = nnx.clone(model)
    modules = dict(nnx.iter_modules(watched))
    for site, zeros in empty.items():
        module = modules[site.module]
        layers.wrap_calls(module, _watch_call)
        watch = {f"sum{i}": taps.Zeros(x) for i, x in enumerate(zeros)}
        if site in bases:
            watch |= zip(("left_basis", "right_basis"), map(nnx.Variable, bases[site]), strict=True)
        else:
            # A placeholder: each batch replaces it with its own weights.
            watch["weights"] = nnx.Variable(_zeros(site, 1, 1))
        module.tda_watch = nnx.Dict(watch)
    graphdef, *states = nnx.split(watched, taps.Zeros, ...)
    sums, variables = map(nnx.to_pure_dict, states)
    search = unseen.make_search(model, empty, by_position=True)

    def total(own_model, batch):
        return losses.total(own_model, batch, output_fn)

    @functools.partial(jax.jit, donate_argnums=0)
    def add(sums, variables, batch):
        unseen.refuse(search(total, batch))
        variables = jax.tree.map(lambda x: x, variables)
        for site in empty:
            if site not in bases:
                shape = (*site.stack_shape, *batch["weights"].shape)
                watch = sites.module_at(variables, site)["tda_watch"]
                watch["weights"] = jnp.broadcast_to(batch["weights"], shape)

        def watched_total(zeros):
            return total(nnx.merge(graphdef, zeros, variables), batch)

        return jax.tree.map(jnp.add, sums, jax.grad(watched_total)(sums))

    sums = jax.tree.map(jnp.copy, sums)
    count = {"positions": 0, "examples": 0}
    for i, batch in enumerate(batches):
        count["positions"] += int((batch["weights"] > 0).sum())
        count["examples"] += int((batch["weights"] > 0).any(axis=1).sum())
        sums = add(sums, variables, batch)
        if bases and i == 0:
            _check_called_once(_by_site(sums, empty))
    return _by_site(sums, empty), count


def _by_site(sums: dict, chosen: Iterable[sites.Site]) -> dict[sites.Site, list]:
    watches = {s: sites.module_at(sums, s)["tda_watch"] for s in chosen}
    return {s: [watch["sum0"], watch["sum1"]] for s, watch in watches.items()}


def _check_called_once(sums: dict[sites.Site, list]) -> None:
    """Checks the calls that `_squares` counted in one batch, those of a scan included."""
    several = [s.path for s, (_, calls) in sums.items() if np.max(sharding.to_host(calls)) > 1]
    if several:
        raise ValueError(
            f"the layer of {', '.join(several)} is called several times in a forward pass, but "
            "EK-FAC's eigenvalues need one call, whose gradient is the example's; leave it out "
            "(exclude=), or choose another method for it"
        )
