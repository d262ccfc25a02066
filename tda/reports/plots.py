"""Plots of measured figures with their intervals, as PNG and SVG. Needs matplotlib."""

import dataclasses
import importlib.util
import os
from collections.abc import Sequence

import numpy as np

from tda.runtime import atomic_file, metrics

# Distinguishable also with colour-vision deficiencies (Okabe & Ito 2008).
_COLOURS = "#0072B2 #D55E00 #009E73 #CC79A7 #E69F00 #56B4E9 #000000 #999933".split()
_MARKERS = "osD^vPX*"
_DASHES = ("-", "--", ":", "-.")
_MARK_DASHES = (0, (6, 4))
# Inches, approximately: the x axis of a panel, and a character of its tick labels.
_AXIS_WIDTH, _CHARACTER_WIDTH = 2.9, 0.09
# Inches of a named row, and of the margins above and below the rows.
_ROW_HEIGHT, _ROWS_MARGIN = 0.25, 0.8
# With more lines, error bars replace bands, which would hide each other.
_MOST_BANDS = 5


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of a panel."""

    label: str
    """The name in the legend; lines with the same label look alike in every panel."""
    x: Sequence
    """Numbers, or names: each name then has a row, and the figures are read on the x axis."""
    y: Sequence[float | None]
    """The figures; NaN or None where there is none."""
    low: Sequence[float | None] | None = None
    """The lower ends of the figures' intervals, as `y`; None for no intervals."""
    high: Sequence[float | None] | None = None
    """The upper ends."""
    marked: float | None = None
    """An x that a vertical line of the same colour marks, if x are numbers."""
    family: str = ""
    """Lines of one family share a colour and differ in dashes; by default the label."""
    names: Sequence[str] | None = None
    """A name beside each point; the points are then not joined."""


@dataclasses.dataclass(frozen=True)
class Panel:
    """Lines on one pair of axes; `percent` shows the figures as percentages."""

    title: str
    lines: list[Line]
    percent: bool = False


def is_installed() -> bool:
    """Returns whether matplotlib, an extra, is installed; without it runs draw no plots."""
    return importlib.util.find_spec("matplotlib") is not None


def check() -> None:
    """Checks that matplotlib is installed.

    Raises:
        ImportError: it is not; the message says what to install.
    """
    if not is_installed():
        raise ImportError("plots need matplotlib: pip install 'tda-jax[plots]'")


