"""What a sweep's points measured, as one tidy table and as plots.

A plot is a dict: "name" of its files; "x", a column of the table; "y", metrics, a panel each;
"lines", columns whose values tell the lines apart (by default "method"), the first by colour, the
others by dashes; "log_x"; "omit", methods that a metric's panel leaves out, by metric, such as one
far above all others; and "mark", keys and values of the point whose x is marked on each line, such
as {"hessian.weight": -1.0}, with "mark_label", what it is called.
"""

import functools
import math
import pathlib

from tda.evaluation import statistics
from tda.evaluation.summary import HEADLINE
from tda.methods import METHODS
from tda.reports import formats, plots
from tda.reports.tables import reference_of
from tda.runtime import atomic_file
from tda.sweep.grid import Point, Sweep

_ABOUT = ("parameters", "dimensions", "training_tokens", "training_step")
_NOTES = ("lambda", "component")
_FIGURES = ("value", "difference", "low", "high", "p", "n_queries")
_TITLES = {
    "mrr": "MRR",
    "recall_at_10": "recall@10",
    "mrr_strict": "MRR, strict labels",
    "recall_at_10_strict": "recall@10, strict labels",
    "tail_patch": "tail-patch",
    "tail_patch_log": "tail-patch, log p",
    "tail_patch_net": "tail-patch less that of momentum",
    "tail_patch_log_net": "the same, log p",
    "lambda": "λ",
    "dimensions": "dimensions",
    "parameters": "parameters",
    "training_tokens": "training tokens",
    "projection.side": "side of a block",
    "eval.tail_patch_learning_rate": "learning rate of the step",
}


def rows(sweep: Sweep, found: list[tuple[Point, dict, dict]]) -> list[dict]:
    """A row for each point, method, group of queries and metric.

    Args:
        sweep: the sweep.
        found: finished points, each with its metrics and what is told about it.
    """
    out = []
    for point, metrics, about in found:
        for method, m in metrics.items():
            notes = about["notes"].get(method, {})
            shared = {"point": point.name} | point.values | {"method": method}
            shared |= {k: about.get(k) for k in _ABOUT} | {k: notes.get(k) for k in _NOTES}
            for group, g in _groups(m):
                for metric, value in g.items():
                    if not metric.startswith(("mrr", "recall", "tail_patch")):
                        continue
                    if isinstance(value, int | float):
                        ends = g.get("intervals", {}).get(metric, (None, None))
                        out.append(
                            shared
                            | {"group": group, "metric": metric, "value": value}
                            | {
                                "low": ends[0],
                                "high": ends[1],
                                "n_queries": g["counts"].get(metric),
                            }
                        )
    return out


def _groups(m: dict) -> list[tuple[str, dict]]:
    return [("", m)] + [
        (f"{key.removeprefix('by_')}: {group}", g)
        for key in ("by_stated", "by_frequency", "by_relation")
        for group, g in m.get(key, {}).items()
    ]


def differences(found: list[tuple[Point, dict, dict]]) -> list[dict]:
    """A row for each point, two methods, group of queries and metric: the first minus the other.

    Args:
        found: as for `rows`. Groups are those that were compared: all, and by whether the model
            states the fact.
    """
    out = []
    for point, metrics, about in found:
        names = list(metrics)
        for i, method in enumerate(names):
            for group, g in _groups(metrics[method]):
                for other in names[i + 1 :]:
                    for metric, d in g.get("differences", {}).get(other, {}).items():
                        pair = {"method": method, "other": other}
                        out.append(
                            {"point": point.name}
                            | point.values
                            | pair
                            | {k: about.get(k) for k in _ABOUT}
                            | {"group": group, "metric": metric}
                            | d
                        )
    return out


def across_seeds(table: list[dict], figure: str = "value") -> list[dict]:
    """The table with a row for all seeds together: mean, sd, least, most and their number.

    Args:
        table: of `rows`, or of `differences`.
        figure: the column to tell: "value", or "difference".
    """
    together: dict[tuple, list[dict]] = {}
    apart = ("point", "seed", *_NOTES, *_FIGURES)
    for row in table:
        key = tuple((k, v) for k, v in row.items() if k not in apart)
        together.setdefault(key, []).append(row)
    out = []
    for key, same in together.items():
        spread = statistics.across_seeds([r[figure] for r in same])
        out.append(
            dict(key)
            | {"mean": spread.mean, "sd": spread.sd, "least": spread.least, "most": spread.most}
            | {"seeds": spread.count}
        )
    return out


def write(
    sweep: Sweep, found: list[tuple[Point, dict, dict]], directory: pathlib.Path, draw: bool
) -> list[str]:
    """Writes the tables and, if `draw`, the plots; returns the files' paths."""
    table = rows(sweep, found)
    if not table:
        raise ValueError("nothing was measured at any point: no ranks, and no tail-patch")
    directory.mkdir(parents=True, exist_ok=True)
    files = [_write_csv(directory / "sweep.csv", table)]
    if pairs := differences(found):
        files.append(_write_csv(directory / "differences.csv", pairs))
    if "seed" in sweep.axes:
        together = across_seeds(table)
        apart = across_seeds(pairs, "difference")
        files.append(_write_csv(directory / "seeds.csv", together))
        if apart:
            files.append(_write_csv(directory / "seeds_differences.csv", apart))
        files.append(_write(directory / "seeds.md", seeds_table(sweep, together, apart)))
    for plot in sweep.plots if draw else []:
        files += _draw(plot, sweep, table, directory)
    return files


