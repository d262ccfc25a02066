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
from tda.retrieval.scann.settings import REORDER_BYTES
from tda.run import train
from tda.run.run import projection_of
from tda.runtime import sharding


@dataclasses.dataclass(frozen=True)
class Rates:
    """Rates of a host's work outside its chips."""

    reading: float
    """Bytes/s from a store."""
    tokenising: float
    """Tokens/s of a CPU."""


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
    if here:
        host_memory = host_memory or _memory()
        device_memory = _device_memory() or host_memory
    else:
        device_memory = hardware.chip.memory
        host_memory = host_memory or hardware.chip.host.memory * hardware.host_share
    if disk is None and (here or workdir):
        disk = _free(workdir or ".")
    r_memory = cost.hessian_bytes(s.r_blocks, *s.hessians()) if s.hessians()[0] else 0
    stores = len(s.taps) * s.stored_bytes(s.size.passages + s.size.queries)
    needs = {
        "parameters and projections on a device": (s.held() / parts, device_memory),
        "R, its roots and eigenvectors on a host": (r_memory, host_memory),
        "two shards of gradients on a host": (s.shard_memory(), host_memory),
        "eigenvectors of a block of R on a device": (
            cost.eigen_bytes(s.largest_factor) if r_memory else 0,
            device_memory,
        ),
        "stores on disk": (stores, disk),
    }
    lacking = cost.lacking(needs)
    measured = None
    # If something does not fit already, measuring might run out of memory.
    if here and not lacking:
        measured = _measure(config, s, mesh)
        most = max(t.memory for t in measured["encoder"].values())
        needs["encoding a batch on a device"] = (most, device_memory)
        lacking = cost.lacking(needs)
    return {
        "setting": s.figures(),
        "hardware": _named(hardware, s.dtype, mfu, devices),
        "stages": _stages(s, hardware, mfu, devices, Rates(reading, tokenising), measured),
        "disk": _disk(s, reading),
        "needs": {k: {"needed": n, "there": t} for k, (n, t) in needs.items()},
        "lacking": lacking,
        "warnings": [
            *_warnings(hardware, config.mesh.fsdp, config.mesh.tensor),
            *_structure_warnings(s, r_memory, host_memory),
        ],
        "left_out": s.left_out,
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


def _structure_warnings(s: Setting, r_memory: int, host_memory: float | None) -> list[str]:
    """Returns how R would fit, if it is dense and too large."""
    is_dense = s.r_blocks == hessian.dense_shapes(s.widths)
    if not is_dense or host_memory is None or r_memory <= host_memory:
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


def _named(hardware: chips.Hardware | None, dtype: str, mfu: float, devices: int) -> dict:
    described = {"devices": devices, "measured": hardware is None}
    if hardware is None:
        title = f"this machine, {devices} × {jax.devices()[0].device_kind}"
        return {"title": title} | described
    return {"title": hardware.title, "peak": hardware.chip.peak(dtype), "mfu": mfu} | described


def _measure(config, s: Setting, mesh) -> dict:
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
    return {"encoder": times_by_pass, "products": products}


def _stages(s: Setting, hardware, mfu, devices, host_rates: Rates, measured) -> list[dict]:
    """Returns operations, devices and seconds of every stage; seconds None if not measured.

    A job occupies all its chips while it runs, even in a stage that does not compute on them.
    """
    out = []

    def add(name, operations, count, seconds, **more):
        entry = {"stage": name, "operations": operations, "devices": count, "seconds": seconds}
        out.append(entry | more)

    rates = measured and measured["products"]
    if hardware:
        peak = hardware.chip.float32 * mfu
        rates = calibration.ProductTimes(peak, peak, peak)

    def encode(name, corrections, shapes, tokens=None):
        operations = cost.encoding_operations(s.model, [s.taps[c] for c in corrections], shapes)
        if hardware:
            seconds = operations / (devices * hardware.chip.peak(s.dtype) * mfu)
        else:
            seconds = measured and measured["encoder"][corrections].seconds(shapes)
        if shapes:
            rate = tokens / seconds if tokens and seconds else None
            named = " and ".join(corrections)
            add(f"encode {name}, {named}", operations, devices, seconds, rate=rate)

    hosts = hardware.hosts if hardware else 1
    seconds, rate = s.size.seconds, None
    if hardware:
        cpus = hosts * hardware.chip.host.cpus * hardware.host_share
        rate = host_rates.tokenising * cpus
        seconds = s.size.tokens / rate
    add("read and tokenise", None, devices, seconds, rate=rate)
    for corrections in s.passes:
        encode("corpus", corrections, s.shapes, s.size.tokens)
    for correction in s.taps:
        encode("queries", (correction,), s.query_shapes)
        if s.decompositions(correction)[0] and not s.has_store:
            # Without a store the passages that R is summed over are encoded once more.
            share = s.r_rows / s.size.passages
            shapes = {shape: share * count for shape, count in s.shapes.items()}
            encode("corpus for R", (correction,), shapes, share * s.size.tokens)
    gram = cost.gram_operations(s.r_blocks)
    # All hosts share the groups of rows that R is summed over and searched in; one decomposes R.
    reading = hosts * host_rates.reading
    devices = devices if hardware else jax.local_device_count()
    for correction, methods in s.methods.items():
        roots, decompositions = s.decompositions(correction)
        if roots:
            eigen = decompositions * cost.eigen_operations(s.r_blocks)
            summed = gram * s.r_rows
            read = s.stored_bytes(s.r_rows) / reading
            # Reading overlaps with multiplying the previous rows: the slower of the two counts.
            seconds = rates and max(read, summed / rates.gram / devices) + eigen / rates.eigen
            add(f"R, {correction}", summed + eigen, devices, seconds)
        rows = s.size.passages + s.size.labelled
        whitened = gram * rows * sum(m.hessian != "none" for m in methods)
        scored = cost.score_operations(s.width, rows, s.size.queries) * len(methods)
        read = s.stored_bytes(rows) / reading
        seconds = rates and max(read, (whitened / rates.gram + scored / rates.scores) / devices)
        add(f"exact search, {correction}", whitened + scored, devices, seconds)
    methods, each = s.reranking
    if methods:
        # A passage's factors are computed once for all queries that have it as a candidate.
        passages = min(s.size.passages, each * s.size.queries)
        length, query_length = s.mean_lengths()
        position = cost.model_operations(s.model, (length + 1) / 2)
        pair = methods * cost.pair_operations(s.matrices(), length, query_length)
        operations = passages * length * position + s.size.queries * each * pair
        seconds = rates and operations / rates.scores / devices
        add("second stage", operations, devices, seconds)
    return out


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