def draw(
    path: str | os.PathLike,
    panels: Sequence[Panel],
    x_label: str,
    *,
    log_x: bool = False,
    mark_label: str = "",
) -> list[str]:
    """Draws panels side by side with one legend, as `PATH.png` and `PATH.svg`; returns the paths.

    Args:
        path: the files' path without a suffix; they are written atomically.
        panels: the panels, from left to right.
        x_label: the label of the x axis.
        log_x: whether the x axis is logarithmic.
        mark_label: the legend's label for the lines' `marked` x.

    Raises:
        ImportError: matplotlib is not installed.
    """
    check()
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    lines = [line for panel in panels for line in panel.lines]
    names = list(dict.fromkeys(x for line in lines for x in line.x if isinstance(x, str)))
    styles = _styles(lines)
    handles = [Line2D([], [], label=label, **style) for label, style in styles.items()]
    if mark_label and any(line.marked is not None for line in lines):
        handles.append(Line2D([], [], color="grey", linestyle=_MARK_DASHES, label=mark_label))
    if set(styles) == set(names):  # the rows' names serve as the legend
        styles, handles = dict.fromkeys(styles, styles[names[0]]), []
    has_legend = len(handles) > 1

    width = 0.6 + 3.6 * len(panels)
    longest = max((len(h.get_label()) for h in handles), default=0)
    columns = max(1, min(len(handles), int(width / (0.6 + 0.075 * longest))))
    height = _ROWS_MARGIN + _ROW_HEIGHT * len(names) if names else 2.9
    height += 0.2 * (1 + -(-len(handles) // columns)) * has_legend
    figure = Figure(figsize=(width, height), layout="constrained")
    all_axes = figure.subplots(1, len(panels), squeeze=False, sharey="row" if names else "none")[0]
    for axes, panel in zip(all_axes, panels, strict=True):
        if names:
            _draw_rows(axes, panel.lines, names, styles)
        else:
            _draw_lines(axes, panel.lines, styles)
            axes.set_xlabel(x_label)
            if log_x:
                axes.set_xscale("log")
                _label_ticks(axes, sorted({x for line in lines for x in line.x}))
        axes.set_title(panel.title, fontsize=10)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        if panel.percent:
            _show_percent(axes, bool(names))
    if has_legend:
        figure.legend(
            handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=9
        )
    _hide_covered_names(figure)
    return _save(figure, path)


def _save(figure, path: str | os.PathLike) -> list[str]:
    """Writes a figure as PNG and SVG, the same bytes for the same figure; returns their paths."""
    from matplotlib import rc_context

    files = []
    for suffix in ("png", "svg"):
        files.append(f"{os.fspath(path)}.{suffix}")
        # Without a date and random ids.
        metadata = {"Date": None} if suffix == "svg" else {}
        same_ids = rc_context({"svg.hashsalt": "tda"})
        with same_ids, atomic_file.open_atomic(files[-1], "wb") as out:
            figure.savefig(out, format=suffix, dpi=160, metadata=metadata)
    metrics.log_plot(files[0])
    return files


def _show_percent(axes, in_rows: bool) -> None:
    """Shows the figures of an axis as percentages: of the x axis if each name has a row."""
    from matplotlib import ticker

    axis = axes.xaxis if in_rows else axes.yaxis
    if in_rows:  # labels such as 0.005% stand side by side
        axis.set_major_locator(ticker.MaxNLocator(4))
    # Rounded, so that 0.07 is not 7.000000000000001%; + 0 makes −0 a 0.
    axis.set_major_formatter(ticker.FuncFormatter(lambda x, _: f"{round(100 * x, 6) + 0:g}%"))


def _styles(lines: Sequence[Line]) -> dict[str, dict]:
    """Returns matplotlib's colour, dashes and marker by label."""
    families: dict[str, dict[str, None]] = {}
    for line in lines:
        families.setdefault(line.family or line.label, {})[line.label] = None
    return {
        label: {
            "color": _COLOURS[i % len(_COLOURS)],
            # The ninth family has the first colour again, hence another marker and other dashes.
            "marker": _MARKERS[(i + j + 4 * (i // len(_COLOURS))) % len(_MARKERS)],
            "linestyle": _DASHES[(j + i // len(_COLOURS)) % len(_DASHES)],
        }
        for i, labels in enumerate(families.values())
        for j, label in enumerate(labels)
    }


def _hide_covered_names(figure) -> None:
    """Hides names of points that would cover others: a crowd of points has a few names."""
    names = [text for axes in figure.axes for text in axes.texts]
    if names:
        figure.draw_without_rendering()  # only then texts have places
    boxes = []
    for text in names:
        box = text.get_window_extent()
        text.set_visible(not any(box.overlaps(other) for other in boxes))
        if text.get_visible():
            boxes.append(box)


def _draw_lines(axes, lines: Sequence[Line], styles: dict[str, dict]) -> None:
    for line in lines:
        order = np.argsort(np.asarray(line.x, float), kind="stable")
        x, y, low, high = (
            None if v is None else np.asarray(v, float)[order]
            for v in (line.x, line.y, line.low, line.high)
        )
        style = styles[line.label]
        if line.names is not None:
            style = style | {"linestyle": "none"}
            for i, at in enumerate(order):
                name, offset = line.names[at], (3, 3)
                axes.annotate(name, (x[i], y[i]), offset, textcoords="offset points", fontsize=6)
        axes.plot(x, y, linewidth=1.6, markersize=4.5, **style)
        if low is not None and high is not None:
            if len(lines) <= _MOST_BANDS and len(x) > 1 and line.names is None:
                axes.fill_between(x, low, high, color=style["color"], alpha=0.13, lw=0)
            else:
                axes.vlines(x, low, high, color=style["color"], linewidth=1, alpha=0.6)
        if line.marked is not None:
            axes.axvline(line.marked, color=style["color"], linestyle=_MARK_DASHES, lw=1, alpha=0.8)


def _draw_rows(axes, lines: Sequence[Line], names: list[str], styles: dict[str, dict]) -> None:
    """Draws a row for each name, from the top, with a point for each line that has the name."""
    labels_by_name = {n: [line.label for line in lines if n in line.x] for n in names}
    for line in lines:
        # The points of one row are spread over most of its height.
        labels = [labels_by_name[n] for n in line.x]
        offsets = [0.8 * ((row.index(line.label) + 0.5) / len(row) - 0.5) for row in labels]
        rows = np.array([names.index(n) for n in line.x]) + offsets
        style = styles[line.label] | {"linestyle": "none"}
        axes.plot(np.asarray(line.y, float), rows, markersize=5, **style)
        if line.low is not None and line.high is not None:
            low, high = (np.asarray(v, float) for v in (line.low, line.high))
            axes.hlines(rows, low, high, color=style["color"], linewidth=1.2, alpha=0.6)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)


def _label_ticks(axes, values: list[float]) -> None:
    """Puts ticks at the values themselves if they are few: a logarithmic axis may have none."""
    from matplotlib import ticker

    if len(values) > 6:
        return
    labels = [_short_number(v) for v in values]
    at = np.log(values)
    gaps = np.diff(at) / max(at[-1] - at[0], 1e-9) * _AXIS_WIDTH
    lengths = np.array([len(label) for label in labels])
    would_touch = (gaps < _CHARACTER_WIDTH * (lengths[1:] + lengths[:-1]) / 2).any()
    slant = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if would_touch else {}
    axes.set_xticks(values, labels, **slant)
    axes.xaxis.set_minor_locator(ticker.NullLocator())


def _short_number(value: float) -> str:
    """Formats a number for an axis, such as 2,048 or 1.3M."""
    for size, letter in ((1e9, "B"), (1e6, "M")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.5g}"
