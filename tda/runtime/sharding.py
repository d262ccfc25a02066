"""The device mesh and its axis rules: no other module names an axis of the mesh.

Other modules describe arrays by *logical* axes ("batch", "embed", "heads", …); `RULES` maps these
to axes of the mesh. The mesh is always `Auto`: GSPMD propagates layouts to all other arrays.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

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
    """Returns a mesh with the axes `MESH_AXES` over `devices` (all devices by default).

    Args:
        data: devices along the data axis; -1 for all devices divided by the other two axes.
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


def check_mesh(mesh: Mesh | None) -> None:
    """Checks that a mesh is None, or one that the axis rules can lay out arrays on.

    Raises:
        ValueError: it is no mesh, has an axis that no rule uses, or is not `Auto`.
    """
    if mesh is None:
        return
    remedy = "give one of tda.runtime.sharding.make_mesh, or None"
    if not isinstance(mesh, Mesh):
        raise ValueError(f"mesh={mesh!r}; {remedy}")
    if unknown := [name for name in mesh.axis_names if name not in MESH_AXES]:
        raise ValueError(
            f"mesh has the axis {unknown[0]!r}, and axes may be {', '.join(MESH_AXES)}; {remedy}"
        )
    if any(kind != AxisType.Auto for kind in mesh.axis_types):
        raise ValueError(f"mesh has axes of the types {mesh.axis_types}, not Auto; {remedy}")


def spec(axes, shape=None, mesh: Mesh | None = None) -> PartitionSpec:
    """Returns the PartitionSpec of an array with the given logical axes.

    None is an axis that is replicated, `...` one that the compiler lays out freely. An axis
    is replicated too if its mesh axes are taken by an earlier axis or, with `shape` and `mesh`, if
    its size is not a multiple of the devices along them.
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
    """Returns the sharding of an array with the given logical axes on a mesh; see `spec`."""
    return NamedSharding(mesh, spec(axes, shape, mesh))


def batch_devices(mesh: Mesh) -> int:
    """Returns the devices that the batch axis is split over; they must divide batch sizes."""
    return math.prod(mesh.shape.get(n, 1) for n in RULES["batch"])


def devices_of_batch(examples: int) -> int:
    """Returns the number of devices of the current mesh that a batch is split over."""
    mesh = jax.sharding.get_abstract_mesh()
    # A caller's own mesh may have other axes.
    devices = math.prod(mesh.shape.get(n, 1) for n in RULES["batch"])
    return devices if examples % devices == 0 else 1


def is_accelerated() -> bool:
    """Returns whether programs are compiled for another device than a CPU."""
    return jax.default_backend() != "cpu"


def usual_dtype() -> str:
    """Returns the dtype that a model computes in by default: bfloat16 on accelerators.

    Their matrix units multiply bfloat16 several times as fast as float32.
    """
    return "bfloat16" if is_accelerated() else "float32"


def explicit_spec(x) -> PartitionSpec | None:
    """Returns the layout in the type of an array on an Explicit mesh; None on any other mesh."""
    layout = jax.typeof(x).sharding
    return layout.spec if AxisType.Explicit in layout.mesh.axis_types else None


def _explicit_devices(x) -> int:
    """Returns the number of devices of an Explicit mesh that share the first axis of an array."""
    layout = jax.typeof(x).sharding
    names = layout.spec[0] or ()
    return math.prod(layout.mesh.shape[n] for n in ([names] if isinstance(names, str) else names))


def reshape_examples(x, *shape: int) -> jax.Array:
    """Reshapes an array whose first axis devices may share; they share the result's first axis.

    On an Explicit mesh jax does not choose the layout of a reshaped array by itself.
    """
    spec = explicit_spec(x)
    return jnp.reshape(x, shape, out_sharding=None if spec is None else PartitionSpec(spec[0]))


def map_in_portions(function, batch, numbers: int, limit: int):
    """Maps a function over a batch, a few examples at a time on every device.

    Args:
        function: maps arrays [D, C, …], C examples on each of D devices, to such arrays.
        batch: a tree of arrays [B, …].
        numbers: the numbers that `function` holds for each example.
        limit: the most numbers that a device may hold at once (one example is always allowed).

    Returns:
        The function's results as arrays [B, …].
    """
    first = jax.tree.leaves(batch)[0]
    examples, spec = len(first), explicit_spec(first)
    devices = devices_of_batch(examples) if spec is None else _explicit_devices(first)
    per_device = examples // devices
    # A divisor, since every step of `lax.map` has the same shape.
    fitting = (n for n in range(2, per_device + 1) if per_device % n == 0 and n * numbers <= limit)
    portion = max(fitting, default=1)

    def split(x):
        """Returns [turns, D, C, …] of [B, …]: in every turn each device has its own examples."""
        x = reshape_examples(x, devices, per_device // portion, portion, *x.shape[1:])
        x = jnp.swapaxes(x, 0, 1)
        # The type of an array on an Explicit mesh states its layout already.
        return x if spec is not None else constrain(x, None, "batch", *[...] * (x.ndim - 2))

    def join(x):
        return reshape_examples(jnp.swapaxes(x, 0, 1), -1, *x.shape[3:])

    return jax.tree.map(join, jax.lax.map(function, jax.tree.map(split, batch)))


def put_batch(mesh: Mesh, arrays: dict) -> dict:
    """Puts a batch's arrays, each [B, T], on the mesh, B split over its batch devices.

    If the mesh spans processes, each of them gives the same arrays and keeps its part.
    """
    return {k: put_leading(mesh, v) for k, v in arrays.items()}


def put_leading(mesh: Mesh, x):
    """Puts an array on the mesh, its first axis split over the batch devices."""
    return _put(x, named(mesh, ("batch", *[None] * (x.ndim - 1)), x.shape))


def replicate(mesh: Mesh, x):
    """Puts a copy of an array on every device of the mesh."""
    return _put(x, named(mesh, (None,) * x.ndim, x.shape))


def _put(x, layout: NamedSharding):
    # `device_put` refuses a host array for devices of other processes.
    if layout.is_fully_addressable:
        return jax.device_put(x, layout)
    return jax.make_array_from_callback(x.shape, layout, lambda index: x[index])


def to_host(x) -> np.ndarray:
    """Copies an array to this process's memory, from the devices of all processes.

    If the array spans processes, this is a collective: all of them must call it.
    """
    if x.is_fully_addressable:
        return np.asarray(x)
    return multihost_utils.process_allgather(x, tiled=True)


def host_device() -> jax.Device:
    """Returns the CPU; where JAX_PLATFORMS leaves it out, the first local device."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return jax.local_devices()[0]


def is_local(mesh: Mesh | None) -> bool:
    """Returns whether all of the mesh's devices are this process's; true without a mesh."""
    index = jax.process_index()
    return mesh is None or all(d.process_index == index for d in mesh.devices.flat)


def constrain(x, *axes):
    """Returns `x` with a layout stated by logical axes; `x` unchanged if no mesh is set."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or math.prod(mesh.shape.values()) == 1:
        return x
    return jax.lax.with_sharding_constraint(x, spec(axes, x.shape, mesh))
