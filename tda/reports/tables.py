"""Tables of methods: what each consists of, its figures with intervals, as Markdown, CSV, LaTeX.

A figure is marked where it is not above that of every control (`tda.methods.CONTROLS`), a retriever
that looks at no query: where the 95% interval of the paired difference to one of them is not
wholly above 0.
"""

import csv
import io
import math

from tda.methods import CONTROLS, Method

MARK = "†"
COLUMNS = (
    ("mrr", "MRR"),
    ("recall_at_10", "recall@10"),
    ("mrr_strict", "MRR strict"),
    ("recall_at_10_strict", "recall@10 strict"),
    ("tail_patch", "tail-patch"),
)


def switches(method: Method) -> dict[str, str]:
    """What the paper's table says of a row: optimizer, R, unit norm; empty of other retrievers."""
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
    """The controls that a method's figure is not clearly above, by name.

    Empty of the controls themselves, and where the figure was not measured.
    """
    figure = metrics[name].get(metric)
    if name in CONTROLS or figure is None:
        return []
    out = []
    for control in CONTROLS:
        other = metrics.get(control, {}).get(metric)
        if other is None:
            continue
        difference = metrics[name].get("differences", {}).get(control, {}).get(metric, {})
        # Without an interval (a single query) the figures themselves decide.
        low = difference.get("low")
        if (figure - other if low is None else low) <= 0:
            out.append(control)
    return out


def markdown(methods: dict[str, Method], metrics: dict, notes: dict[str, str]) -> str:
    """The table in Markdown, and below it what its columns and marks mean.

    Args:
        methods: the rows, by name, in order.
        metrics: of each, as `tda.run.evaluate` writes them.
        notes: what else there is to say of a method.
    """
    head = ["method", "optimizer", "R", "unit norm", *(title for _, title in COLUMNS)]
    lines = [_row(head), "|---|:-:|:-:|:-:|" + "---:|" * len(COLUMNS)]
    marked = False
    for name, method in methods.items():
        cells = [_cell(metrics[name], key) for key, _ in COLUMNS]
        for i, (key, _) in enumerate(COLUMNS):
            if below_controls(name, key, metrics):
                cells[i], marked = f"{cells[i]} {MARK}", True
        lines.append(_row([method.title, *switches(method).values(), *cells]))
    m = next(iter(metrics.values()))
    lines += [
        "",
        f"{m['n_queries']} queries; in brackets 95% intervals (bootstrap over queries). *Strict* "
        "counts only labels known to be sure.",
    ]
    if m.get("n_tail_patch_queries"):
        lines.append(
            "*Tail-patch*: mean change of the target's probability after one step on a proponent, "
            f"top 10 of {m['n_tail_patch_queries']} queries."
        )
    if any(c in metrics for c in CONTROLS):
        named = ", ".join(methods[c].title for c in CONTROLS if c in metrics)
        lines.append(
            f"{MARK}: not above a control that looks at no query ({named})."
            if marked
            else f"Every figure is above those of the controls ({named})."
        )
    if notes:
        lines += ["", *(f"- {methods[n].title}: {text}" for n, text in notes.items() if text)]
    return "\n".join(lines) + "\n"


def comma_separated(methods: dict[str, Method], metrics: dict) -> str:
    """Every single figure of every method, with the ends of its interval where it has one (CSV)."""
    keys: list[str] = []
    for m in metrics.values():
        keys += [k for k, x in m.items() if k not in keys and not isinstance(x, dict | list | str)]
    columns = ["method", "title", "optimizer", "R", "norm"]
    for key in keys:
        columns.append(key)
        if any(key in m.get("intervals", {}) for m in metrics.values()):
            columns += [f"{key}_low", f"{key}_high"]
    columns += [f"{key}_not_above" for key, _ in COLUMNS]
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, lineterminator="\n")
    writer.writeheader()
    for name, method in methods.items():
        m = metrics[name]
        row = {"method": name, "title": method.title} | switches(method)
        for key in keys:
            low, high = m.get("intervals", {}).get(key, (None, None))
            ends = {f"{key}_low": low, f"{key}_high": high}
            row |= {k: x for k, x in ({key: m.get(key)} | ends).items() if k in columns}
        for key, _ in COLUMNS:
            row[f"{key}_not_above"] = " ".join(below_controls(name, key, metrics))
        writer.writerow({k: "" if _missing(x) else x for k, x in row.items()})
    return out.getvalue()


def latex(methods: dict[str, Method], metrics: dict) -> str:
    """The table in LaTeX, with `booktabs` and without intervals; the largest of each is bold."""
    heads = [title for _, title in COLUMNS]
    best = {
        key: max(
            (m[key] for n, m in metrics.items() if n not in CONTROLS and not _missing(m.get(key))),
            default=None,
        )
        for key, _ in COLUMNS
    }
    lines = [
        r"\begin{tabular}{lccc" + "r" * len(COLUMNS) + "}",
        r"\toprule",
        " & ".join(["method", "optimizer", "$R$", "unit norm", *map(_escaped, heads)]) + r" \\",
        r"\midrule",
    ]
    for name, method in methods.items():
        cells = []
        for key, _ in COLUMNS:
            x = metrics[name].get(key)
            text = _escaped(_figure(key, x))
            text = rf"\textbf{{{text}}}" if text and x == best[key] else text
            cells.append(text + (r"$^\dagger$" if below_controls(name, key, metrics) else ""))
        s = switches(method)
        R = {"R_train": r"$R_\mathrm{train}$"}.get(s["R"], s["R"])
        marks = [r"$\checkmark$" if s[k] else "" for k in ("optimizer", "norm")]
        lines.append(" & ".join([_escaped(method.title), marks[0], R, marks[1], *cells]) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def _row(cells) -> str:
    return "| " + " | ".join(cells) + " |"


def _missing(x) -> bool:
    return x is None or (isinstance(x, float) and math.isnan(x))


def _figure(key: str, x) -> str:
    if _missing(x):
        return ""
    return f"{100 * x:+.2f}%" if key.startswith("tail_patch") else f"{x:.3f}"


def _cell(m: dict, key: str) -> str:
    text = _figure(key, m.get(key))
    ends = m.get("intervals", {}).get(key)
    if not text or not ends or any(map(_missing, ends)):
        return text
    return f"{text} [{', '.join(_figure(key, e) for e in ends)}]"


def _escaped(text: str) -> str:
    for special in "\\&%#_":
        text = text.replace(special, "\\" + special)
    return text.replace("−", "$-$")
