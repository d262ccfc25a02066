"""R, the Gauss-Newton approximation of the Hessian: sums, spectra, mixing and inverse roots."""

from tda.hessian.autocorrelation import Autocorrelation, autocorrelation_of_source
from tda.hessian.blocks import KroneckerRoot, Root, Shape, block_slices, dense_shapes
from tda.hessian.root import (
    apply_root,
    apply_transposed_root,
    check_component,
    default_component,
    draw_halves,
    inverse_root,
    mix,
    mixing_weight,
    shrink,
    shrinkage,
    spectra,
    whiten,
)
