"""Operations, devices and seconds of each stage of a planned run."""

import dataclasses
from collections.abc import Iterator, Mapping

from tda.plan import calibration, chips, cost
from tda.plan.setting import Setting


@dataclasses.dataclass(frozen=True)
class Machine:
    """The machine that a plan times: named hardware at a share of its peak, or this one."""

    hardware: chips.Hardware | None
    """The named hardware; None for this machine."""
    devices: int
    mfu: float
    """The assumed share of the named hardware's peak rate."""
    reading: float
    """Bytes/s that a host reads from a store."""
    tokenising: float
    """Tokens/s of a CPU of the named hardware's hosts."""
    encoders: dict[tuple[str, ...], calibration.EncoderTimes] | None = None
    """This machine's encoding, by a pass's corrections; None if it was not measured."""
    measured_products: calibration.ProductTimes | None = None
    """This machine's products; None if they were not measured."""

    @property
    def hosts(self) -> int:
        """Number of hosts."""
        return self.hardware.hosts if self.hardware else 1

    @property
    def products(self) -> calibration.ProductTimes | None:
        """Rates of products of matrices."""
        if self.hardware is None:
            return self.measured_products
        rate = self.hardware.chip.float32 * self.mfu
        return calibration.ProductTimes(rate, rate, rate)

    def encoding_seconds(
        self, corrections: tuple[str, ...], shapes: Mapping, operations: float, dtype: str
    ) -> float | None:
        """Returns the seconds of a pass over batches of the shapes; None if not measured."""
        if self.hardware is not None:
            return operations / (self.devices * self.hardware.chip.peak(dtype) * self.mfu)
        return self.encoders and self.encoders[corrections].seconds(shapes)


def list_stages(s: Setting, machine: Machine) -> list[dict]:
    """Returns each stage's name, operations, devices and seconds, which are None if not measured.

    A job occupies all its chips while it runs, even in a stage that does not compute on them.
    """
    return [_reading(s, machine), *_encoding(s, machine), *_searching(s, machine)]


def _stage(name: str, operations: float | None, devices: int, seconds: float | None, **more):
    stage = {"stage": name, "operations": operations, "devices": devices, "seconds": seconds}
    return stage | more


def _reading(s: Setting, machine: Machine) -> dict:
    seconds, rate = s.size.seconds, None
    if machine.hardware:
        cpus = machine.hosts * machine.hardware.chip.host.cpus * machine.hardware.host_share
        rate = machine.tokenising * cpus
        seconds = s.size.tokens / rate
    return _stage("read and tokenise", None, machine.devices, seconds, rate=rate)


def _encoding(s: Setting, machine: Machine) -> Iterator[dict]:
    def encode(name: str, corrections: tuple[str, ...], shapes: Mapping, tokens: float = 0) -> dict:
        operations = cost.encoding_operations(s.model, [s.taps[c] for c in corrections], shapes)
        seconds = machine.encoding_seconds(corrections, shapes, operations, s.dtype)
        rate = tokens / seconds if tokens and seconds else None
        named = f"encode {name}, {' and '.join(corrections)}"
        return _stage(named, operations, machine.devices, seconds, rate=rate)

    for corrections in s.passes:
        if s.shapes:
            yield encode("corpus", corrections, s.shapes, s.size.tokens)
    for correction in s.taps:
        if s.query_shapes:
            yield encode("queries", (correction,), s.query_shapes)
        if s.decompositions(correction)[0] and not s.has_store and s.shapes:
            # Without a store the passages that R is summed over are encoded once more.
            share = s.r_rows / s.size.passages
            shapes = {shape: share * count for shape, count in s.shapes.items()}
            yield encode("corpus for R", (correction,), shapes, share * s.size.tokens)


def _searching(s: Setting, machine: Machine) -> Iterator[dict]:
    """Yields R, exact search and the second stage.

    All hosts share the groups of rows that R is summed over and searched in; one decomposes R.
    """
    rates, devices = machine.products, machine.devices
    reading = machine.hosts * machine.reading
    gram = cost.gram_operations(s.r_blocks)
    for correction, methods in s.methods.items():
        roots, decompositions = s.decompositions(correction)
        if roots:
            eigen = decompositions * cost.eigen_operations(s.r_blocks)
            summed = gram * s.r_rows
            read = s.stored_bytes(s.r_rows) / reading
            # Reading overlaps with multiplying the previous rows: the slower of the two counts.
            seconds = rates and max(read, summed / rates.gram / devices) + eigen / rates.eigen
            yield _stage(f"R, {correction}", summed + eigen, devices, seconds)
        rows = s.size.passages + s.size.labelled
        whitened = gram * rows * sum(m.hessian != "none" for m in methods)
        scored = cost.score_operations(s.width, rows, s.size.queries) * len(methods)
        read = s.stored_bytes(rows) / reading
        seconds = rates and max(read, (whitened / rates.gram + scored / rates.scores) / devices)
        yield _stage(f"exact search, {correction}", whitened + scored, devices, seconds)
    number, each = s.reranking
    if number:
        # A passage's factors are computed once for all queries that have it as a candidate.
        passages = min(s.size.passages, each * s.size.queries)
        length, query_length = s.mean_lengths()
        position = cost.model_operations(s.model, (length + 1) / 2)
        pair = number * cost.pair_operations(s.matrices(), length, query_length)
        operations = passages * length * position + s.size.queries * each * pair
        seconds = rates and operations / rates.scores / devices
        yield _stage("second stage", operations, devices, seconds)
