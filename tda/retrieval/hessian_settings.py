"""The settings of R: its sample, mixture, regularisation and structure."""

import dataclasses
import math
from collections.abc import Sequence

from tda import hessian
from tda.methods import Method

EVALUATIONS = ("all", "leave_one_out", "disjoint")
STRUCTURES = ("auto", "dense", "kronecker")
# "auto" takes a product below so many passages for each number of a block: with 0.2 to 2 of them a
# dense R was worse, with 4 a little better (results/README.md). And only from so many for each row
# or column, since the factors of fewer are noise as well.
_PASSAGES_PER_NUMBER, _PASSAGES_PER_ROW = 3, 2


@dataclasses.dataclass(frozen=True)
class HessianSettings:
    """The settings of R."""

    sample: int = 0
    """The number of random passages that R_train is computed from; 0 takes all."""

    seed: int = 0
    """Seed of that draw, and of the halves of queries."""

    component: int = 0
    """k of the mixing rule, counted from 1; 0: in proportion to the width."""

    weight: float = -1.0
    """λ, the weight of R_eval; below 0, the rule decides."""

    damping: float = -1.0
    """Added to R, in mean eigenvalues of a block; below 0, R is shrunk as its sample size requires.

    R of few rows is mostly noise. With 1e-3 it ranked worse than no R at all when there were as
    many rows as columns, and no fixed number suited every size (benchmarks/default_shrinkage.py).
    """

    cutoff: float = 0.0
    """The least eigenvalue, in mean eigenvalues of a block; other directions are left out."""

    evaluation: str = "all"
    """The queries that R_eval is computed from: "all", "leave_one_out" or "disjoint"."""

    structure: str = "dense"
    """R of a block that is one matrix: "dense", or "kronecker": a factor for rows and for columns.

    "auto" takes a product where the passages are enough for its factors, two for each row and
    column, and too few for a dense R, fewer than three for each number of the block. A block that
    sums several matrices has no common rows and columns, so its R stays dense.
    """

    def shapes_of(
        self, shapes: Sequence[hessian.Shape], passages: int
    ) -> tuple[hessian.Shape, ...]:
        """Returns the shapes of R's blocks.

        Args:
            shapes: those of the gradients' blocks (`Layout.shapes`).
            passages: the number of passages.

        Raises:
            ValueError: `structure` is unknown, or no block is one matrix.
        """
        if self.structure not in STRUCTURES:
            raise ValueError(
                f"unknown structure={self.structure!r} of R; use {', '.join(STRUCTURES)}"
            )
        dense, is_auto = hessian.dense_shapes(map(math.prod, shapes)), self.structure == "auto"
        # A product with each query left out is searched query by query (`tda.retrieval.whitening`).
        if self.structure == "dense" or (is_auto and self.evaluation == "leave_one_out"):
            return dense
        if is_auto:
            rows = min(self.sample or passages, passages)
            return tuple(
                shape
                if _PASSAGES_PER_ROW * max(shape) <= rows < _PASSAGES_PER_NUMBER * width
                else (width,)
                for shape, (width,) in zip(shapes, dense, strict=True)
            )
        if all(len(s) == 1 for s in shapes):
            raise ValueError(
                f"structure={self.structure} of R has no effect: several matrices are added up in "
                "each block of the gradients; use a projection with pooling=matrix, or "
                "structure=dense"
            )
        return tuple(shapes)

    def evaluation_of(self, method: Method) -> str:
        """Returns the queries of a method's R_eval: by its own rule, or by that of the settings.

        Raises:
            ValueError: `evaluation` is unknown.
        """
        rule = method.evaluation or self.evaluation
        if rule not in EVALUATIONS:
            raise ValueError(f"unknown hessian.evaluation={rule!r}; use {', '.join(EVALUATIONS)}")
        return rule
