"""R, the Gauss-Newton approximation of the Hessian: sums, spectra, mixing and roots."""

from tda.hessian.root import (
    check_component,
    component,
    halves,
    inverse_root,
    mix,
    mixing_weight,
    shrinkage,
    shrunk,
    spectra,
    spectrum,
    whiten,
)
from tda.hessian.sums import Autocorrelation, autocorrelation, of_source, rows_for

__all__ = [
    "Autocorrelation",
    "autocorrelation",
    "check_component",
    "component",
    "halves",
    "inverse_root",
    "mix",
    "mixing_weight",
    "of_source",
    "rows_for",
    "shrinkage",
    "shrunk",
    "spectra",
    "spectrum",
    "whiten",
]
