"""Plots of figures that were measured: lines with intervals, in PNG and SVG. Needs matplotlib."""

import dataclasses
import os
from collections.abc import Sequence

import numpy as np

from tda.runtime import atomic_file

# Told apart by people who see few colours too (Okabe & Ito 2008).
_COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#000000",
    "#999933",
)
_MARKERS = "osD^vPX*"
_DASHES = ("-", "--", ":", "-.")
# What a panel's x axis and a character of its labels take, about, in inches.
_AXIS_WIDTH, _CHARACTER = 2.9, 0.09
# Inches of a row of names, and of what is above and below the rows.
_ROW_HEIGHT, _ROWS_HEIGHT = 0.25, 0.8
# More lines than these are drawn with error bars: their bands would hide one another.
_MOST_BANDS = 5


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of a panel.

    Attributes:
        label: its name in the legend; lines of one label look alike in every panel.
        x: numbers, or names: then each has a row, and figures are read along the x axis.
        y: the figures; NaN where there is none.
        low, high: ends of each figure's interval, or NaN; None for no intervals.
        marked: x that a vertical line of the same colour marks, where x are numbers, or None.
        family: lines of one family share a colour, and differ in their dashes; by default a line
            is a family of its own.
    """

    label: str
    x: Sequence
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    marked: float | None = None
    family: str = ""


@dataclasses.dataclass(frozen=True)
class Panel:
    """Lines over one pair of axes; `percent` shows the figures as percentages."""

    title: str
    lines: list[Line]
    percent: bool = False


def check() -> None:
    """Raises an ImportError that says what to install, unless matplotlib is there."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'tda[plots]'") from error


