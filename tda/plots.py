"""Plots of figures that were measured: lines with intervals, in PNG and SVG. Needs matplotlib."""

import dataclasses
import os
from collections.abc import Sequence

import numpy as np

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


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of a panel.

    Attributes:
        label: its name in the legend; lines of one label look alike in every panel.
        x: numbers, or names (then points stand side by side).
        y: the figures; NaN where there is none.
        low, high: ends of each figure's interval, or NaN; None for no intervals.
        marked: x that a vertical line of the same colour marks, or None.
    """

    label: str
    x: Sequence
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    marked: float | None = None


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

    labels = list(dict.fromkeys(line.label for p in panels for line in p.lines))
    style = {
        label: dict(color=_COLOURS[i % len(_COLOURS)], marker=_MARKERS[i % len(_MARKERS)])
        for i, label in enumerate(labels)
    }
    figure = Figure(figsize=(0.6 + 3.6 * len(panels), 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    named = any(isinstance(x, str) for p in panels for line in p.lines for x in line.x)
    # Names keep the order in which they come.
    names = list(dict.fromkeys(x for p in panels for line in p.lines for x in line.x))
    for axes, panel in zip(all_axes, panels, strict=True):
        for line in panel.lines:
            x = np.array([names.index(v) if named else v for v in line.x], float)
            order = np.argsort(x, kind="stable")
            _line(axes, line, x, order, style[line.label])
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
    _legend(figure, all_axes, style, mark_label if _is_marked(panels) else "")
    files = []
    for suffix in ("png", "svg"):
        file = f"{os.fspath(path)}.{suffix}"
        part = f"{file}.part"
        # No date in the file: the same figures give the same bytes.
        metadata = {"Date": None} if suffix == "svg" else {}
        figure.savefig(part, format=suffix, dpi=160, metadata=metadata)
        os.replace(part, file)
        files.append(file)
    return files


def _line(axes, line: Line, x, order, style: dict) -> None:
    y = np.asarray(line.y, float)
    axes.plot(x[order], y[order], linewidth=1.6, markersize=4.5, **style)
    if line.low is not None and line.high is not None:
        low, high = np.asarray(line.low, float), np.asarray(line.high, float)
        axes.fill_between(x[order], low[order], high[order], color=style["color"], alpha=0.13, lw=0)
        if len(x) < 2:  # a band of one point has no area
            axes.vlines(x, low, high, color=style["color"], linewidth=1)
    if line.marked is not None:
        axes.axvline(line.marked, color=style["color"], linestyle="--", linewidth=1, alpha=0.8)


def _tick_values(axes, values: list[float]) -> None:
    """The values themselves as ticks, where they are few: a logarithmic axis may show none."""
    from matplotlib import ticker

    if len(values) <= 6:
        axes.set_xticks(values, [f"{v:,.5g}" for v in values])
        axes.xaxis.set_minor_locator(ticker.NullLocator())


def _is_marked(panels: Sequence[Panel]) -> bool:
    return any(line.marked is not None for p in panels for line in p.lines)


def _legend(figure, all_axes, style: dict, mark_label: str) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], label=label, **how) for label, how in style.items()]
    if mark_label:
        handles.append(Line2D([], [], color="grey", linestyle="--", label=mark_label))
    if len(handles) > 1:
        figure.legend(
            handles=handles,
            loc="outside lower center",
            ncols=min(len(handles), 1 + len(all_axes)),
            frameon=False,
            fontsize=9,
        )
