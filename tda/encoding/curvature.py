"""EK-FAC's factors of the passages of `tda.trace`, kept in its directory if there is one."""

import contextlib
import pathlib
from collections.abc import Callable, Iterator

from tda.data.batches import BatchLayout, draw
from tda.data.tokens import TokenTable
from tda.encoding.settings import TraceSettings
from tda.gradients import fitted_curvature, sampled_labels
from tda.gradients.kronecker import Curvature
from tda.runtime import progress
from tda.runtime.fingerprint import fingerprint, plain

# The most passages that the factors are computed from.
_SAMPLE = 4096


def fit(settings: TraceSettings, table: TokenTable, layout: BatchLayout) -> dict[str, Curvature]:
    """Returns the factors by path, from a sample of the passages."""
    seed = settings.moments.seed
    rows = draw(len(table), _SAMPLE, seed)

    def batches(stage: str) -> Iterator[dict]:
        name, options = f"EK-FAC: {stage}", {"labels": "sampled", "layout": layout, "seed": seed}
        with progress.bar(len(rows), name, "passage") as bar:
            yield from sampled_labels.batches(table, rows, **options, on_rows=bar.update)

    return fitted_curvature.fit(settings.model, settings.sites(), batches, "sampled")


def load_or_fit(
    settings: TraceSettings,
    table: TokenTable,
    layout: BatchLayout,
    directory: pathlib.Path,
    provenance: dict,
    holding: Callable[[], contextlib.AbstractContextManager],
) -> dict[str, Curvature]:
    """Returns the factors that a directory keeps, and computes them if it has none.

    Args:
        settings, table, layout: as for `fit`.
        directory: where they are kept.
        provenance: JSON values that decide the gradients.
        holding: locks the directory.
    """
    made_from = [provenance, table.fingerprint(), _SAMPLE, settings.moments.seed]
    file = directory / f"factors-{fingerprint(plain(made_from))}.npz"
    with holding():
        if not file.exists():
            factors = fit(settings, table, layout)
            directory.mkdir(parents=True, exist_ok=True)
            fitted_curvature.save(file, factors)
            return factors
        return fitted_curvature.load(file)
