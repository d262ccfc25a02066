"""Kronecker factors from a sample of passages, for EK-FAC and LoGra, and in a file."""

from collections.abc import Callable, Iterable

from flax import nnx

from tda.gradients import kronecker
from tda.gradients.kronecker import Curvature
from tda.gradients.sites import Site
from tda.runtime import atomic_file


def fit(
    model: nnx.Module,
    chosen: list[Site],
    batches: Callable[[str], Iterable[dict]],
    labels: str,
    keep: int | None = None,
) -> dict[str, Curvature]:
    """Returns factors by path: all of EK-FAC's, or LoGra's leading eigenvectors.

    Args:
        model: any NNX model of tokens to logits.
        chosen: the sites, from `kronecker.factored`.
        batches: returns the sample's batches (`sampled_labels.batches`) for a pass over it, by the
            name of what the pass computes.
        labels: "sampled" or "data", as the batches have them.
        keep: the number of leading eigenvectors, without eigenvalues; None for EK-FAC.
    """
    covariances = kronecker.covariances(model, chosen, batches("covariances"), labels)
    bases = kronecker.eigenvectors(covariances, keep)
    if keep is not None:
        return bases
    return kronecker.corrected(model, chosen, batches("eigenvalues"), labels, bases)


def save(file, factors: dict[str, Curvature]) -> None:
    """Writes factors; the file appears whole or not at all."""
    arrays = {
        f"{path}|{name}": x
        for path, c in factors.items()
        for name, x in (("left", c.left), ("right", c.right), ("values", c.values))
        if x is not None
    }
    atomic_file.write_arrays(file, arrays)


def load(file) -> dict[str, Curvature]:
    """Reads what `save` wrote."""
    arrays = atomic_file.read_arrays(file)
    paths = {name.rpartition("|")[0] for name in arrays}
    return {
        p: Curvature(arrays[f"{p}|left"], arrays[f"{p}|right"], arrays.get(f"{p}|values"))
        for p in paths
    }
