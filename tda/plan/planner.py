"""Estimates a run in advance: operations and seconds of its stages, memory and disk."""

import dataclasses
import os
import pathlib
import shutil

import jax

from tda import hessian, store
from tda.gradients import encoder as encoders
from tda.plan import calibration, chips, cost, setting
from tda.plan.setting import Setting
from tda.plan.stages import Machine, list_stages
from tda.retrieval.scann.settings import REORDER_BYTES
from tda.run import train
from tda.run.run import projection_of
from tda.runtime import sharding


def run(
    config,
    workdir: str | None = None,
    *,
    hardware: chips.Hardware | None = None,
    mfu: float = 0.4,
    reading: float = 1e9,
    tokenising: float = 3e5,
    host_memory: float | None = None,
    disk: float | None = None,
) -> dict:
    """Returns all figures of the plan, as JSON values.

    Args:
        config: the config of a run.
        workdir: the run's directory, whose disk will hold the stores.
        hardware: the machine that will run it; None for this one, which is measured.
        mfu: assumed share of the chips' peak rate.
        reading: rate at which a host reads a store, in bytes/s.
        tokenising: tokens/s of a CPU of a host; not used for this machine, where it is measured.
        host_memory: bytes of a host; by default those of this machine, or of the chips' usual host.
        disk: bytes free for stores; by default those of the workdir's disk.

    Raises:
        ValueError: the corpus cannot be read, or a flag or key is out of range.
    """
    if jax.process_count() > 1:
        raise ValueError("a plan runs in one process; start it without --distributed")
    if not 0 < mfu <= 1:
        raise ValueError(f"--mfu={mfu} must be above 0 and at most 1")
    rates = {"reading": reading, "tokenising": tokenising, "host_memory": host_memory}
    if wrong := [f"--{name}" for name, x in rates.items() if x is not None and x <= 0]:
        raise ValueError(f"{', '.join(wrong)} must be above 0")
    here = hardware is None
    if not here and config.model.dtype == "auto":
        config = config.copy_and_resolve_references()
        config.model.dtype = "bfloat16"  # named hardware is an accelerator
    devices = jax.device_count() if here else hardware.chips
    parts = config.mesh.fsdp * config.mesh.tensor
    if devices % parts:
        raise ValueError(
            f"mesh.fsdp × mesh.tensor = {parts} does not divide {devices} devices; change the "
            "mesh, or give --hardware"
        )
    mesh = train.working_mesh(config) if here else None
    split = sharding.batch_devices(mesh) if here else devices // config.mesh.tensor
    s = setting.of(config, split, workdir)
    host_memory = host_memory or (
        _memory() if here else hardware.chip.host.memory * hardware.host_share
    )
    device_memory = (_device_memory() or host_memory) if here else hardware.chip.memory
    if disk is None and (here or workdir):
        disk = _free(workdir or ".")
    machine = Machine(hardware, devices, mfu, reading, tokenising)
    needs = _needs(s, parts, device_memory, host_memory, disk)
    lacking = cost.lacking(needs)
    # If something does not fit already, measuring might run out of memory.
    if here and not lacking:
        machine = _measure(config, s, machine, mesh)
        most = max(t.memory for t in machine.encoders.values())
        needs["encoding a batch on a device"] = (most, device_memory)
        lacking = cost.lacking(needs)
    return {
        "setting": s.figures(),
        "hardware": _named(machine, s.dtype),
        "stages": list_stages(s, machine),
        "disk": _disk(s, reading),
        "needs": {k: {"needed": n, "there": t} for k, (n, t) in needs.items()},
        "lacking": lacking,
        "warnings": [
            *_warnings(hardware, config.mesh.fsdp, config.mesh.tensor),
            *_structure_warnings(s, host_memory),
        ],
        "left_out": s.left_out,
    }


def _needs(
    s: Setting, parts: int, device_memory: float, host_memory: float, disk: float | None
) -> dict[str, tuple[float, float | None]]:
    """Returns the bytes that each thing takes, and those that are there (None: not known)."""
    return {
        "parameters and projections on a device": (s.held() / parts, device_memory),
        "R, its roots and eigenvectors on a host": (s.r_memory(), host_memory),
        "two shards of gradients on a host": (s.shard_memory(), host_memory),
        "eigenvectors of a block of R on a device": (
            cost.eigen_bytes(s.largest_factor) if s.hessians()[0] else 0,
            device_memory,
        ),
        "stores on disk": (
            len(s.taps) * s.stored_bytes(s.size.passages + s.size.queries),
            disk,
        ),
    }


