"""Plots of the spectra of R."""

import os

import numpy as np

from tda.reports import plots

# Points of a line, at even distances on a logarithmic axis.
_POINTS = 60


def draw(file, component: int | None = None, out=None) -> list[str]:
    """Draws the eigenvalues of R that `tda.retrieval.whitening` wrote; returns the plots' paths.

    Args:
        file: the spectra, .npz.
        component: k of the mixing rule, marked by a vertical line.
        out: the plots' path without suffix; by default that of the file.

    Raises:
        ValueError: the file holds no spectra; the message names it.
        ImportError: matplotlib is not installed.
    """
    plots.check()
    try:
        with np.load(file, allow_pickle=False) as arrays:
            spectra = {n: arrays[n] for n in ("train", "evaluation") if n in arrays}
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read as a file of spectra: {error}") from error
    if not spectra:
        raise ValueError(
            f"{file} holds no spectra: it has neither the array train nor evaluation; give a "
            "spectra*.npz of a run's retrieval/ folder"
        )
    lines = []
    for name, label in (("train", "R_train"), ("evaluation", "R_eval")):
        if name in spectra:
            values = np.sort(spectra[name])[::-1]
            x = np.unique(np.geomspace(1, len(values), _POINTS).round().astype(int))
            y = values[x - 1]
            with np.errstate(divide="ignore"):
                # Eigenvalues that are 0 up to rounding are not drawn.
                y = np.where(y > 1e-9 * values[0], np.log10(y), np.nan)
            lines.append(plots.Line(label, x.tolist(), y, marked=component))
    panel = plots.Panel("log10 of the eigenvalues", lines)
    path = os.path.splitext(os.fspath(file))[0] if out is None else out
    return plots.draw(path, [panel], "component", log_x=True, mark_label="k of the mixing rule")
