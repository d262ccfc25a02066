"""R, the Gauss-Newton approximation of the Hessian: sums, spectra, mixing and inverse roots."""

from tda.hessian.autocorrelation import Autocorrelation, autocorrelation_of_source
from tda.hessian.blocks import block_slices
from tda.hessian.root import (
    check_component,
    default_component,
    draw_halves,
    inverse_root,
    mix,
    mixing_weight,
    shrink,
    shrinkage,
    spectra,
    spectrum,
    whiten,
)

__all__ = [
    "Autocorrelation",
    "autocorrelation_of_source",
    "block_slices",
    "check_component",
    "default_component",
    "draw_halves",
    "inverse_root",
    "mix",
    "mixing_weight",
    "shrink",
    "shrinkage",
    "spectra",
    "spectrum",
    "whiten",
]
