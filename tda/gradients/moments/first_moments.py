"""The optimizer's momentum as an encoding: P·(m/√V), from a checkpoint's state."""

import jax.numpy as jnp
import numpy as np

from tda.gradients import encoder as encoders
from tda.gradients import projection as projections
from tda.gradients import sites, together, whole_gradients
from tda.gradients.moments import optimizer_state
from tda.gradients.moments.optimizer_state import SecondMomentError
from tda.gradients.moments.second_moments import Scale


def read(root, chosen: list[sites.Site], step: int | None = None) -> dict:
    """The first moment m of every site, float32 in the parameter's shape, by path.

    Raises:
        SecondMomentError: the optimizer keeps none of a parameter.
        tda.training.checkpoint.CheckpointError: no checkpoint, or one without optimizer state.
    """
    flat = optimizer_state.load(root, {s.path for s in chosen}, step, ("mu",))
    fields = {s.path: optimizer_state.find(flat, s.path, {}).fields for s in chosen}
    lacking = [path for path, found in fields.items() if "mu" not in found]
    if lacking:
        raise SecondMomentError(
            f"the optimizer's state has no first moments (mu) of {', '.join(lacking[:5])}: only "
            "Adam and its kin keep them; LESS needs them"
        )
    return {path: jnp.asarray(found["mu"], jnp.float32) for path, found in fields.items()}


def projected(
    root,
    chosen: list[sites.Site],
    projection: projections.Projection,
    scales: dict[str, Scale] | None,
    step: int | None = None,
) -> np.ndarray:
    """P·(m/√V), float32 [E]: what the encoder would make of m were it a gradient.

    Args:
        root: the directory of checkpoints.
        chosen, projection, scales: as the encoder has them.
        step: None for the last checkpoint.
    """
    moments = read(root, chosen, step)
    parts = {
        site: whole_gradients.project(
            site, moments[site.path][None], end.left, end.right, end.scale, projection.side
        )
        for site, end in encoders.ends_of(chosen, projection, scales).items()
    }
    return np.asarray(together.pool(projections.layout(chosen, projection), parts)[0])
