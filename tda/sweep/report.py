"""The figures of a sweep's points as one tidy table and as plots.

A plot is a dict with these keys:

    "name": the name of its files.
    "x": a column of the table.
    "y": metrics, one panel each.
    "lines": the columns that distinguish lines (by default "method"), the first by colour and the
        others by dashes.
    "log_x": whether the x axis is logarithmic; points whose x is not above 0 are left out.
    "where": keys and values of the points to draw, such as {"projection.side": 16}, or tuples or
        lists of values; by default all points.
    "omit": by metric, the methods that its panel leaves out, such as one far above the others.
    "mark": keys and values of the point whose x is marked on each line, such as
        {"hessian.weight": -1.0}; "mark_label" names it in the legend.
"""

import functools
import pathlib
from collections.abc import Iterable, Sequence

from tda.evaluation import statistics
from tda.evaluation.summary import HEADLINE
from tda.methods import METHODS
from tda.reports import formats, plots
from tda.reports.tables import JUDGED, reference_of
from tda.run.bank_scores import title
from tda.runtime import atomic_file
from tda.sweep.grid import Point, Sweep

# A finished point: the point, its metrics by method, and the description of its run.
Result = tuple[Point, dict, dict]

# Columns of the point's run, of the method's R, and of figures.
_RUN_COLUMNS = ("parameters", "dimensions", "training_tokens", "training_step")
_NOTE_COLUMNS = ("lambda", "component")
_FIGURE_COLUMNS = ("value", "difference", "low", "high", "p", "n_queries")
_TITLES = {
    "mrr": "MRR",
    "recall_at_10": "recall@10",
    "mrr_strict": "MRR, strict labels",
    "recall_at_10_strict": "recall@10, strict labels",
    **dict(JUDGED),
    "tail_patch": "tail-patch",
    "tail_patch_log": "tail-patch, log p",
    "tail_patch_net": "tail-patch less that of momentum",
    "tail_patch_log_net": "the same, log p",
    "lambda": "λ",
    "dimensions": "dimensions",
    "parameters": "parameters",
    "training_tokens": "training tokens",
    "projection.side": "side of a block",
    "hessian.damping": "damping of R, in mean eigenvalues",
    "eval.tail_patch_learning_rate": "learning rate of the step",
}


def rows(results: list[Result]) -> list[dict]:
    """Returns a row for each point, method, group of queries and metric."""
    out = []
    for point, metrics, about in results:
        for method, m in metrics.items():
            notes = about["notes"].get(method, {})
            shared = {"point": point.name} | point.values | {"method": method}
            shared |= {k: about.get(k) for k in _RUN_COLUMNS}
            shared |= {k: notes.get(k) for k in _NOTE_COLUMNS}
            for kind, share in m.get("by_kind", {}).items():
                ends = dict(zip(("low", "high"), share["interval"], strict=True))
                figure = {"group": "", "metric": f"share: {kind}", "value": share["share"]} | ends
                out.append(shared | figure | {"n_queries": m["n_queries"]})
            for group, figures in _groups(m):
                for metric, value in figures.items():
                    # The dictionary also has counts, intervals and descriptions.
                    is_metric = metric.startswith(("mrr", "recall", "ais", "tail_patch", "lds"))
                    if is_metric and isinstance(value, int | float):
                        low, high = figures.get("intervals", {}).get(metric, (None, None))
                        out.append(
                            shared
                            | {"group": group, "metric": metric, "value": value}
                            | {"low": low, "high": high}
                            | {"n_queries": figures["counts"].get(metric)}
                        )
    return out


def _groups(m: dict) -> list[tuple[str, dict]]:
    """Returns (name, figures) of all queries, whose name is empty, and of each group."""
    return [("", m)] + [
        (f"{key.removeprefix('by_')}: {group}", figures)
        for key in ("by_stated", "by_frequency", "by_relation")
        for group, figures in m.get(key, {}).items()
    ]


def differences(results: list[Result]) -> list[dict]:
    """Returns a row for each point, pair of methods, group and metric: the first minus the second.

    Groups are those in which methods were compared: all queries, and by whether the model states
    the fact.
    """
    out = []
    for point, metrics, about in results:
        names = list(metrics)
        for i, method in enumerate(names):
            for group, figures in _groups(metrics[method]):
                for other in names[i + 1 :]:
                    for metric, d in figures.get("differences", {}).get(other, {}).items():
                        out.append(
                            {"point": point.name}
                            | point.values
                            | {"method": method, "other": other}
                            | {k: about.get(k) for k in _RUN_COLUMNS}
                            | {"group": group, "metric": metric}
                            | d
                        )
    return out


