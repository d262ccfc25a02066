"""Plots of the spectra of R."""

import os

import numpy as np

from tda.reports import plots

# Points of a line, at even distances on a logarithmic axis.
_POINTS = 60


def draw(file, component: int | None = None, out=None) -> list[str]:
    """Draws the spectra in a file of `tda.retrieval.whitening`.

    Args:
        file: of spectra (.npz).
        component: k of the mixing rule, which a line marks.
        out: path of the plots without suffix; beside the file by default.

    Returns:
        The plots' paths.

    Raises:
        ValueError: the file is not one of spectra; the message names it.
        ImportError: matplotlib is not installed.
    """
    plots.check()
    try:
        with np.load(file, allow_pickle=False) as arrays:
            spectra = {n: arrays[n] for n in ("train", "evaluation") if n in arrays}
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read as a file of spectra: {error}") from error
    if not spectra:
        raise ValueError(f"{file} has neither the array train nor evaluation: no spectra")
    lines = []
    for name, label in (("train", "R_train"), ("evaluation", "R_eval")):
        if name in spectra:
            values = np.sort(spectra[name])[::-1]
            x = np.unique(np.geomspace(1, len(values), _POINTS).round().astype(int))
            y = values[x - 1]
            with np.errstate(divide="ignore"):
                # What is 0 but for rounding is not drawn.
                y = np.where(y > 1e-9 * values[0], np.log10(y), np.nan)
            lines.append(plots.Line(label, x.tolist(), y, marked=component))
    panel = plots.Panel("log10 of the eigenvalues", lines)
    path = os.path.splitext(os.fspath(file))[0] if out is None else out
    return plots.draw(path, [panel], "component", log_x=True, mark_label="k of the mixing rule")