def _warnings(hardware: chips.Hardware | None, fsdp: int, tensor: int) -> list[str]:
    """Returns a warning if the mesh makes hosts wait for each other."""
    if hardware is None or hardware.hosts == 1:
        return []
    host = hardware.chip.host.chips
    if host % (fsdp * tensor) == 0:
        return []
    return [
        f"mesh.fsdp={fsdp} × mesh.tensor={tensor} do not divide the {host} chips of a host: all "
        "hosts encode every shard together, and every row travels to every host; where the model "
        f"fits, let their product divide {host}, and each host encodes shards of its own"
    ]


def _structure_warnings(s: Setting, host_memory: float) -> list[str]:
    """Returns how R would fit, if it is dense and too large."""
    is_dense = s.r_blocks == hessian.dense_shapes(s.widths)
    if not is_dense or s.r_memory() <= host_memory:
        return []
    if any(len(shape) == 2 for shape in s.blocks):
        needed = cost.as_bytes(cost.hessian_bytes(s.blocks, *s.hessians()))
        return [f"a dense R does not fit on a host; hessian.structure=kronecker needs {needed}"]
    return [
        "a dense R does not fit on a host; with projection.pooling=matrix, "
        "hessian.structure=kronecker takes 2·k² numbers a matrix in place of k⁴"
    ]


def _memory() -> float:
    """Returns the bytes of memory of this machine, or of its container."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = pathlib.Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else "max"
    return min(total, int(text)) if text.isdigit() else total


def _device_memory() -> float | None:
    """Returns the bytes of a device's own memory; None if it has none (a CPU)."""
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")


def _free(path: str) -> float:
    """Returns the free bytes of the disk that `path` is or will be on."""
    folder = pathlib.Path(path).resolve()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _named(machine: Machine, dtype: str) -> dict:
    hardware = machine.hardware
    described = {"devices": machine.devices, "measured": hardware is None}
    if hardware is None:
        title = f"this machine, {machine.devices} × {jax.devices()[0].device_kind}"
        return {"title": title} | described
    peak = hardware.chip.peak(dtype)
    return {"title": hardware.title, "peak": peak, "mfu": machine.mfu} | described


def _measure(config, s: Setting, machine: Machine, mesh: jax.sharding.Mesh) -> Machine:
    """Measures this machine's encoding, for each pass's corrections, and its products."""
    vocab_size = s.size.vocab_size
    model = train.build_model(config, vocab_size)
    projection = projection_of(config)
    # Equal taps, such as those of none and factored, take the same time: measured once.
    times_by_taps: dict[tuple[cost.Taps, ...], calibration.EncoderTimes] = {}
    times_by_pass = {}
    for corrections in [*s.passes, *((c,) for c in s.taps)]:
        key = tuple(s.taps[c] for c in corrections)
        if key not in times_by_taps:
            ones = (calibration.ones(s.sites, c) for c in corrections)
            kinds = [(projection, encoders.make_taps(s.sites, projection, x)) for x in ones]
            encoder = encoders.build_encoder(model, kinds, config.gradients.output, mesh)
            times_by_taps[key] = calibration.encoder_times(encoder, s.shapes, vocab_size, mesh)
        times_by_pass[corrections] = times_by_taps[key]
    products = calibration.product_times(s.width, s.largest_factor, s.size.queries)
    return dataclasses.replace(machine, encoders=times_by_pass, measured_products=products)


def _disk(s: Setting, reading: float) -> dict:
    """Returns the bytes of rows, stores and indices, and the seconds of a scan, by dtype."""
    code, passages = cost.code_bytes(s.width), s.size.passages
    by_dtype = {}
    for dtype in store.DTYPES:
        row = s.form(dtype).row_bytes
        by_dtype[dtype] = {
            "row": row,
            "store": row * passages,
            "scan_seconds": row * passages / reading,
            # ScaNN reorders by one byte a number at least.
            "index": (s.width * REORDER_BYTES.get(dtype, 1) + code) * passages,
        }
    return {
        "stores": len(s.taps) * s.has_store,
        "dtype": s.store_dtype,
        "rank": s.store_rank,
        "reading": reading,
        "codes": code * passages,
        **by_dtype,
    }
