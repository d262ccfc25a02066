"""The device mesh and the one table of axis rules. Nothing else names a mesh axis.

Arrays elsewhere are described by *logical* axes ("batch", "embed", "heads", ...); `RULES` says over
which axes of the mesh each is laid out. The mesh is always `Auto`: GSPMD propagates the rest.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("data", "fsdp", "tensor")

# Logical axis -> mesh axes. An axis that is absent here (or None) is replicated.
RULES = {
    "batch": ("data", "fsdp"),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
}


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices=None) -> Mesh:
    """A mesh of axes `MESH_AXES` over `devices` (all devices by default).

    Args:
        data: devices along the data axis; -1 takes what the other two leave over.
        fsdp: devices over which parameters are split and gathered layer by layer.
        tensor: devices over which heads, feed-forward width and vocabulary are split.
        devices: the devices to use, in order.

    Raises:
        ValueError: the sizes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    if data == -1:
        data = max(1, len(devices) // (fsdp * tensor))
    if data * fsdp * tensor != len(devices):
        raise ValueError(
            f"mesh data={data} × fsdp={fsdp} × tensor={tensor} needs {data * fsdp * tensor} "
            f"devices, there are {len(devices)}"
        )
    auto = (jax.sharding.AxisType.Auto,) * len(MESH_AXES)
    return jax.make_mesh((data, fsdp, tensor), MESH_AXES, axis_types=auto, devices=devices)


def spec(axes, shape=None, mesh: Mesh | None = None) -> PartitionSpec:
    """The PartitionSpec of an array whose logical axes are `axes`.

    None is an axis that is replicated, `...` one that the compiler may lay out as it likes.

    With `shape` and `mesh`, an axis whose size the mesh does not divide is left replicated, and so
    is one whose mesh axes an earlier axis already took.
    """
    used, out = set(), []
    for i, axis in enumerate(axes):
        if axis is ...:
            out.append(PartitionSpec.UNCONSTRAINED)
            continue
        names = RULES.get(axis) or ()
        names = tuple(n for n in names if n not in used)
        if mesh is not None:
            names = tuple(n for n in names if n in mesh.shape)
            size = math.prod(mesh.shape[n] for n in names)
            if shape is not None and shape[i] % size:
                names = ()
        used.update(names)
        out.append(names if names else None)
    return PartitionSpec(*out)


def named(mesh: Mesh, axes, shape=None) -> NamedSharding:
    """`spec` on a concrete mesh."""
    return NamedSharding(mesh, spec(axes, shape, mesh))


def batch_devices(mesh: Mesh) -> int:
    """Over how many devices the batch axis is split: batch sizes must be a multiple of it."""
    return math.prod(mesh.shape[n] for n in RULES["batch"])


def devices_of_batch(examples: int) -> int:
    """Over how many devices of the mesh that is set a batch of so many examples is split."""
    mesh = jax.sharding.get_abstract_mesh()
    devices = 1 if mesh.empty else batch_devices(mesh)
    return devices if examples % devices == 0 else 1


def map_in_portions(work, batch, numbers: int, most: int):
    """`work` over a batch, a few examples at a time on every device.

    Args:
        work: of arrays [D, C, …], C examples of each of D devices, makes such arrays.
        batch: a tree of arrays [B, …].
        numbers: what `work` holds of each example.
        most: what a device may hold at once (but one example's at least).

    Returns:
        What `work` makes, as arrays [B, …].
    """
    examples = jax.tree.leaves(batch)[0].shape[0]
    devices = devices_of_batch(examples)
    own = examples // devices
    fitting = (n for n in range(2, own + 1) if own % n == 0 and n * numbers <= most)
    together = max(fitting, default=1)

    def cut(x):
        """Every device's own examples, some in every turn: [turns, D, C, …]."""
        x = jnp.swapaxes(x.reshape(devices, own // together, together, *x.shape[1:]), 0, 1)
        return constrain(x, None, "batch", *[...] * (x.ndim - 2))

    def whole(x):
        return jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[3:])

    return jax.tree.map(whole, jax.lax.map(work, jax.tree.map(cut, batch)))


def put_batch(mesh: Mesh, arrays: dict) -> dict:
    """A batch's arrays, each [B, T], with B split over the mesh's batch devices.

    Where the mesh spans processes, each of them gives the same arrays and keeps its own part.
    """
    return {k: _put(v, named(mesh, ("batch", None), v.shape)) for k, v in arrays.items()}


def put_leading(mesh: Mesh, x):
    """An array with its first axis split over the mesh's batch devices."""
    return _put(x, named(mesh, ("batch", *[None] * (x.ndim - 1)), x.shape))


def replicate(mesh: Mesh, x):
    """An array, whole on every device of the mesh."""
    return _put(x, named(mesh, (None,) * x.ndim, x.shape))


def _put(x, layout: NamedSharding):
    if layout.is_fully_addressable:
        return jax.device_put(x, layout)
    return jax.make_array_from_callback(x.shape, layout, lambda index: x[index])


def to_host(x) -> np.ndarray:
    """All of an array in this process's memory, whichever processes' devices it is on."""
    if x.is_fully_addressable:
        return np.asarray(x)
    return multihost_utils.process_allgather(x, tiled=True)


def is_local(mesh: Mesh | None) -> bool:
    """Whether all of the mesh's devices are this process's; true of no mesh."""
    mine = jax.process_index()
    return mesh is None or all(d.process_index == mine for d in mesh.devices.flat)


def constrain(x, *axes):
    """`x` with its layout stated by logical axes; `x` itself where no mesh is set."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or math.prod(mesh.shape.values()) == 1:
        return x
    return jax.lax.with_sharding_constraint(x, spec(axes, x.shape, mesh))
