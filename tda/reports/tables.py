"""Tables of methods and their figures: a run's (`table.md`), and the paper's Table 1.

Table 1 marks figures that are not clearly above every control (`tda.methods.CONTROLS`: retrievers
that ignore the query): the 95% interval of the paired difference to one of them includes 0 or less.
"""

from collections.abc import Callable, Iterable, Sequence

from tda.methods import CONTROLS, METHODS, Method
from tda.reports import formats

MARK = "†"
# Columns as (metric, title).
COLUMNS = (
    ("mrr", "MRR"),
    ("recall_at_10", "recall@10"),
    ("mrr_strict", "MRR strict"),
    ("recall_at_10_strict", "recall@10 strict"),
    ("tail_patch", "tail-patch"),
)
# Columns by a judge's verdicts on the proponents, in place of labels.
JUDGED = (
    ("ais_mrr", "AIS-MRR"),
    ("ais_recall_at_10", "AIS recall@10"),
    ("ais_precision_at_10", "AIS precision@10"),
)
_RUN_COLUMNS = (
    *COLUMNS[:4],
    ("mrr_known", "MRR known"),
    ("recall_at_10_known", "recall@10 known"),
    *JUDGED,
    COLUMNS[4],
    # Targets of other tasks are sentences, whose probability hardly moves.
    ("tail_patch_log", "tail-patch, log p"),
)
_MRR_COLUMNS = (
    ("mrr", "MRR"),
    ("mrr_at_10", "MRR@10"),
    ("mrr_strict", "MRR strict"),
    ("mrr_at_10_strict", "MRR@10 strict"),
)
# The method that others are compared with, if it is among them.
_REFERENCE = "trackstar"


def reference_of(methods: Iterable[str]) -> str:
    """Returns the method that the others are compared with: TrackStar, or else the first."""
    names = list(methods)
    return _REFERENCE if _REFERENCE in names else names[0]


def _has_labels(metrics: dict) -> bool:
    return next(iter(metrics.values())).get("has_labels", True)


def _about_labels(metrics: dict, text: str) -> str:
    """Returns a text about labels, or the text for a corpus without labels."""
    judge = _judge(metrics)
    if judge is not None:
        text = text if _has_labels(metrics) else "The corpus has no labels."
        return f"{text} {_describe_judge(judge)}"
    if _has_labels(metrics):
        return text
    return (
        "The corpus has no labels: which passages are correct is not known, so MRR and recall are "
        "left out."
    )


def _judge(metrics: dict) -> dict | None:
    return next(iter(metrics.values())).get("judge")


def _describe_judge(judge: dict) -> str:
    """Explains the figures of a judge; `judge` is the section of a config."""
    sentences = judge["sentences"]
    read = f"in windows of {sentences} sentences" if sentences else "as a whole"
    model = f" ({judge['model']})" if judge["model"] else ""
    return (
        f"*AIS*: a passage counts as correct if the judge {judge['name']}{model}, which reads it "
        f"{read}, gives it more than {judge['threshold']:g}. The judge reads proponents alone: a "
        "query without a correct one among them counts 0, even if the rest of the corpus has one."
    )


def _measured(
    metrics: dict, columns: Sequence[tuple[str, str]] = (*COLUMNS[:4], *JUDGED, COLUMNS[4])
):
    """Returns the columns that were measured: some need labels, others a judge."""
    has_labels, is_judged = _has_labels(metrics), _judge(metrics) is not None

    def is_measured(key: str) -> bool:
        if key.startswith("ais_"):
            return is_judged
        if key == "tail_patch_log":
            return not has_labels
        return has_labels or key.startswith("tail_patch")

    return [(key, title) for key, title in columns if is_measured(key)]


def _cell(m: dict, metric: str) -> str:
    return formats.figure(metric, m.get(metric), missing=_missing_text(metric))


def _by_method(
    by_method: dict, columns: Sequence[tuple[str, str]], cell: Callable[[dict, str], str] = _cell
) -> str:
    return formats.markdown(
        ["method", *(title for _, title in columns)],
        [[METHODS[n].title, *(cell(m, key) for key, _ in columns)] for n, m in by_method.items()],
        "l" + "r" * len(columns),
    )


