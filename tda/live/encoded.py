"""A corpus's gradients, and all that makes a question's gradient like them."""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence

from tda import store as stores
from tda.gradients.encoder import Encoder
from tda.gradients.projection import Projection
from tda.runtime.progress import Progress
from tda.store import GradientStore


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A corpus's gradients, and all that makes a query's gradient like them.

    Attributes:
        store: the corpus's gradients.
        queries: the gradients that R_eval is taken of; None where there are none.
        projection: P.
        scales: gives 1/√V by path, or None; called when a query is first encoded.
        output, include, exclude, untapped: as for `tda.gradients.encoder.make_encoder`.
        encoder: makes the encoder where these fields do not tell all of it (Kronecker factors);
            scores by such gradients have no parts by position.
    """

    store: GradientStore
    queries: GradientStore | None
    projection: Projection
    scales: Callable[[Progress], dict | None] = lambda on_progress: None
    output: str = "loss"
    include: str | None = None
    exclude: str | None = None
    untapped: str = "leave"
    encoder: Callable[[], Encoder] | None = None


def finished_stores(paths: Sequence) -> list[GradientStore]:
    """The stores among some paths that lack nothing, those written last first."""
    there = [p for p in map(pathlib.Path, paths) if stores.finished(p)]
    there.sort(key=lambda p: (p / "manifest.json").stat().st_mtime, reverse=True)
    return [stores.open_store(p) for p in there]
