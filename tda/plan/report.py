"""Formats a plan as text."""

from tda import store
from tda.plan.cost import as_bytes
from tda.reports import formats


def text(figures: dict) -> str:
    """Returns the figures of `tda.plan.planner.run` as aligned tables."""
    parts = [_heading(figures), _stages(figures["stages"]), _disk(figures["disk"])]
    parts.append(_needs(figures["needs"]))
    parts += [f"warning: {warning}" for warning in figures["warnings"]]
    if left_out := ", ".join(figures["left_out"]):
        parts.append(f"not estimated (other outputs, curvature, checkpoints): {left_out}")
    return "\n\n".join(parts)


def _heading(figures: dict) -> str:
    s, h = figures["setting"], figures["hardware"]
    share = s["with_gradients"] / s["parameters"]
    corpus = f"{s['passages']:,} passages, {s['tokens']:,} tokens, {s['queries']:,} queries"
    corpus += " (stated by the config)" if s["stated"] else f"; padding {s['padding']:.0%}"
    kronecker = s["kronecker_blocks"]
    structure = f"; R of {kronecker} a Kronecker product" if kronecker else ""
    rates = "rates measured here"
    if not h["measured"]:
        peak = f"{h['peak'] / 1e12:,.0f} TFLOP/s ({s['dtype']})"
        rates = f"{h['mfu']:.0%} of {peak} each assumed (--mfu)"
    return formats.aligned(
        [
            ["model", f"{s['parameters']:,} parameters; gradients of {share:.0%} of them"],
            ["corpus", corpus],
            ["encoding", f"{s['width']:,} dimensions, in {s['blocks']} blocks{structure}"],
            ["hardware", f"{h['title']}; {rates}"],
        ],
        "ll",
    )


def _stages(stages: list[dict]) -> str:
    rows = [["", "FLOP", "devices", "time", "device hours", "tokens/s"]]
    for x in stages:
        seconds, devices, rate = x["seconds"], x["devices"], x.get("rate")
        spent = None if seconds is None else seconds * devices
        operations = "" if x["operations"] is None else f"{x['operations']:.2e}"
        row = [x["stage"], operations, f"{devices:,}", _time(seconds), _hours(spent)]
        rows.append([*row, f"{rate:,.0f}" if rate else ""])
    if all(x["seconds"] is not None for x in stages):
        spent = sum(x["seconds"] * x["devices"] for x in stages)
        total = sum(x["seconds"] for x in stages)
        operations = sum(x["operations"] or 0 for x in stages)
        rows.append(["total", f"{operations:.2e}", "", _time(total), _hours(spent), ""])
    return formats.aligned(rows)


def _hours(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    hours = seconds / 3600
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:.2g}"


def _disk(disk: dict) -> str:
    def row(name: str, value) -> list[str]:
        return [name, *(value(disk[dtype]) for dtype in store.DTYPES)]

    count, rate = disk["stores"], f"{disk['reading'] / 1e9:g} GB/s"
    names = [f"{d} (chosen)" if d == disk["dtype"] else d for d in store.DTYPES]
    table = [
        ["on disk" + f", {disk['rank']} pairs of vectors a block" * (disk["rank"] > 0), *names],
        row("a gradient", lambda x: as_bytes(x["row"])),
        row("a store of the corpus", lambda x: as_bytes(x["store"])),
        row(f"  one scan at {rate} (--reading)", lambda x: _time(x["scan_seconds"])),
        row("ScaNN index: codes and rows to reorder", lambda x: as_bytes(x["index"])),
        ["  of it codes, 4 bits for 2 dimensions", as_bytes(disk["codes"])],
    ]
    note = ""
    if not count:
        note = "\nno store (store.dtype=none): the corpus is encoded while it is searched"
    elif count > 1:
        note = f"\n{count} stores: each correction that the methods use has its own"
    return formats.aligned([r + [""] * (len(table[0]) - len(r)) for r in table]) + note


def _needs(needs: dict) -> str:
    rows = [["what must fit", "needed", "available", ""]]
    for name, x in needs.items():
        available = "not known" if x["there"] is None else as_bytes(x["there"])
        fits = x["there"] is None or x["needed"] <= x["there"]
        rows.append([name, as_bytes(x["needed"]), available, "" if fits else "DOES NOT FIT"])
    return formats.aligned(rows)


def _time(seconds: float | None) -> str:
    """Formats a duration, such as "38 s", "12.5 min", "26.6 h" or "14.2 days"."""
    if seconds is None:
        return "–"
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:,.1f} h" if seconds < 72 * 3600 else f"{seconds / 86400:,.1f} days"