def run_table(metrics: dict) -> str:
    """Returns a run's main table in Markdown, methods × metrics, and explains its columns."""
    m = next(iter(metrics.values()))
    lines = [
        _by_method(metrics, _measured(metrics, _RUN_COLUMNS)),
        "",
        f"{m['n_queries']} queries, {m['n_known']} of them known (every token of "
        "the target ranks high under the prompt). "
        + _about_labels(metrics, "Strict: only labels known to be sure count."),
    ]
    if m.get("n_with_choices"):
        lines.append(
            f"Of several choices the model prefers the right one for {m['chosen']:.1%} of "
            f"{m['n_with_choices']} queries."
        )
    if m["n_tail_patch_queries"]:
        rule = m["tail_patch_rule"]
        control = formats.figure("tail_patch", m["tail_patch_control"])
        lines.append(
            "Tail-patch: mean change of the target's probability after one optimizer step on a "
            f"proponent, top 10 of {m['n_tail_patch_queries']} queries; a step with a "
            f"zero gradient changes it by {control}. A step: "
            f"{rule['optimizer']}, its state {rule['optimizer_state']}, learning rate "
            f"{rule['learning_rate']:.3g}, {rule['batch']}."
        )
    return "\n".join(lines)


def run_details(metrics: dict) -> str:
    """Returns a run's other tables: intervals, conventions of MRR, differences, groups."""
    parts = [
        "## 95% intervals\n\nPercentile bootstrap over queries.",
        _by_method(
            metrics,
            _measured(metrics),
            lambda m, key: formats.figure_with_interval(m, key, _missing_text(key)),
        ),
    ]
    if _has_labels(metrics):
        parts += [
            "## Conventions of MRR\n\nWith full ranks, and MRR@10: ranks beyond 10 count nothing.",
            _by_method(metrics, _MRR_COLUMNS),
        ]
    parts += differences(metrics)
    if next(iter(metrics.values()))["n_tail_patch_queries"]:
        columns = [
            (f"{name}_at_{k}", f"{title} k = {k}")
            for name, title in (("tail_patch", "p"), ("tail_patch_log", "log p"))
            for k in (1, 3, 5, 10)
            if any(f"{name}_at_{k}" in m for m in metrics.values())
        ]
        parts += [
            "## Tail-patch by depth\n\nMean over the first k proponents: change of the "
            "probability, then of the log-probability in nats.",
            _by_method(metrics, columns),
        ]
    if _has_labels(metrics):
        parts += _kind_tables(metrics, "by_content", "the proponents say")
    if _judge(metrics) is not None:
        parts += _kind_tables(metrics, "by_kind", "the proponents say, by judge and rule")
    for key, group_title in (
        ("by_stated", "whether greedy decoding states the fact"),
        ("by_prior", "whether the model knows the fact, or guesses it by the relation"),
        ("by_frequency", "fact frequency: passages that name both entities"),
        ("by_relation", "relation"),
    ):
        for metric, title in (("mrr", "MRR"), JUDGED[0], ("tail_patch", "tail-patch")):
            if any(m.get(metric) is not None and key in m for m in metrics.values()):
                parts += [f"## {title} by {group_title}", _by_group(metrics, key, metric)]
    return "\n\n".join(parts)


def differences(metrics: dict) -> list[str]:
    """Returns heading and table of the paired differences to one method; empty without others."""
    if len(metrics) < 2:
        return []
    reference = reference_of(metrics)
    title = METHODS[reference].title
    by_method = {n: m["differences"][reference] for n, m in metrics.items() if n != reference}
    return [
        f"## Difference to {title}\n\nA method's figure minus {title}'s over the same "
        "queries: mean, 95% interval, two-sided p (paired bootstrap).",
        _by_method(by_method, _measured(metrics), _difference_cell),
    ]


