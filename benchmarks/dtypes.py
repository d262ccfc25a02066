"""Bytes of a store against the quality of its search, by side, dtype, rank and structure of R.

    python -m benchmarks.dtypes --config=configs/world_facts.py:pooled --workdir=pooled \\
        --config.store.dtype=float32 --json=dtypes.json
    python -m benchmarks.dtypes --config=configs/trex_sweeps.py --workdir=runs/trex \\
        --config.store.dtype=float32 --sides=16,24,32 --structures=dense,kronecker --json=f.json

The workdir is that of a finished run of `experiments.trace`, best with a float32 store; give its
config and its config flags. A side without such a store is encoded first. The rows of a side are
stored anew in every dtype, and as every number of pairs of vectors (`--ranks`), R is computed from
the rounded rows, and TrackStar and the corrected cosine search them; queries stay float32.
*Overlap* compares the ten best passages with those of the first point: of float32 (with dense R if
it is among the structures), unless `--dtypes` or `--ranks` leave it out; |A ∩ B| / 10.

Points in the JSON file are not measured again, so further calls may add sides and structures.
`--plot=PATH` draws MRR and recall by bytes for all points of the file.
"""

import dataclasses
import itertools
import json
import pathlib
import tempfile

import numpy as np
from absl import flags

from benchmarks import finished_run, record
from experiments import launch
from tda import store as stores
from tda.evaluation import ranking as metrics
from tda.methods import METHODS, GradientKind
from tda.reports import plots
from tda.retrieval import exact
from tda.retrieval.ranked import Ranked
from tda.retrieval.whitening import Whitening
from tda.run import encode
from tda.runtime import progress

_SIDES = flags.DEFINE_list("sides", [], "sides of a block; by default the config's")
_STRUCTURES = flags.DEFINE_list("structures", [], "structures of R; by default the config's")
_DTYPES = flags.DEFINE_list("dtypes", list(stores.DTYPES), "dtypes to store rows in")
_RANKS = flags.DEFINE_list("ranks", ["0"], "pairs of vectors of a block; 0 stores it whole")
_METHODS = flags.DEFINE_list("methods", ["trackstar", "cosine"], "which of the two search")
_PLOT = flags.DEFINE_string("plot", None, "path of the plot, without a suffix")

K = 10
# Float32 bytes of the rows of a shard, which are in memory at once.
_SHARD_ROWS_BYTES = 128 << 20
_NAMES = {"trackstar": "trackstar", "cosine": "exp3"}
# TrackStar's MRR in Chang et al. 2024, table 1: 65,536 float32 dimensions of a model of 8B
# parameters, and 19.6M passages.
_PAPER = 0.365


def measure(config, directory: str, structures: list[str], points: dict[str, dict]) -> None:
    """Adds the figures of one side to `points`, and writes them one by one."""
    run, kind = finished_run.load(config, directory), GradientKind(True)
    source, queries_QxE = encode.encode(run, kind)
    blocks = dict(zip(source.manifest["blocks"], source.form.widths, strict=True))
    ids, side = run.corpus.passages.ids, config.projection.side
    exact_best: dict[str, np.ndarray] = {}
    for rank, dtype in itertools.product(map(int, _RANKS.value), _DTYPES.value):
        suffix = f" rank {rank}" if rank else ""
        names = {s: f"{side} {s} {dtype}{suffix}" for s in structures}
        is_first = not exact_best and dtype == "float32" and not rank
        if all(n in points for n in names.values()) and not is_first:
            continue
        row_bytes = stores.Form(dtype, source.form.widths, rank).row_bytes
        shard_bytes = _SHARD_ROWS_BYTES * row_bytes // (4 * source.form.width)
        with tempfile.TemporaryDirectory(dir=directory) as path:
            store = stores.create(f"{path}/store", ids, blocks, {}, dtype, shard_bytes, rank=rank)
            with progress.bar(store.rows, f"store {dtype}{suffix}", "passage") as bar:
                for i in store.missing():
                    rows = store.shards()[i]
                    store.write(i, source.read(rows))
                    bar.update(rows.stop - rows.start)
            for structure, name in names.items():
                settings = dataclasses.replace(run.hessian, structure=structure)
                shapes = run.block_shapes(kind)
                whitening = Whitening(settings, store, queries_QxE, shapes=shapes)
                chosen = {n: METHODS[_NAMES[n]] for n in _METHODS.value}
                (part,) = whitening.parts(chosen)
                with progress.bar(store.rows, f"search {name}", "passage") as bar:
                    search = exact.ExactSearch(store, on_rows=bar.update)
                    ranked = search.rank(queries_QxE, part.scorers, K, run.corpus.correct)
                points[name] = {
                    "side": side,
                    "structure": structure,
                    "dtype": dtype,
                    "rank": rank,
                    "bytes a row": row_bytes,
                    "width": source.form.width,
                    "rows": store.rows,
                    "queries": len(queries_QxE),
                } | _figures(ranked, exact_best)
                print(name, {k: round(v, 5) for k, v in points[name].items() if ":" in k})
                record.write("dtypes", points)


def _figures(ranked: dict[str, Ranked], exact_best: dict[str, np.ndarray]) -> dict[str, float]:
    """Returns the figures of each method; the first call sets the best passages to compare with."""
    figures = {}
    for method, ranking in ranked.items():
        best = exact_best.setdefault(method, ranking.proponents)
        same = (best[:, :, None] == ranking.proponents[:, None, :]).any(axis=2)
        figures[f"{method}: overlap"] = float(same.mean())
        for label, ranks in ranking.first_ranks.items():
            measures = {
                "MRR": metrics.reciprocal_ranks(ranks),
                f"recall@{K}": metrics.hits(ranks, K),
            }
            for name, values_Q in measures.items():
                figures[f"{method}: {name}, {label} labels"] = float(metrics.mean(values_Q))
    return figures


def draw(points: list[dict], path: str) -> list[str]:
    """Draws TrackStar's MRR and recall by bytes: a line by structure and dtype, over the sides."""
    panels, sizes = [], [p["bytes a row"] for p in points]
    for title in ("MRR", f"recall@{K}"):
        lines = []
        by_line: dict[tuple, list] = {}
        for p in points:
            rank = f", rank {p['rank']}" if p.get("rank") else ""
            xy = p["bytes a row"], p[f"trackstar: {title}, all labels"]
            by_line.setdefault((p["dtype"], f"{p['structure']}{rank}"), []).append(xy)
        for (dtype, rest), xy in by_line.items():
            lines.append(plots.Line(f"{dtype}, {rest}", *zip(*xy, strict=True), family=dtype))
        if title == "MRR":
            ends = [min(sizes), max(sizes)]
            lines.append(plots.Line("the paper's, 8B parameters", ends, [_PAPER] * 2))
        panels.append(plots.Panel(title, lines))
    return plots.draw(path, panels, "bytes a passage", log_x=True)


def main(config, workdir):
    """Measures, and writes and draws the figures."""
    record_path = pathlib.Path(record.JSON.value) if record.JSON.value else None
    points: dict[str, dict] = {}
    if record_path is not None and record_path.exists():
        points = json.loads(record_path.read_text())["figures"]
    structures = _STRUCTURES.value or [config.hessian.structure]
    for side in map(int, _SIDES.value or [config.projection.side]):
        config.projection.side = side
        measure(config, workdir, structures, points)
    if _PLOT.value:
        draw(list(points.values()), _PLOT.value)


if __name__ == "__main__":
    launch.launch(main)
