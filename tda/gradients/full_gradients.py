"""Parameters that no tap can be put on: each example's full gradient is formed and projected."""

import jax
import jax.numpy as jnp
from flax import traverse_util

from tda.gradients import sites


def split_parameters(variables: dict, sites_: list[sites.Site]) -> tuple[dict, dict]:
    """Splits a nested dict into the arrays of some sites, by path, and all others, by path."""
    flat = traverse_util.flatten_dict(variables, keep_empty_nodes=True)
    paths = {(*s.module, s.parameter) for s in sites_}
    rest = {path: x for path, x in flat.items() if path not in paths}
    return rest, {path: flat[path] for path in paths}


def join_parameters(rest: dict, parameters: dict) -> dict:
    """Joins what `split_parameters` returns to the nested dict that it split."""
    return traverse_util.unflatten_dict(rest | parameters)


def project(site: sites.Site, gradients, left, right, scale, side: int):
    """Projects the full gradient of every example.

    Args:
        site: the parameter's.
        gradients: [B, …] with the parameter's own axes.
        left, right: A and B, float32 [(L,) M, R·k] and [(L,) N, R·k].
        scale: 1/√V of every weight, [(L,) M, N], or None.
        side: k.

    Returns:
        float32 [(L,) B, k, k].
    """
    G = jax.vmap(site.matrix)(gradients).astype(jnp.float32)
    G = G if scale is None else G * scale
    left = left.reshape(*left.shape[:-1], -1, side)
    right = right.reshape(*right.shape[:-1], -1, side)
    # Gradients come first, with their columns summed over: any other order would transpose them.
    dims = ((3,), (1,)), ((1,), (0,))
    if site.stack is None:
        G, left, right = G[:, None], left[None], right[None]
    flat = right.reshape(*right.shape[:2], -1)
    GB = jax.lax.dot_general(G, flat, dims, precision="highest")
    GB = GB.reshape(*GB.shape[:-1], *right.shape[2:])
    projected = jnp.einsum("lbmrq,lmrp->lbpq", GB, left, precision="highest")
    return projected[0] if site.stack is None else projected