def _kind_tables(metrics: dict, key: str, title: str) -> list[str]:
    """Returns tables of the shares of proponents by what they say, and of tail-patch by that."""
    by_method = {name: m[key] for name, m in metrics.items()}
    columns = [(kind, kind) for kind in next(iter(by_method.values()))]
    parts = [
        f"## What {title}\n\nTheir shares; a passage is of the first kind that fits.",
        _by_method(by_method, columns, lambda m, kind: _share_cell(m[kind])),
        f"## What {title}, at rank 1",
        _by_method(by_method, columns, lambda m, kind: _first_cell(m[kind])),
    ]
    groups = dict.fromkeys(g for m in by_method.values() for x in m.values() for g in x["by_prior"])
    for group in groups if len(groups) > 1 else ():
        parts += [
            f"## What {title}, of facts that the model {group}",
            _by_method(by_method, columns, lambda m, k, g=group: _percent(m[k]["by_prior"].get(g))),
        ]
    if any(x["n_tail_patches"] for m in by_method.values() for x in m.values()):
        parts += [
            f"## Tail-patch by what {title}\n\nMean over pairs of a query and a passage "
            "(their number).",
            _by_method(by_method, columns, lambda m, kind: _tail_patch_cell(m[kind])),
        ]
    return parts


def _first_cell(content: dict) -> str:
    return _percent(next(iter(content["by_rank"]), None))


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.1%}"


def _share_cell(content: dict) -> str:
    if content["share"] is None:
        return "–"
    low, high = content["interval"]
    interval = "" if low is None else f" [{low:.1%}, {high:.1%}]"
    return f"{content['share']:.1%}{interval}"


def _tail_patch_cell(content: dict) -> str:
    count = content["n_tail_patches"]
    return f"{formats.figure('tail_patch', content['tail_patch'])} ({count:,})" if count else ""


def _by_group(metrics: dict, key: str, metric: str) -> str:
    """Returns a table of one metric, a column for each group with the number of its queries."""
    counts: dict[str, int] = {}
    for m in metrics.values():
        for group, figures in m[key].items():
            counts[group] = max(counts.get(group, 0), figures["counts"].get(metric, 0))
    columns = [(group, f"{group} ({count})") for group, count in counts.items() if count]
    return _by_method(
        {name: m[key] for name, m in metrics.items()},
        columns,
        lambda groups, group: _cell(groups.get(group, {}), metric),
    )


def _missing_text(metric: str) -> str:
    # Runs may leave out tail-patch, so its cell is empty; another missing figure is a dash.
    return "" if metric.startswith("tail_patch") else "–"


def _difference_cell(differences: dict, metric: str) -> str:
    d = differences.get(metric)
    if d is None:
        return ""
    mean, low, high = (formats.figure(metric, d[k], True) for k in ("difference", "low", "high"))
    return mean if d["low"] is None else f"{mean} [{low}, {high}], p {d['p']:.2g}"


def switches(method: Method) -> dict[str, str]:
    """Returns the cells that describe a method in the paper's table: optimizer, R, unit norm.

    All are empty for retrievers that do not use gradients.
    """
    if method.retriever != "gradient":
        return {"optimizer": "", "R": "", "norm": ""}
    R = {"none": "", "train": "R_train", "mixed": "mixed"}[method.hessian]
    R = {"ekfac": "EK-FAC"}.get(method.curvature, R)
    return {
        "optimizer": "yes" if method.corrected else "",
        "R": R,
        "norm": "yes" if method.unit_norm else "",
    }


def below_controls(name: str, metric: str, metrics: dict) -> list[str]:
    """Returns the names of the controls that a method's figure is not clearly above.

    Empty for the controls themselves, and where the figure was not measured.
    """
    value = metrics[name].get(metric)
    if name in CONTROLS or value is None:
        return []
    out = []
    for control in CONTROLS:
        control_value = metrics.get(control, {}).get(metric)
        if control_value is None:
            continue
        difference = metrics[name].get("differences", {}).get(control, {}).get(metric, {})
        # Without an interval (a single query) the figures themselves decide.
        low = difference.get("low")
        if (value - control_value if low is None else low) <= 0:
            out.append(control)
    return out


