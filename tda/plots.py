"""Plots of figures that were measured: lines with intervals, in PNG and SVG. Needs matplotlib."""

import dataclasses
import os
from collections.abc import Sequence

import numpy as np

from tda import whole_file

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
# More lines than these are drawn with error bars: their bands would hide one another.
_MOST_BANDS = 5


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of a panel.

    Attributes:
        label: its name in the legend; lines of one label look alike in every panel.
        x: numbers, or names (then points stand side by side).
        y: the figures; NaN where there is none.
        low, high: ends of each figure's interval, or NaN; None for no intervals.
        marked: x that a vertical line of the same colour marks, or None.
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
    """Lines over one pair of axes; `percent` shows y as percentages."""

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

    style = _styles([line for p in panels for line in p.lines])
    handles = _handles(style, mark_label if _is_marked(panels) else "")
    width = 0.6 + 3.6 * len(panels)
    columns = _legend_columns(handles, width)
    height = 3.1 + 0.2 * -(-len(handles) // columns)
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    named = any(isinstance(x, str) for p in panels for line in p.lines for x in line.x)
    # Names keep the order in which they come.
    names = list(dict.fromkeys(x for p in panels for line in p.lines for x in line.x))
    for axes, panel in zip(all_axes, panels, strict=True):
        for i, line in enumerate(panel.lines):
            x = np.array([names.index(v) if named else v for v in line.x], float)
            if named:  # side by side, since nothing lies between two names
                x += 0.4 * ((i + 0.5) / len(panel.lines) - 0.5)
            how = style[line.label] | ({"linestyle": "none"} if named else {})
            _line(axes, line, x, how, len(panel.lines) <= _MOST_BANDS and not named)
        axes.set_title(panel.title, fontsize=10)
        axes.set_xlabel(x_label)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        if log_x and not named:
            axes.set_xscale("log")
        if named:
            axes.set_xticks(range(len(names)), names, rotation=20, ha="right")
            axes.margins(x=0.1)
        elif log_x:
            _tick_values(axes, sorted(set(names)))
        if panel.percent:
            axes.yaxis.set_major_formatter(ticker.PercentFormatter(1.0))
    if len(handles) > 1:
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
        with whole_file.written(file, "wb") as out:
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


def _line(axes, line: Line, x: np.ndarray, style: dict, band: bool) -> None:
    order = np.argsort(x, kind="stable")
    x, y = x[order], np.asarray(line.y, float)[order]
    axes.plot(x, y, linewidth=1.6, markersize=4.5, **style)
    if line.low is not None and line.high is not None:
        low, high = (np.asarray(v, float)[order] for v in (line.low, line.high))
        if band and len(x) > 1:
            axes.fill_between(x, low, high, color=style["color"], alpha=0.13, lw=0)
        else:
            axes.vlines(x, low, high, color=style["color"], linewidth=1, alpha=0.6)
    if line.marked is not None:
        axes.axvline(line.marked, color=style["color"], linestyle=(0, (6, 4)), lw=1, alpha=0.8)


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
    longest = max(len(h.get_label()) for h in handles)
    return max(1, min(len(handles), int(width / (0.6 + 0.075 * longest))))