def seeds_table(sweep: Sweep, together: list[dict], apart: list[dict]) -> str:
    """The headline over seeds as Markdown, and how far methods are from a reference.

    Args:
        sweep: the sweep.
        together: `across_seeds` of its rows.
        apart: `across_seeds` of its differences.
    """
    others = [a for a in sweep.axes if a != "seed"]
    parts = [_headline(others, together, _mean_and_spread)]
    counts = sorted({row["seeds"] for row in together})
    parts.append(f"Mean ± standard deviation over {'–'.join(map(str, counts))} training seeds.")
    reference = reference_of(row["method"] for row in together)
    signs = {"method": -1, "other": 1}  # A pair's first minus its other: turned if ours is first.
    to_reference = [
        row | {"method": row["other" if side == "method" else "method"], "mean": sign * row["mean"]}
        for row in apart
        for side, sign in signs.items()
        if row[side] == reference
    ]
    if to_reference:
        parts.append(f"Less that of {METHODS[reference].title}, in the same way:")
        signed = functools.partial(_mean_and_spread, sign="+")
        parts.append(_headline(others, to_reference, signed))
    return "\n\n".join(parts) + "\n"


def _headline(others: list[str], table: list[dict], cell) -> str:
    """A row for each method and value of other axes; `cell` writes a metric's row of the table."""
    by_row: dict[tuple, dict[str, dict]] = {}
    for row in table:
        if not row["group"]:
            key = (_shown("method", row["method"]), *(str(row[a]) for a in others))
            by_row.setdefault(key, {})[row["metric"]] = row
    metrics = [m for m in HEADLINE if any(m in found for found in by_row.values())]
    return formats.markdown(
        ["method", *others, *(_TITLES.get(m, m) for m in metrics)],
        [
            [*key, *(cell(m, row[m]) if m in row else "–" for m in metrics)]
            for key, row in by_row.items()
        ],
        "l" + "l" * len(others) + "r" * len(metrics),
    )


def _mean_and_spread(metric: str, row: dict, sign: str = "") -> str:
    digits, unit, scale = (2, "%", 100) if metric == "tail_patch" else (3, "", 1)
    told = f"{scale * row['mean']:{sign}.{digits}f}"
    spread = "" if math.isnan(row["sd"]) else f" ± {scale * row['sd']:.{digits}f}"
    return told + spread + unit


def _write(path: pathlib.Path, text: str) -> str:
    with atomic_file.open_atomic(path) as out:
        out.write(text)
    return str(path)


def _write_csv(path: pathlib.Path, table: list[dict]) -> str:
    return _write(path, formats.comma_separated(table))


def _draw(plot: dict, sweep: Sweep, table: list[dict], directory: pathlib.Path) -> list[str]:
    unknown = set(plot) - {"name", "x", "y", "lines", "log_x", "omit", "mark", "mark_label"}
    lines = plot.get("lines", ["method"])
    absent = [c for c in [plot["x"], *lines, *plot.get("mark", {})] if c not in table[0]]
    if unknown or absent:
        raise ValueError(
            f"plot {plot['name']!r}: "
            + (f"unknown {', '.join(sorted(unknown))}" if unknown else "")
            + (f"no column {', '.join(absent)}; there are {', '.join(table[0])}" if absent else "")
        )
    panels = []
    for metric in plot["y"]:
        omitted = plot.get("omit", {}).get(metric, ())
        mine = [
            r
            for r in table
            if r["metric"] == metric and not r["group"] and r["method"] not in omitted
        ]
        if mine:
            title = _TITLES.get(metric, metric)
            made = _lines(plot, lines, mine, "seed" in sweep.axes)
            panels.append(
                plots.Panel(title, made, metric.startswith("tail_patch") and "log" not in metric)
            )
    if not panels:
        return []
    return plots.draw(
        directory / plot["name"],
        panels,
        _TITLES.get(plot["x"], plot["x"]),
        log_x=plot.get("log_x", False),
        mark_label=plot.get("mark_label", "marked"),
    )


def _lines(plot: dict, columns: list[str], table: list[dict], seeds: bool) -> list[plots.Line]:
    by_label: dict[tuple[str, str], list[dict]] = {}
    x = plot["x"]
    for row in table:
        if row[x] is not None:
            shown = [_shown(c, row[c]) for c in columns if _matters(c, row)]
            by_label.setdefault((shown[0], ", ".join(shown)), []).append(row)
    out = []
    for (family, label), mine in by_label.items():
        mark = plot.get("mark")
        marked = [r[x] for r in mine if mark and all(r[k] == v for k, v in mark.items())]
        at: dict = {}
        for row in mine:
            at.setdefault(_shown(x, row[x]) if x == "method" else row[x], []).append(row)
        points = [_point(same, seeds) for same in at.values()]
        y, low, high = zip(*points, strict=True)
        out.append(plots.Line(label, list(at), y, low, high, marked[0] if marked else None, family))
    return out


def _point(same: list[dict], seeds: bool) -> tuple[float, float, float]:
    """A figure and its interval: over queries, or a standard deviation over seeds."""
    if seeds:
        spread = statistics.across_seeds([r["value"] for r in same])
        return spread.mean, spread.mean - spread.sd, spread.mean + spread.sd
    nan = float("nan")
    row = same[-1]
    low, high = (nan if row[k] is None else row[k] for k in ("low", "high"))
    return row["value"], low, high


def _matters(column: str, row: dict) -> bool:
    """Whether a column says something of a row: no correction is made for some methods."""
    method = METHODS.get(row["method"])
    return column != "gradients.correction" or method is None or method.corrected


def _shown(column: str, value) -> str:
    if column == "method":
        return METHODS[value].title if value in METHODS else value
    return f"{_TITLES.get(column, column.split('.')[-1])} {value}"
