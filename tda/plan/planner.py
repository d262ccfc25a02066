"""Estimates a run in advance: operations and seconds of its stages, memory and disk."""

import os
import pathlib
import shutil

import jax

from tda.gradients import encoder as encoders
from tda.gradients.projection import Projection
from tda.plan import calibration, chips, cost, setting
from tda.plan.setting import Setting
from tda.run import train
from tda.runtime import sharding


def run(
    config,
    workdir: str | None = None,
    *,
    hardware: chips.Hardware | None = None,
    mfu: float = 0.4,
    reading: float = 1e9,
    host_memory: float | None = None,
    disk: float | None = None,
) -> dict:
    """Returns all figures of the plan, as JSON values.

    Args:
        config: of a run.
        workdir: where the stores will be; the free space of its disk is the limit.
        hardware: the machine that it will run on; None for this one, which is measured.
        mfu: assumed share of the chips' peak rate.
        reading: rate at which a store is read, in bytes/s.
        host_memory: bytes of the host; this machine's where None and nothing else is named.
        disk: bytes free for stores; those of the workdir's disk where None.

    Raises:
        ValueError: the corpus cannot be read, a flag or key is out of range.
    """
    if jax.process_count() > 1:
        raise ValueError("a plan is the work of one process: start it without --distributed")
    if not 0 < mfu <= 1:
        raise ValueError(f"--mfu={mfu} must be above 0 and at most 1")
    here = hardware is None
    devices = jax.device_count() if here else hardware.chips
    parts = config.mesh.fsdp * config.mesh.tensor
    if devices % parts:
        raise ValueError(
            f"mesh.fsdp × mesh.tensor = {parts} does not divide {devices} devices; change the "
            "mesh, or give --hardware"
        )
    mesh = train.working_mesh(config) if here else None
    s = setting.of(config, sharding.batch_devices(mesh) if here else devices // config.mesh.tensor)
    if here:
        host_memory = host_memory or _memory()
        device_memory = _device_memory() or host_memory
    else:
        device_memory = hardware.chip.memory
    if disk is None and (here or workdir):
        disk = _free(workdir or ".")
    r_memory = cost.hessian_bytes(s.widths, *s.hessians()) if s.hessians()[0] else 0
    stores = s.stores * s.stored_bytes(s.passages + s.queries)
    needs = {
        "parameters and projections on a device": (s.held() / parts, device_memory),
        "R, its roots and eigenvectors": (r_memory, host_memory),
        "eigenvectors of a block of R on a device": (
            cost.eigen_bytes(max(s.widths)) if r_memory else 0,
            device_memory,
        ),
        "stores on disk": (stores, disk),
    }
    lacking = cost.lacking(needs)
    measured = None
    if here and not lacking:
        measured = _measure(config, s, mesh)
        most = max(t.memory for t in measured["encoder"].values())
        needs["encoding a batch on a device"] = (most, device_memory)
        lacking = cost.lacking(needs)
    return {
        "setting": s.figures(),
        "hardware": _named(hardware, mfu, devices),
        "stages": _stages(s, hardware, mfu, devices, reading, measured),
        "disk": _disk(s, reading),
        "needs": {k: {"needed": n, "there": t} for k, (n, t) in needs.items()},
        "lacking": lacking,
        "left_out": s.left_out,
    }


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


def _named(hardware: chips.Hardware | None, mfu: float, devices: int) -> dict:
    if hardware is None:
        kind = jax.devices()[0].device_kind
        return {"title": f"this machine, {devices} × {kind}", "devices": devices, "measured": True}
    return {
        "title": hardware.title,
        "devices": devices,
        "measured": False,
        "peak": hardware.chip.bfloat16,
        "memory": hardware.chip.memory,
        "mfu": mfu,
    }


def _measure(config, s: Setting, mesh) -> dict:
    """Measures how fast this machine encodes, by the corrections of a pass, and multiplies."""
    times_by_pass: dict[tuple, calibration.EncoderTimes] = {}
    model = train.build_model(config, s.vocab_size)
    projection = Projection(**dict(config.projection))
    for corrections in dict.fromkeys([*s.passes, *((c,) for c in s.taps)]):
        # Corrections of the same count take the same time: none and factored.
        counts = [s.taps[c] for c in corrections]
        alike = next((p for p in times_by_pass if [s.taps[c] for c in p] == counts), None)
        if alike is None:
            ones = (calibration.ones(s.sites, c) for c in corrections)
            taps_of_kinds = (encoders.make_taps(s.sites, projection, scales) for scales in ones)
            kinds = [(projection, taps) for taps in taps_of_kinds]
            encoder = encoders.build_encoder(model, kinds, config.gradients.output, mesh)
            times = calibration.encoder_times(encoder, s.shapes, s.vocab_size, mesh)
        times_by_pass[corrections] = times if alike is None else times_by_pass[alike]
    products = calibration.product_times(s.width, max(s.widths), s.queries)
    return {"encoder": times_by_pass, "products": products}


def _stages(s: Setting, hardware, mfu, devices, reading, measured) -> list[dict]:
    """Operations, devices and seconds of every stage; seconds None where nothing was measured."""
    out = []

    def add(name, operations, count, seconds, **more):
        out.append(
            {"stage": name, "operations": operations, "devices": count, "seconds": seconds} | more
        )

    rates = measured and measured["products"]
    if hardware:
        peak = hardware.chip.float32 * mfu
        rates = calibration.ProductTimes(peak, peak, peak)

    def encode(name, corrections, shapes, tokens=None):
        operations = cost.encoding_operations(s.model, [s.taps[c] for c in corrections], shapes)
        if hardware:
            seconds = operations / (devices * hardware.chip.bfloat16 * mfu)
        else:
            seconds = measured and measured["encoder"][corrections].seconds(shapes)
        if shapes:
            rate = tokens / seconds if tokens and seconds else None
            named = " and ".join(corrections)
            add(f"encode {name}, {named}", operations, devices, seconds, rate=rate)

    for corrections in s.passes:
        encode("corpus", corrections, s.shapes, s.tokens)
    for correction in s.taps:
        encode("queries", (correction,), s.query_shapes)
        if s.decompositions(correction)[0] and not s.has_store:
            # Without a store R has the passages that it is taken of encoded for it.
            share = s.r_rows / s.passages
            shapes = {shape: share * count for shape, count in s.shapes.items()}
            encode("corpus for R", (correction,), shapes, share * s.tokens)
    gram = cost.gram_operations(s.widths, 1)
    # R is the work of one device, the search that of the first host's.
    near = min(devices, hardware.chip.host) if hardware else jax.local_device_count()
    for correction, methods in s.methods.items():
        roots, decompositions = s.decompositions(correction)
        if roots:
            eigen = decompositions * cost.eigen_operations(s.widths)
            summed = gram * s.r_rows
            read = s.stored_bytes(s.r_rows) / reading
            seconds = rates and max(read, summed / rates.gram) + eigen / rates.eigen
            add(f"R, {correction}", summed + eigen, 1, seconds)
        rows = s.passages + s.size.labelled
        whitened = gram * rows * sum(m.hessian != "none" for m in methods)
        scored = cost.score_operations(s.width, rows, s.queries) * len(methods)
        read = s.stored_bytes(rows) / reading
        seconds = rates and max(read, (whitened / rates.gram + scored / rates.scores) / near)
        add(f"exact search, {correction}", whitened + scored, near, seconds)
    return out


def _disk(s: Setting, reading: float) -> dict:
    """Bytes of rows, stores and indexes, and seconds of a scan, by dtype."""
    by_dtype = {}
    for dtype in cost.NUMBER_BYTES:
        row = cost.row_bytes(s.widths, dtype)
        by_dtype[dtype] = {
            "row": row,
            "store": row * s.passages,
            "scan_seconds": row * s.passages / reading,
            "index": (row + cost.code_bytes(s.width)) * s.passages,
        }
    codes = cost.code_bytes(s.width) * s.passages
    return {
        "stores": s.stores,
        "dtype": s.store_dtype,
        "reading": reading,
        "codes": codes,
        **by_dtype,
    }
