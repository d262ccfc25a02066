"""Projected and corrected gradients against Bergson's, number by number.

    python -m benchmarks.bergson_gradients --json=bergson_gradients.json

Both sides have the same weights, tokens, second moments and projection matrices, in float32, so
every number of a row should be equal. Prints, for each correction, the largest difference of a
row's part for a matrix, over that part's norm, and the least cosine. Ends with status 1 if a
difference is above 1e-4. Bergson's environment is that of `benchmarks.vs_bergson`.
"""

import pathlib
import sys
import tempfile

import jax
import numpy as np
from absl import app, flags

from benchmarks import record, vs_bergson
from benchmarks.our_side import Ours
from tda.encoding import table
from tda.gradients import projection as projections
from tda.gradients import sites
from tda.gradients.projection import Projection
from tda.gradients.sites import find_sites

CORRECTIONS = ("none", "factored", "adam")
ALIKE = 1e-4


def module_of(site: sites.Site, layer: int) -> str:
    """Returns what Bergson calls a layer's matrix."""
    name = vs_bergson.NAMES[site.path.removeprefix("layers/").rpartition("/")[0]]
    return f"layers.{layer}.{name}"


def projection_matrices(chosen: list[sites.Site], projection: Projection) -> dict:
    """Returns A and B by Bergson's names: "right" multiplies inputs, and "left" outputs."""
    out = {}
    for site in chosen:
        for i, (left, right) in enumerate(
            zip(*projections.matrices(site, projection), strict=True)
        ):
            name = module_of(site, i)
            out[f"{name}/right"], out[f"{name}/left"] = left.T.copy(), right.T.copy()
    return out


def differences(ours_RxE, plan, chosen, theirs_RxE, sizes) -> dict[str, float]:
    """Returns how far the rows are from each other, matrix by matrix."""
    side = plan.side
    starts = np.cumsum([0, *(n for _, n in sizes)])
    place = {n: slice(*starts[i : i + 2]) for i, (n, _) in enumerate(sizes)}
    worst, least = 0.0, 1.0
    for site in chosen:
        for i, block in enumerate(plan.members[site.path]):
            mine = ours_RxE[:, plan.slices[block]].reshape(-1, side, side).astype(np.float64)
            # Their weights are [output, input].
            other = theirs_RxE[:, place.pop(module_of(site, i))].reshape(-1, side, side)
            other = np.swapaxes(other.astype(np.float64), 1, 2)
            norms = [np.linalg.norm(x, axis=(1, 2)) for x in (mine, other)]
            apart = np.linalg.norm(mine - other, axis=(1, 2)) / norms[0]
            cosines = (mine * other).sum((1, 2)) / (norms[0] * norms[1])
            worst, least = max(worst, apart.max()), min(least, cosines.min())
    if place:
        raise ValueError(f"Bergson has gradients that are none of ours: {', '.join(place)}")
    return {"largest difference": float(worst), "least cosine": float(least)}


def main(argv):
    """Compares every correction, and prints a line for each."""
    del argv
    jax.config.update("jax_platforms", "cpu")
    python = vs_bergson.install(pathlib.Path(flags.FLAGS.venv).expanduser())
    size = flags.FLAGS.sizes[0]
    with tempfile.TemporaryDirectory() as made:
        directory = pathlib.Path(made)
        setup, start = vs_bergson.prepare(directory, size), vs_bergson.starters(directory, python)
        ours = Ours(str(directory))
        chosen = find_sites(ours.model)
        projection = ours.projection()
        np.savez(directory / "projections.npz", **projection_matrices(chosen, projection))
        rows, found = np.arange(setup["rows"]), {}
        with start["bergson"]() as side:
            versions = side.ask("prepare")
            for correction in CORRECTIONS:
                encoder = ours.encoder(correction)
                mine = table.encode_rows(
                    encoder, ours.table(len(rows)), rows, ours.layout(flags.FLAGS.tokens)
                )
                command = dict(correction=correction, rows=len(rows), tokens=flags.FLAGS.tokens)
                sizes = side.ask("gradients", **command)["sizes"]
                theirs = np.load(directory / "rows.npy", allow_pickle=False)
                found[correction] = differences(mine, encoder.layout, chosen, theirs, sizes)
                print(f"{correction:10}", found[correction], flush=True)
    figures = {"setup": setup, "peer": versions, "corrections": found}
    record.write("bergson_gradients", figures)
    if max(f["largest difference"] for f in found.values()) > ALIKE:
        sys.exit("error: the gradients are not the same")


if __name__ == "__main__":
    app.run(main)
