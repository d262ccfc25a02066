"""The figure of what proponents say: their shares by kind, at each rank, and tail-patch by kind."""

import os

from tda.methods import METHODS
from tda.reports import plots, tables
from tda.reports.plots import Line, Panel

_LEAST_PAIRS = 5


def draw(path: str | os.PathLike, metrics: dict) -> list[str]:
    """Draws two figures, `PATH` and `PATH_by_rank`, as PNG and SVG; returns the files.

    The first has every method's shares and tail-patch by kind, of five pairs or more; the second,
    the shares by rank of the reference method, and of BM25 if it is among the methods.

    Args:
        path: without a suffix.
        metrics: by method, as `tda.run.evaluate` returns them for a run with a judge.

    Raises:
        ImportError: matplotlib is not installed.
    """
    by_method = {name: m["by_kind"] for name, m in metrics.items()}
    panels = [Panel("share of the proponents", [_shares(*x) for x in by_method.items()], True)]
    if any(x["n_tail_patches"] for by_kind in by_method.values() for x in by_kind.values()):
        steps = [
            Line(METHODS[n].title, list(kinds), list(map(_step, kinds.values())))
            for n, kinds in by_method.items()
        ]
        panels.append(Panel("tail-patch of a step on one", steps, True))
    files = plots.draw(path, panels, "")
    shown = dict.fromkeys(n for n in (tables.reference_of(metrics), "bm25") if n in metrics)
    by_rank = [
        Panel(
            METHODS[n].title,
            [
                Line(kind, range(1, 1 + len(x["by_rank"])), x["by_rank"])
                for kind, x in by_method[n].items()
            ],
            True,
        )
        for n in shown
    ]
    return files + plots.draw(f"{os.fspath(path)}_by_rank", by_rank, "rank")


def _step(contents: dict) -> float:
    """Returns the mean tail-patch of a kind; NaN, which is not drawn, if it is of few pairs."""
    return contents["tail_patch"] if contents["n_tail_patches"] >= _LEAST_PAIRS else float("nan")


def _shares(name: str, contents: dict) -> Line:
    low, high = zip(*(x["interval"] for x in contents.values()), strict=True)
    shares = [x["share"] for x in contents.values()]
    return Line(METHODS[name].title, list(contents), shares, low, high)