def across_seeds(table: list[dict], figure: str = "value") -> list[dict]:
    """Merges the rows of all seeds into one, with the spread of a column (`statistics`)."""
    by_key: dict[tuple, list[dict]] = {}
    varying = ("point", "seed", *_NOTE_COLUMNS, *_FIGURE_COLUMNS)
    for row in table:
        key = tuple((k, v) for k, v in row.items() if k not in varying)
        by_key.setdefault(key, []).append(row)
    out = []
    for key, seed_rows in by_key.items():
        out.append(dict(key) | statistics.across_seeds([r[figure] for r in seed_rows]))
    return out


def write(sweep: Sweep, results: list[Result], directory: pathlib.Path, draw: bool) -> list[str]:
    """Writes the tables and, if `draw`, the plots; returns the files' paths."""
    table = rows(results)
    if not table:
        raise ValueError("nothing was measured at any point: no ranks, and no tail-patch")
    directory.mkdir(parents=True, exist_ok=True)
    tables = {"sweep": table, "differences": differences(results)}
    texts = {}
    if "seed" in sweep.axes:
        tables["seeds"] = across_seeds(table)
        tables["seeds_differences"] = across_seeds(tables["differences"], "difference")
        texts["seeds.md"] = seeds_table(sweep, tables["seeds"], tables["seeds_differences"])
    texts = {f"{n}.csv": formats.comma_separated(t) for n, t in tables.items() if t} | texts
    for name, text in texts.items():
        with atomic_file.open_atomic(directory / name) as out:
            out.write(text)
    files = [str(directory / name) for name in texts]
    for plot in sweep.plots if draw else []:
        files += _draw(plot, sweep, table, directory)
    return files


def seeds_table(sweep: Sweep, figures: list[dict], figure_differences: list[dict]) -> str:
    """Returns the headline metrics over seeds in Markdown, and differences to the reference.

    `figures` and `figure_differences` are `across_seeds` of a sweep's rows and differences.
    """
    axes = [a for a in sweep.axes if a != "seed"]
    parts = [_headline(axes, figures, _mean_and_spread)]
    counts = sorted({row["seeds"] for row in figures})
    parts.append(f"Mean ± standard deviation over {'–'.join(map(str, counts))} training seeds.")
    reference = reference_of(row["method"] for row in figures)
    # A row is "method" minus "other": the sign changes if the reference is "method".
    to_reference = [
        # Without 0.0 added, none would be −0.
        row | {"method": row[other_side], "mean": sign * row["mean"] + 0.0}
        for row in figure_differences
        for side, other_side, sign in (("method", "other", -1), ("other", "method", 1))
        if row[side] == reference
    ]
    if to_reference:
        parts.append(f"Difference to {_shown('method', reference)}, likewise:")
        signed = functools.partial(_mean_and_spread, is_signed=True)
        parts.append(_headline(axes, to_reference, signed))
    return "\n\n".join(parts) + "\n"


def _headline(axes: list[str], table: list[dict], cell) -> str:
    """Returns a table with a row for each method and value of `axes`, a column for each metric.

    `cell` formats a row of `table`, the mean and spread of one metric, given the metric.
    """
    by_key: dict[tuple, dict[str, dict]] = {}
    for row in table:
        if not row["group"]:
            key = (_shown("method", row["method"]), *(str(row[a]) for a in axes))
            by_key.setdefault(key, {})[row["metric"]] = row
    measured = [m for by_metric in by_key.values() for m in by_metric]
    metrics = [*_lds_of(measured), *(m for m in HEADLINE if m in measured)]
    return formats.markdown(
        ["method", *axes, *map(_title, metrics)],
        [
            [*key, *(cell(m, by_metric[m]) if m in by_metric else "–" for m in metrics)]
            for key, by_metric in by_key.items()
        ],
        "l" * (1 + len(axes)) + "r" * len(metrics),
    )


def _lds_of(metrics: Iterable[str]) -> list[str]:
    """Returns the LDS of each fraction, which a sweep held against retraining has."""
    return list(dict.fromkeys(m for m in metrics if m.startswith("lds_")))


def _title(metric: str) -> str:
    if metric.startswith("lds_"):
        return f"LDS, {formats.share(metric.removeprefix('lds_'))} left out"
    return _TITLES.get(metric, metric)


def _mean_and_spread(metric: str, row: dict, is_signed: bool = False) -> str:
    mean = formats.figure(metric, row["mean"], is_signed)
    spread = formats.figure(metric, row["sd"]).removeprefix("+")
    return f"{mean} ± {spread}" if spread else mean  # a single seed has no spread


