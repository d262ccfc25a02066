"""Figures and tables as text: Markdown, CSV, LaTeX, and aligned columns for a terminal."""

import csv
import io
import math
from collections.abc import Iterable, Sequence

_MARKDOWN_RULES = {"l": "---", "c": ":-:", "r": "---:"}


def is_missing(x) -> bool:
    """Returns whether a figure was not measured: None or NaN."""
    return x is None or (isinstance(x, float) and math.isnan(x))


def figure(metric: str, x: float | None, signed: bool = False, missing: str = "") -> str:
    """Formats one figure by the name of its metric.

    Args:
        metric: changes of probability ("tail_patch…") are shown in percent, those below 0.01% to
            two digits, and below 0.0001% with a power of ten; those of log p ("tail_patch_log…")
            in nats, every other metric as a decimal.
        x: the figure.
        signed: whether a decimal shows its sign too; changes always do.
        missing: the text for a figure that was not measured.
    """
    if is_missing(x):
        return missing
    if metric.startswith("tail_patch_log"):
        return f"{x:+.4f}"
    if metric.startswith("tail_patch"):
        percent = abs(100 * x)
        # A target of many words is so unlikely that nothing moves it by more.
        if 0 < percent < 1e-4:
            return f"{100 * x:+.1e}%"
        # A small model that is sure of nothing moves probabilities by less than 0.01%.
        decimals = 1 - math.floor(math.log10(percent)) if 0 < percent < 0.01 else 2
        return f"{100 * x:+.{decimals}f}%"
    return f"{x:+.3f}" if signed else f"{x:.3f}"


def share(fraction: float | str) -> str:
    """Returns a share as a percentage of three digits: without decimals 0.5% would be 0%."""
    return f"{100 * float(fraction):.3g}%"


def figure_with_interval(metrics: dict, metric: str, missing: str = "") -> str:
    """Formats a method's figure with its 95% interval in brackets, where it has one."""
    text = figure(metric, metrics.get(metric), missing=missing)
    ends = metrics.get("intervals", {}).get(metric)
    if is_missing(metrics.get(metric)) or not ends or any(map(is_missing, ends)):
        return text
    return f"{text} [{', '.join(figure(metric, x) for x in ends)}]"


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]], align: str) -> str:
    """Formats a Markdown table, without a newline at its end.

    `align` has a letter for each column: l, c or r.
    """
    rule = "|".join(_MARKDOWN_RULES[letter] for letter in align)
    # A user's names may hold a bar, which would begin another column.
    escaped = ([cell.replace("|", r"\|") for cell in cells] for cells in (head, *rows))
    lines = [f"| {' | '.join(cells)} |" for cells in escaped]
    return "\n".join([lines[0], f"|{rule}|", *lines[1:]])


def comma_separated(rows: Sequence[dict], columns: Sequence[str] | None = None) -> str:
    """Formats rows as CSV with a header, in the order of `columns` or else of the first row's keys.

    None becomes an empty cell.
    """
    # csv ends lines as Windows does by default.
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, columns or list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def latex(head: Sequence[str], rows: Iterable[Sequence[str]], align: str) -> str:
    """Formats a LaTeX tabular with rules of `booktabs`; cells must be escaped already."""
    lines = [" & ".join(cells) + r" \\" for cells in (head, *rows)]
    begin = [rf"\begin{{tabular}}{{{align}}}", r"\toprule", lines[0], r"\midrule"]
    return "\n".join([*begin, *lines[1:], r"\bottomrule", r"\end{tabular}"]) + "\n"


def escape_latex(text: str) -> str:
    """Escapes the characters that LaTeX reads as commands; a minus sign becomes math."""
    for special in "\\&%#_":
        text = text.replace(special, "\\" + special)
    return text.replace("−", "$-$")


def aligned(rows: Sequence[Sequence[str]], align: str = "") -> str:
    """Formats rows, the header included, as columns of plain text, padded with spaces.

    `align` has a letter for each column, l or r; by default only the first is left-aligned.
    """
    align = align or "l" + "r" * (len(rows[0]) - 1)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = zip(row, align, widths, strict=True)
        padded = [c.ljust(width) if side == "l" else c.rjust(width) for c, side, width in cells]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)