def draw(
    path: str | os.PathLike,
    panels: Sequence[Panel],
    x_label: str,
    *,
    log_x: bool = False,
    mark_label: str = "",
) -> list[str]:
    """Draws panels side by side with one legend, as `PATH.png` and `PATH.svg`.

    Args:
        path: of the files, without a suffix; they appear whole or not at all.
        panels: what to draw, from left to right.
        x_label: what x is.
        log_x: a logarithmic x axis.
        mark_label: what the lines' `marked` x are called in the legend.

    Returns:
        The files' paths.

    Raises:
        ImportError: matplotlib is not installed.
    """
    check()
    from matplotlib import ticker
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = [line for p in panels for line in p.lines]
    style, names = _styles(lines), _names(lines)
    handles = _handles(style, mark_label if _is_marked(panels) else "")
    if set(style) == set(names):  # the rows say which is which
        style = dict.fromkeys(style, style[names[0]])
        handles = []
    legend = len(handles) > 1
    width = 0.6 + 3.6 * len(panels)
    columns = _legend_columns(handles, width)
    height = _ROWS_HEIGHT + _ROW_HEIGHT * len(names) if names else 2.9
    height += 0.2 * (1 + -(-len(handles) // columns)) * legend
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    all_axes = figure.subplots(1, len(panels), squeeze=False, sharey="row" if names else "none")[0]
    for axes, panel in zip(all_axes, panels, strict=True):
        if names:
            _rows(axes, panel.lines, names, style)
        else:
            _lines(axes, panel.lines, style)
            axes.set_xlabel(x_label)
            if log_x:
                axes.set_xscale("log")
                _tick_values(axes, sorted({x for line in lines for x in line.x}))
        axes.set_title(panel.title, fontsize=10)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        if panel.percent:
            figures = axes.xaxis if names else axes.yaxis
            figures.set_major_formatter(ticker.FuncFormatter(_percent))
    if legend:
        figure.legend(
            handles=handles,
            loc="outside lower center",
            ncols=columns,
            frameon=False,
            fontsize=9,
        )
    files = []
    for suffix in ("png", "svg"):
        file = f"{os.fspath(path)}.{suffix}"
        # No date in the file: the same figures give the same bytes.
        metadata = {"Date": None} if suffix == "svg" else {}
        with atomic_file.open_atomic(file, "wb") as out:
            figure.savefig(out, format=suffix, dpi=160, metadata=metadata)
        files.append(file)
    return files


def _styles(lines: Sequence[Line]) -> dict[str, dict]:
    """Colour, dashes and marker by label."""
    families: dict[str, list[str]] = {}
    for line in lines:
        members = families.setdefault(line.family or line.label, [])
        if line.label not in members:
            members.append(line.label)
    return {
        label: {
            "color": _COLOURS[i % len(_COLOURS)],
            "marker": _MARKERS[(i + j) % len(_MARKERS)],
            # A ninth colour would be the first again.
            "linestyle": _DASHES[(j + i // len(_COLOURS)) % len(_DASHES)],
        }
        for i, members in enumerate(families.values())
        for j, label in enumerate(members)
    }


def _names(lines: Sequence[Line]) -> list[str]:
    """The lines' x where they are names, in the order in which they come; else none."""
    names = list(dict.fromkeys(x for line in lines for x in line.x))
    return names if any(isinstance(x, str) for x in names) else []


def _lines(axes, lines: Sequence[Line], style: dict[str, dict]) -> None:
    for line in lines:
        order = np.argsort(np.asarray(line.x, float), kind="stable")
        x, y, low, high = (
            None if v is None else np.asarray(v, float)[order]
            for v in (line.x, line.y, line.low, line.high)
        )
        how = style[line.label]
        axes.plot(x, y, linewidth=1.6, markersize=4.5, **how)
        if low is not None and high is not None:
            if len(lines) <= _MOST_BANDS and len(x) > 1:
                axes.fill_between(x, low, high, color=how["color"], alpha=0.13, lw=0)
            else:
                axes.vlines(x, low, high, color=how["color"], linewidth=1, alpha=0.6)
        if line.marked is not None:
            axes.axvline(line.marked, color=how["color"], linestyle=(0, (6, 4)), lw=1, alpha=0.8)


def _rows(axes, lines: Sequence[Line], names: list[str], style: dict[str, dict]) -> None:
    """A row for each name, from the top; in it a point for each line that has one."""
    sharing = {n: [line.label for line in lines if n in line.x] for n in names}
    for line in lines:
        how = style[line.label] | {"linestyle": "none"}
        mine = [sharing[n] for n in line.x]
        apart = [0.5 * ((m.index(line.label) + 0.5) / len(m) - 0.5) for m in mine]
        rows = np.array([names.index(n) for n in line.x]) + apart
        axes.plot(np.asarray(line.y, float), rows, markersize=5, **how)
        if line.low is not None and line.high is not None:
            ends = (np.asarray(v, float) for v in (line.low, line.high))
            axes.hlines(rows, *ends, color=how["color"], linewidth=1.2, alpha=0.6)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)


def _percent(value: float, _) -> str:
    return f"{round(100 * value, 6) + 0:g}%"


def _tick_values(axes, values: list[float]) -> None:
    """The values themselves as ticks, where they are few: a logarithmic axis may show none."""
    from matplotlib import ticker

    if len(values) <= 6:
        labels = [_short(v) for v in values]
        slant = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"}
        axes.set_xticks(values, labels, **(slant if _meet(values, labels) else {}))
        axes.xaxis.set_minor_locator(ticker.NullLocator())


def _meet(values: list[float], labels: list[str]) -> bool:
    """Whether labels of rising values would touch on a logarithmic axis."""
    at = np.log(values)
    gaps = np.diff(at) / max(at[-1] - at[0], 1e-9) * _AXIS_WIDTH
    lengths = np.array([len(label) for label in labels])
    return bool((gaps < _CHARACTER * (lengths[1:] + lengths[:-1]) / 2).any())


def _short(value: float) -> str:
    """A number as an axis shows it, such as 2,048 or 1.3M."""
    for size, letter in ((1e9, "B"), (1e6, "M")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.5g}"


def _is_marked(panels: Sequence[Panel]) -> bool:
    return any(line.marked is not None for p in panels for line in p.lines)


def _handles(style: dict[str, dict], mark_label: str) -> list:
    """What the legend shows of each label."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], label=label, **how) for label, how in style.items()]
    if mark_label:
        handles.append(Line2D([], [], color="grey", linestyle=(0, (6, 4)), label=mark_label))
    return handles


def _legend_columns(handles: list, width: float) -> int:
    """As many as fit `width` inches."""
    longest = max((len(h.get_label()) for h in handles), default=0)
    return max(1, min(len(handles), int(width / (0.6 + 0.075 * longest))))
