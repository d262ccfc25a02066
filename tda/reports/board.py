"""The board of methods against retraining: Markdown for a file, and a table for a terminal."""

import math
import os

from tda.reports import formats, plots

_LESS = ", less "
# Figures of a method beside LDS.
_TITLES = {"own_top": "QLD", "tail_patch": "tail-patch", "mrr": "MRR"}


def describe(record: dict) -> str:
    """Returns the board as Markdown: what LDS is, LDS by method, paired differences, ceilings."""
    columns = _columns(record)
    figures = [c for c in columns if _LESS not in c[1]]
    differences = [c for c in columns if _LESS in c[1]]
    parts = [_explain(record), _markdown(record, figures, has_cost=True)]
    if differences:
        parts += ["Paired differences:", _markdown(record, differences)]
    return "\n\n".join([*parts, _notes(record)])


def summarise(record: dict) -> str:
    """Returns the board for a terminal: LDS with its interval, and LDS of the other fractions."""
    first, *others = (c for c in _columns(record) if _LESS not in c[1])
    head = ["method", f"LDS {_label(first)} [95%]", *map(_label, others), "cost"]
    rows = []
    for m in _by_figure(record, first):
        means = (m["lds"].get(f, {}).get(label) for f, label in others)
        brief = ["" if x is None else formats.figure("lds", x["mean"]) for x in means]
        rows.append([m["title"], _cell(m["lds"][first[0]][first[1]]), *brief, _cost(m)])
    return "\n\n".join([_explain(record), formats.aligned([head, *rows]), _notes(record)])


def draw_costs(record: dict, path: str | os.PathLike) -> list[str]:
    """Draws LDS and MRR of each method by its cost, as `PATH.png` and `PATH.svg`.

    Returns:
        The files' paths.

    Raises:
        ImportError: matplotlib is not installed.
    """
    fraction, label = _columns(record)[0]
    costs = {n: m["cost"] for n, m in record["methods"].items() if m["cost"] is not None}
    least = 10 ** math.floor(math.log10(min((x for x in costs.values() if x > 0), default=1.0)))
    lds = {n: m["lds"][fraction][label] for n, m in record["methods"].items()}
    mrr = {n: m["mrr"] for n, m in record["methods"].items() if "mrr" in m}
    panels = []
    for title, intervals in (f"LDS {_label((fraction, label))}", lds), ("MRR", mrr):
        families: dict[str, list[str]] = {}
        for name in (n for n in intervals if n in costs):  # in an order that does not vary
            families.setdefault(record["methods"][name]["family"], []).append(name)
        lines = [
            plots.Line(
                family,
                # A cost too small to be timed is drawn at the axis's least value: log 0 is −∞.
                [max(costs[n], least) for n in names],
                *([intervals[n][key] for n in names] for key in ("mean", "low", "high")),
                names=names,
            )
            for family, names in sorted(families.items())
        ]
        if lines:
            panels.append(plots.Panel(title, lines))
    return plots.draw(path, panels, "cost, in units of a training", log_x=True)


def _columns(record: dict) -> list[tuple[str, str]]:
    """Returns (fraction, label) of every figure that some method has."""
    # Of all methods, since the baseline of the paired differences has none.
    columns = {(f, n) for m in record["methods"].values() for f in m["lds"] for n in m["lds"][f]}
    return sorted(columns, key=lambda c: (float(c[0]), not c[1].startswith("same order"), c[1]))


def _by_figure(record: dict, column: tuple[str, str]) -> list[dict]:
    fraction, label = column

    def place(method: dict) -> tuple[bool, float]:
        mean = method["lds"][fraction][label]["mean"]
        # NaN is neither above nor below: among other numbers it would leave them unsorted.
        return math.isnan(mean), -mean

    return sorted(record["methods"].values(), key=place)


def _markdown(record: dict, columns: list[tuple[str, str]], has_cost: bool = False) -> str:
    others = [k for k in _TITLES if has_cost and any(k in m for m in record["methods"].values())]
    head = ["method", *(f"LDS {_label(c)}" for c in columns)]
    head += [_TITLES[k] for k in others] + ["cost"] * has_cost
    rows = []
    for m in _by_figure(record, _columns(record)[0]):
        cells = [_cell(m["lds"][f].get(label)) for f, label in columns]
        cells += [_cell(m.get(k), k) for k in others] + [_cost(m)] * has_cost
        if has_cost or any(cells):
            rows.append([m["title"], *cells])
    return formats.markdown(head, rows, "l" + "r" * (len(head) - 1))


def _explain(record: dict) -> str:
    return (
        "LDS: how well a method predicts what retraining does, from 1 (perfect) to 0 (chance).\n"
        f"Each retraining leaves out a random share of {record['units']} {record['unit']}s. LDS is "
        "Spearman's correlation, over retrainings,\nof the sum of a method's scores of these with "
        f"the rise of a query's loss; the mean over {record['queries']} queries."
    )


def _notes(record: dict) -> str:
    lines = [
        f"{record['queries']} queries, {record['units']} {record['unit']}s, {record['steps']} "
        f"steps; cost in trainings of {record['seconds of a training']:.1f} s, for methods that "
        f"are timed; metasmoothness {record['metasmoothness']:.3f}."
    ]
    for fraction, bank in record["banks"].items():
        lines.append(
            f"Without {formats.share(fraction)} a query's loss changes by "
            f"{bank['sd of changes']:.3f} nats (standard deviation over retrainings)."
        )
    for fraction, c in record["ceilings"].items():
        lines.append(
            f"Reruns in another order without {formats.share(fraction)}: agreement "
            f"{c['agreement']:.3f}; ceilings {c['one']:.3f} (one order), {c['mean']:.3f} "
            f"(mean of {c['orders']})."
        )
    for fraction, by_metric in record["agreements"].items():
        if by_metric:
            order = ", ".join(f"{_TITLES[k]} {x:.2f}" for k, x in by_metric.items())
            lines.append(
                f"Agreement with LDS at {formats.share(fraction)} on the order of the methods "
                f"(Spearman): {order}."
            )
    return "\n".join(lines)


def _label(column: tuple[str, str]) -> str:
    return f"{formats.share(column[0])}, {column[1]}"


def _cost(method: dict) -> str:
    return "" if method["cost"] is None else f"{method['cost']:.1f}"


def _cell(interval: dict | None, metric: str = "lds") -> str:
    if interval is None:
        return ""
    ends = {metric: [interval["low"], interval["high"]]}
    return formats.figure_with_interval({metric: interval["mean"], "intervals": ends}, metric)