def _draw(plot: dict, sweep: Sweep, table: list[dict], directory: pathlib.Path) -> list[str]:
    known = {"name", "x", "y", "lines", "log_x", "where", "omit", "mark", "mark_label"}
    unknown = set(plot) - known
    columns, where = plot.get("lines", ["method"]), plot.get("where", {})
    used = [plot["x"], *columns, *where, *plot.get("mark", {})]
    absent = [c for c in used if c not in table[0]]
    if unknown or absent:
        raise ValueError(
            f"plot {plot['name']!r}: "
            + (f"unknown {', '.join(sorted(unknown))}" if unknown else "")
            + (f"no column {', '.join(absent)}; there are {', '.join(table[0])}" if absent else "")
        )
    table = [r for r in table if all(_is_one_of(r[key], value) for key, value in where.items())]
    x, log_x = plot["x"], plot.get("log_x", False)
    # Such as -1, which stands for a default.
    hidden = {r[x] for r in table if log_x and r[x] is not None and r[x] <= 0}
    if hidden:
        listed = ", ".join(map(str, sorted(hidden)))
        print(f"plot {plot['name']!r}: a logarithmic axis cannot show {x}={listed}; left out")
        table = [r for r in table if r[x] not in hidden]
    panels = []
    for metric in (*_lds_of(r["metric"] for r in table), *plot["y"]):
        omitted = plot.get("omit", {}).get(metric, ())
        metric_rows = [
            r
            for r in table
            if r["metric"] == metric and not r["group"] and r["method"] not in omitted
        ]
        if metric_rows:
            lines = _lines(plot, columns, metric_rows, sweep.axes)
            is_percent = metric.startswith("tail_patch") and "log" not in metric
            panels.append(plots.Panel(_title(metric), lines, is_percent))
    if not panels:
        return []
    return plots.draw(
        directory / plot["name"],
        panels,
        _TITLES.get(x, x),
        log_x=log_x,
        mark_label=plot.get("mark_label", "marked"),
    )


def _is_one_of(value, wanted) -> bool:
    return value in wanted if isinstance(wanted, tuple | list) else value == wanted


def _lines(
    plot: dict, columns: list[str], table: list[dict], axes: Sequence[str]
) -> list[plots.Line]:
    """Returns the lines of one panel."""
    by_label: dict[tuple[str, str], list[dict]] = {}
    x, mark = plot["x"], plot.get("mark")
    for row in table:
        if row[x] is not None:
            parts = [_shown(c, row[c]) for c in columns if _applies(c, row)]
            # The first column decides a line's colour; the whole label names the line.
            by_label.setdefault((parts[0], ", ".join(parts)), []).append(row)
    out = []
    for (family, label), line_rows in by_label.items():
        is_marked = [mark and all(r[k] == v for k, v in mark.items()) for r in line_rows]
        marked = next((r[x] for r, m in zip(line_rows, is_marked, strict=True) if m), None)
        by_x: dict = {}
        for row in line_rows:
            # Points of a line with the same x differ by seed.
            by_x.setdefault(_shown(x, row[x]) if x == "method" else row[x], []).append(row)
        for same_x in by_x.values():
            _check_one_figure(plot, same_x, axes)
        points = [_figure(same_x, "seed" in axes) for same_x in by_x.values()]
        y, low, high = zip(*points, strict=True)
        out.append(plots.Line(label, list(by_x), y, low, high, marked, family))
    return out


def _check_one_figure(plot: dict, rows: list[dict], axes: Sequence[str]) -> None:
    """Checks that the rows of one place of a line have one figure for each seed.

    Raises:
        ValueError: some have several; the message names the axes that they differ in.
    """
    by_seed: dict = {}
    for row in rows:
        by_seed.setdefault(row.get("seed"), []).append(row)
    for alike in by_seed.values():
        if len({f"{row['value']:.6g}" for row in alike}) > 1:
            mixed = [a for a in axes if len({repr(row[a]) for row in alike}) > 1]
            raise ValueError(
                f"plot {plot['name']!r}: points that differ in {', '.join(mixed)} would be one at "
                f"{plot['x']}={alike[0][plot['x']]}; name that in lines, or choose points by where"
            )


def _figure(rows: list[dict], has_seeds: bool) -> tuple:
    """Returns a figure and its interval: over queries, or one standard deviation over seeds."""
    if has_seeds:
        spread = statistics.across_seeds([r["value"] for r in rows])
        return spread["mean"], spread["mean"] - spread["sd"], spread["mean"] + spread["sd"]
    row = rows[-1]
    return row["value"], row["low"], row["high"]


def _applies(column: str, row: dict) -> bool:
    """Returns whether a column applies to a row: some methods have no correction, others no R."""
    method = METHODS.get(row["method"])
    if column == "gradients.correction":
        return method is None or method.corrected
    return column != "hessian.structure" or (method is not None and method.hessian != "none")


def _shown(column: str, value) -> str:
    if column == "method":
        return title(value)
    return f"{_TITLES.get(column, column.split('.')[-1])} {value}"
