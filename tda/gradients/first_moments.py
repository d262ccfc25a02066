"""The optimizer's momentum as an encoding: P·(m/√V), from a checkpoint's state."""

import jax.numpy as jnp
import numpy as np

from tda import checkpoint
from tda.gradients import encoder as encoders
from tda.gradients import projection as projections
from tda.gradients import sites, together, whole_gradients
from tda.gradients.optimizer_state import SecondMomentError
from tda.gradients.second_moments import Scale
from tda.model.functional import flat_parameters


def read(root, chosen: list[sites.Site], step: int | None = None) -> dict:
    """The first moment m of every site, float32 in the parameter's shape, by path.

    Raises:
        SecondMomentError: the optimizer keeps none of a parameter, or more than one.
        tda.checkpoint.CheckpointError: no checkpoint, or one without optimizer state.
    """
    wanted = {f"mu/{s.path}": s.path for s in chosen}

    def named(name: str) -> list[str]:
        return [p for end, p in wanted.items() if name == end or name.endswith("/" + end)]

    flat = flat_parameters(checkpoint.restore_optimizer(root, lambda n: bool(named(n)), step))
    found: dict = {}
    for name, x in flat.items():
        for path in named(name):
            if x is ...:
                continue
            if path in found:
                raise SecondMomentError(f"the optimizer's state has first moments of {path} twice")
            found[path] = jnp.asarray(x, jnp.float32)
    lacking = [s.path for s in chosen if s.path not in found]
    if lacking:
        raise SecondMomentError(
            f"the optimizer's state has no first moments (mu) of {', '.join(lacking[:5])}: only "
            "Adam and its kin keep them; LESS needs them"
        )
    return found


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