def markdown(methods: dict[str, Method], metrics: dict, notes: dict[str, str]) -> str:
    """Returns Table 1 in Markdown, followed by an explanation of its columns and marks.

    Args:
        methods: the rows by name, in order.
        metrics: each method's metrics, as `tda.run.evaluate` writes them.
        notes: remarks by method, listed below the table unless empty.
    """
    rows, is_marked, columns = [], False, _measured(metrics)
    for name, method in methods.items():
        cells = [formats.figure_with_interval(metrics[name], key) for key, _ in columns]
        for i, (key, _) in enumerate(columns):
            if below_controls(name, key, metrics):
                cells[i], is_marked = f"{cells[i]} {MARK}", True
        rows.append([method.title, *switches(method).values(), *cells])
    head = ["method", "optimizer", "R", "unit norm", *(title for _, title in columns)]
    m = next(iter(metrics.values()))
    lines = [
        formats.markdown(head, rows, "lccc" + "r" * len(columns)),
        "",
        f"{m['n_queries']} queries; in brackets 95% intervals (bootstrap over queries). "
        + _about_labels(metrics, "*Strict* counts only labels known to be sure."),
    ]
    if m.get("n_tail_patch_queries"):
        lines.append(
            "*Tail-patch*: mean change of the target's probability after one step on a proponent, "
            f"top 10 of {m['n_tail_patch_queries']} queries."
        )
    if any(c in metrics for c in CONTROLS):
        controls = ", ".join(methods[c].title for c in CONTROLS if c in metrics)
        lines.append(
            f"{MARK}: not above a control, which ignores the query ({controls})."
            if is_marked
            else f"Every figure is above those of the controls ({controls})."
        )
    if notes:
        lines += ["", *(f"- {methods[n].title}: {text}" for n, text in notes.items() if text)]
    return "\n".join(lines) + "\n"


def comma_separated(methods: dict[str, Method], metrics: dict) -> str:
    """Returns every figure of every method as CSV, with the ends of its interval if it has one."""
    keys: list[str] = []
    for m in metrics.values():
        keys += [k for k, x in m.items() if k not in keys and not isinstance(x, dict | list | str)]
    columns = ["method", "title", "optimizer", "R", "norm"]
    for key in keys:
        columns.append(key)
        if any(key in m.get("intervals", {}) for m in metrics.values()):
            columns += [f"{key}_low", f"{key}_high"]
    columns += [f"{key}_not_above" for key, _ in _measured(metrics)]
    rows = []
    for name, method in methods.items():
        m = metrics[name]
        row = {"method": name, "title": method.title} | switches(method)
        for key in keys:
            low, high = m.get("intervals", {}).get(key, (None, None))
            row |= {key: m.get(key), f"{key}_low": low, f"{key}_high": high}
        for key, _ in _measured(metrics):
            row[f"{key}_not_above"] = " ".join(below_controls(name, key, metrics))
        rows.append({k: "" if formats.is_missing(row[k]) else row[k] for k in columns})
    return formats.comma_separated(rows, columns)


def latex(methods: dict[str, Method], metrics: dict) -> str:
    """Returns Table 1 in LaTeX without intervals; the best figure of each column is bold."""
    best, columns = {}, _measured(metrics)
    for key, _ in columns:
        figures = [m.get(key) for name, m in metrics.items() if name not in CONTROLS]
        best[key] = max((x for x in figures if not formats.is_missing(x)), default=None)
    rows = []
    for name, method in methods.items():
        cells = []
        for key, _ in columns:
            x = metrics[name].get(key)
            text = formats.escape_latex(formats.figure(key, x))
            text = rf"\textbf{{{text}}}" if text and x == best[key] else text
            cells.append(text + (r"$^\dagger$" if below_controls(name, key, metrics) else ""))
        s = switches(method)
        R = {"R_train": r"$R_\mathrm{train}$"}.get(s["R"], s["R"])
        optimizer, norm = (r"$\checkmark$" if s[k] else "" for k in ("optimizer", "norm"))
        rows.append([formats.escape_latex(method.title), optimizer, R, norm, *cells])
    titles = [formats.escape_latex(title) for _, title in columns]
    head = ["method", "optimizer", "$R$", "unit norm", *titles]
    return formats.latex(head, rows, "lccc" + "r" * len(columns))
