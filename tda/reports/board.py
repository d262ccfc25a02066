"""The board of methods against retraining, as Markdown."""

from tda.reports import formats


def describe(record: dict) -> str:
    """Returns the board as Markdown."""
    columns = [
        (fraction, label)
        for fraction, labels in next(iter(record["methods"].values()))["lds"].items()
        for label in labels
    ]
    # The paired differences have a baseline's row without them.
    for m in record["methods"].values():
        columns += [(f, n) for f in m["lds"] for n in m["lds"][f] if (f, n) not in columns]
    columns.sort(key=lambda c: (float(c[0]), c[1].split(",")[0] != "same order", "," in c[1]))
    has_own_top = any("own_top" in m for m in record["methods"].values())
    head = ["method", *(f"LDS {float(f):.0%}, {label}" for f, label in columns)]
    head += ["QLD"] * has_own_top + ["cost"]
    first = columns[0]
    by_figure = sorted(
        record["methods"].values(), key=lambda m: -m["lds"][first[0]][first[1]]["mean"]
    )
    rows = []
    for m in by_figure:
        cells = [m["title"], *(_cell(m["lds"][f].get(label)) for f, label in columns)]
        if has_own_top:
            cells.append(_cell(m.get("own_top")))
        rows.append([*cells, "" if m["cost"] is None else f"{m['cost']:.1f}"])
    lines = [formats.markdown(head, rows, "l" + "r" * (len(head) - 1)), ""]
    lines.append(
        f"{record['queries']} queries, {record['units']} units, {record['steps']} steps; cost in "
        f"trainings of {record['seconds of a training']:.1f} s; metasmoothness "
        f"{record['metasmoothness']:.3f}."
    )
    for fraction, c in record["ceilings"].items():
        lines.append(
            f"Reruns in another order without {float(fraction):.0%}: agreement "
            f"{c['agreement']:.3f}; ceilings {c['one']:.3f} (one order), {c['two']:.3f} (two)."
        )
    return "\n".join(lines)


def _cell(interval: dict | None) -> str:
    if interval is None:
        return ""
    return f"{interval['mean']:.3f} [{interval['low']:.3f}, {interval['high']:.3f}]"
