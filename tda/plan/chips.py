"""Accelerators by name: what one does at most, and how many a name such as v5p-256 stands for."""

import dataclasses
import re

_TERA, _GIB, _GIGA = 1e12, 2**30, 1e9

# A float32 product at full precision takes a TPU's matrix unit six passes of bfloat16.
_TPU_PASSES = 6


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator, by its maker's figures.

    Attributes:
        title: its name.
        bfloat16: dense products of bfloat16, FLOP/s.
        float32: products of float32 at full precision, FLOP/s.
        memory: bytes.
        bandwidth: of its memory, bytes/s.
        cores: TensorCores of a TPU that is counted by these in a slice's name; else 1.
        host: chips that a host has, where there are several hosts.
    """

    title: str
    bfloat16: float
    float32: float
    memory: float
    bandwidth: float
    cores: int = 1
    host: int = 8


def _tpu(title: str, tera: float, gib: float, giga: float, cores: int = 1) -> Chip:
    peak = tera * _TERA
    return Chip(f"TPU {title}", peak, peak / _TPU_PASSES, gib * _GIB, giga * _GIGA, cores, 4)


def _gpu(title: str, tera: float, tera_float32: float, gib: float, giga: float) -> Chip:
    return Chip(title, tera * _TERA, tera_float32 * _TERA, gib * _GIB, giga * _GIGA)


# TPUs: Google's pages of specifications. Slices of v4 and v5p are named by their TensorCores, two
# to a chip, those of v5e and v6e by their chips.
# GPUs: NVIDIA's data sheets of the SXM modules, dense (half of what they state with sparsity);
# memory is what a program sees of it.
CHIPS = {
    "v4": _tpu("v4", 275, 32, 1200, cores=2),
    "v5e": _tpu("v5e", 197, 16, 819),
    "v5p": _tpu("v5p", 459, 95, 2765, cores=2),
    "v6e": _tpu("v6e", 918, 32, 1638),
    "a100-40": _gpu("A100 40 GB", 312, 19.5, 40, 1555),
    "a100-80": _gpu("A100 80 GB", 312, 19.5, 80, 2039),
    "h100": _gpu("H100", 989, 67, 79, 3350),
    "h200": _gpu("H200", 989, 67, 140, 4800),
    "b200": _gpu("B200", 2250, 75, 179, 7700),
}


@dataclasses.dataclass(frozen=True)
class Hardware:
    """Several chips of a kind.

    Attributes:
        name: as it was given.
        chip: the kind.
        chips: how many.
    """

    name: str
    chip: Chip
    chips: int

    @property
    def title(self) -> str:
        """What the name stands for: "128 × TPU v5p (256 TensorCores)"."""
        cores = f" ({self.chips * self.chip.cores} TensorCores)" if self.chip.cores > 1 else ""
        return f"{self.chips:,} × {self.chip.title}{cores}"


def parse(name: str) -> Hardware:
    """The hardware of a name: a chip (h100), so many of it (h200x8), or a TPU slice (v5p-256).

    After `x` stands the number of chips; after `-` what the maker counts: TensorCores of TPU v4 and
    v5p, chips of all others.

    Raises:
        ValueError: no such chip, or a number that is not possible; the message says what there is.
    """
    text = name.strip().lower().replace("v5litepod", "v5e")
    if text in CHIPS:
        return Hardware(name, CHIPS[text], 1)
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
    return Hardware(name, chip, count // cores)
