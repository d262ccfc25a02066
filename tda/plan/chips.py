"""Accelerators by name: peak rates, memory and hosts, and names of hardware such as v5p-256."""

import dataclasses
import re

_TERA, _GIGA, _GIB = 1e12, 1e9, 2**30

# A float32 product at full precision takes a TPU's matrix unit six passes of bfloat16.
_TPU_PASSES = 6


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator, by its maker's figures."""

    title: str
    bfloat16: float
    """FLOP/s of dense bfloat16 products."""
    float32: float
    """FLOP/s of float32 products at full precision."""
    memory: float
    """Bytes."""
    bandwidth: float
    """Bytes/s between memory and chip."""
    cores: int = 1
    """TensorCores of a chip if its slices are named by their number; else 1."""
    host: "Host" = dataclasses.field(kw_only=True)
    """The host that chips of this type usually have."""

    def peak(self, dtype: str) -> float:
        """Returns the FLOP/s of a model that computes in "bfloat16" or "float32"."""
        return self.bfloat16 if dtype == "bfloat16" else self.float32


@dataclasses.dataclass(frozen=True)
class Host:
    """A host of accelerators; a machine with fewer chips has a share of it."""

    chips: int
    cpus: int
    """Threads that run at the same time (vCPUs)."""
    memory: float
    """Bytes."""


def _tpu(title: str, tera: float, memory: tuple, cores: int = 1, *, cpus: int, ram: float) -> Chip:
    peak, host = tera * _TERA, Host(4, cpus, ram * _GIGA)
    size, bandwidth = memory[0] * _GIB, memory[1] * _GIGA
    return Chip(f"TPU {title}", peak, peak / _TPU_PASSES, size, bandwidth, cores, host=host)


def _gpu(title: str, tera: tuple, memory: tuple, *, cpus: int, ram: float) -> Chip:
    bfloat16, float32 = (x * _TERA for x in tera)
    size, bandwidth = memory[0] * _GIB, memory[1] * _GIGA
    return Chip(title, bfloat16, float32, size, bandwidth, host=Host(8, cpus, ram * _GIGA))


# TPUs: Google's pages of specifications, and its machine types of four chips (ct4p, ct5lp, ct5p,
# ct6e). Slices of v4 and v5p are named by their TensorCores, two to a chip, those of v5e and v6e by
# their chips.
# GPUs: NVIDIA's data sheets of the SXM modules, dense (half of what they state with sparsity);
# memory is what a program can use. Hosts are NVIDIA's own machines of eight.
# Memory is GiB and GB/s; GPUs have TFLOP/s of bfloat16 and of float32.
CHIPS = {
    "v4": _tpu("v4", 275, (32, 1228), cores=2, cpus=240, ram=407),
    "v5e": _tpu("v5e", 197, (16, 819), cpus=112, ram=192),
    "v5p": _tpu("v5p", 459, (95, 2765), cores=2, cpus=208, ram=448),
    "v6e": _tpu("v6e", 918, (32, 1640), cpus=180, ram=720),
    "a100-40": _gpu("A100 40 GB", (312, 19.5), (40, 1555), cpus=256, ram=1000),
    "a100-80": _gpu("A100 80 GB", (312, 19.5), (80, 2039), cpus=256, ram=2000),
    "h100": _gpu("H100", (989, 67), (79, 3350), cpus=224, ram=2000),
    "h200": _gpu("H200", (989, 67), (140, 4800), cpus=224, ram=2000),
    "b200": _gpu("B200", (2250, 75), (179, 8000), cpus=224, ram=2000),
}
# How jax names these devices (`jax.Device.device_kind`). Other modules of a name (H100 PCIe, H100
# NVL) have other peaks.
_KINDS = {
    r"TPU v4": "v4",
    r"TPU v5( lite|e)": "v5e",
    r"TPU v5p?": "v5p",
    r"TPU v6( lite|e)": "v6e",
    r"NVIDIA A100-SXM4-40GB": "a100-40",
    r"NVIDIA A100-SXM4-80GB": "a100-80",
    r"NVIDIA H100 80GB HBM3": "h100",
    r"NVIDIA H200": "h200",
    r"NVIDIA B200": "b200",
}


def of_device(kind: str) -> Chip | None:
    """Returns the chip that jax calls `kind`; None if its figures are not known."""
    for pattern, name in _KINDS.items():
        if re.fullmatch(pattern, kind):
            return CHIPS[name]
    return None


@dataclasses.dataclass(frozen=True)
class Hardware:
    """Several chips of one type."""

    chip: Chip
    chips: int

    @property
    def hosts(self) -> int:
        """The number of hosts."""
        return -(-self.chips // self.chip.host.chips)

    @property
    def host_share(self) -> float:
        """The share of a host that belongs to these chips; below 1 if the host has more chips."""
        return min(1.0, self.chips / self.chip.host.chips)

    @property
    def title(self) -> str:
        """A description such as "128 × TPU v5p (256 TensorCores)"."""
        cores = f" ({self.chips * self.chip.cores} TensorCores)" if self.chip.cores > 1 else ""
        return f"{self.chips:,} × {self.chip.title}{cores}"


def parse(name: str) -> Hardware:
    """Returns the hardware of a name: a chip (h100), several (h200x8), or a TPU slice (v5p-256).

    The number after `x` counts chips; the number after `-` counts as the maker does: TensorCores
    of TPU v4 and v5p, and chips of all others.

    Raises:
        ValueError: the chip is unknown, or the number is impossible; the message lists the chips.
    """
    # Google's own name of a v5e slice is v5litepod.
    text = name.strip().lower().replace("v5litepod", "v5e")
    if text in CHIPS:
        return Hardware(CHIPS[text], 1)
    match = re.fullmatch(r"(.+)(x|-)(\d+)", text)
    if not match or match[1] not in CHIPS:
        raise ValueError(
            f"unknown hardware {name!r}; give CHIPxCOUNT, such as h200x8, or a TPU slice, such as "
            f"v5p-256; the chips are {', '.join(CHIPS)}"
        )
    chip, count = CHIPS[match[1]], int(match[3])
    cores = chip.cores if match[2] == "-" else 1
    if count < 1 or count % cores:
        counted = "TensorCores, two to a chip" if cores > 1 else "chips"
        raise ValueError(f"{name!r} has {count} {counted}: there is no such hardware")
    return Hardware(chip, count // cores)
