"""What each dtype of a store loses: bytes, MRR, recall, and the passages retrieved.

    python -m benchmarks.dtypes --config=configs/world_facts.py --workdir=demo --json=dtypes.json

The workdir is that of a finished run of `experiments.trace` with a float32 store; the config, with
what the command line sets, must be the run's. Its rows are stored anew in every dtype, R is taken
from the rounded rows, and TrackStar and the plain cosine search them. *Overlap* is of the ten best
passages with those of float32, |A ∩ B| / 10.
"""

import pathlib
import tempfile

import numpy as np
from absl import flags

from benchmarks import finished_run, record
from experiments import launch
from tda import store as stores
from tda.evaluation import ranking
from tda.retrieval import exact

_JSON = flags.DEFINE_string("json", None, "file that every figure is written to")

K = 10


def run(config, directory: str) -> dict:
    """All figures, by dtype."""
    corpus, source, queries_QxE = finished_run.gradients(config, directory)
    blocks = dict(zip(source.manifest["blocks"], source.form.widths, strict=True))
    figures, exactly = {}, {}
    for dtype in stores.DTYPES:
        with tempfile.TemporaryDirectory(dir=directory) as path:
            store = stores.create(f"{path}/store", corpus.passages.ids, blocks, {}, dtype)
            for i in store.missing():
                store.write(i, source.read(store.shards()[i]))
            files = pathlib.Path(store.path).glob("0/*/c.*")
            found = {"bytes a row": sum(p.stat().st_size for p in files) / store.rows}
            chosen = finished_run.scorers(store, queries_QxE)
            ranked = exact.search(queries_QxE, store, chosen, K, corpus.correct)
        for name, r in ranked.items():
            wanted = exactly.setdefault(name, r.proponents)
            same = (wanted[:, :, None] == r.proponents[:, None, :]).any(axis=2)
            found[f"{name}: overlap"] = float(same.mean())
            for label, ranks in r.first_ranks.items():
                key = f"{name}: MRR, {label} labels"
                found[key] = float(ranking.mean(ranking.reciprocal_ranks(ranks)))
                hits = np.where(ranks > 0, ranks <= K, np.nan)
                found[f"{name}: recall@{K}, {label} labels"] = float(ranking.mean(hits))
                if dtype != "float32":
                    found[f"{key}, relative"] = found[key] / figures["float32"][key] - 1
        figures[dtype] = found
        print(dtype, {k: round(v, 5) for k, v in found.items()}, flush=True)
    return figures | {"rows": source.rows, "width": source.width, "queries": len(queries_QxE)}


def main(config, workdir):
    """Measures, and writes the figures."""
    figures = run(config, workdir)
    if _JSON.value:
        record.write(_JSON.value, "dtypes", figures)


if __name__ == "__main__":
    launch.launch(main)
