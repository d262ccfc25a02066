"""The gradients that a finished run kept, and how to encode a question like them."""

from tda import store as stores
from tda.live.encoded import Encoded
from tda.methods import METHODS, GradientKind
from tda.run import encode, moments
from tda.run.run import Run
from tda.runtime.progress import Progress


def encoded_kinds(run: Run) -> dict[GradientKind, Encoded]:
    """The gradients of all methods whose stores are finished."""
    kinds = dict.fromkeys(m.gradients for m in METHODS.values())
    return {k: _encoded(run, k) for k in kinds if stores.finished(run.store_path("corpus", k))}


def _encoded(run: Run, kind: GradientKind) -> Encoded:
    queries = run.store_path("queries", kind)
    g = run.config.gradients

    def scales(on_progress: Progress):
        def on_batches(done: int) -> None:
            on_progress("estimating second moments", done, g.estimate_batches)

        return moments.inverse_root_moments(run, kind, on_batches)

    is_plain = kind.curvature == "none" and not kind.adam_step
    return Encoded(
        stores.open_store(run.store_path("corpus", kind)),
        stores.open_store(queries) if stores.finished(queries) else None,
        run.projection(kind),
        scales,
        kind.output or g.output,
        g.include or None,
        g.exclude or None,
        g.untapped,
        None if is_plain else lambda: encode.make_encoder(run, kind),
    )
