"""Recall of the approximate index against its rate, beside exact search on the same rows.

    python -m benchmarks.scann_curve --config=configs/world_facts.py:pooled --workdir=pooled \\
        --json=PATH

The workdir is that of a finished run of `experiments.trace`; give its config and its config flags.
Its encodings by TrackStar are searched. An index is built for every way of coding and partitioning,
and searched in several ways, through the library's own calls. All sides run in one process, in
turns. Exact search is one float32 product with all rows by XLA, and the k best and worst of each
query. A *batch* is many queries at once; *single* queries come one after another. There are two
rates: of both rankings, proponents and opponents, and of proponents alone; exact search takes as
long for either. Recall is over all queries; that of *signal* counts only those of the best rows
whose scores as many random rows would not reach (the mean, and √(2 ln rows) deviations). First the
distribution of the scores is printed: of the best rows and of the bulk, and in fewer dimensions.
"""

import dataclasses
import functools
import shutil
import statistics
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from benchmarks import finished_run, record
from experiments import launch
from tda.retrieval.ranked import Ranked
from tda.retrieval.scann import index as scann_index
from tda.retrieval.scann.settings import Settings

_METHOD = flags.DEFINE_enum("method", "trackstar", ["trackstar", "cosine"], "whose encodings")
_ROWS = flags.DEFINE_integer("rows", 0, "how many of the passages; 0 takes all")
_BATCH = flags.DEFINE_integer("batch", 128, "queries of a batch")
_SINGLE = flags.DEFINE_integer("single", 8, "queries that come one by one, each round")
_ROUNDS = flags.DEFINE_integer("rounds", 3, "rounds after warm-up")
_PART_ROWS = flags.DEFINE_integer("part_rows", 25_000, "rows of a part of the index, at most")
_BLOCKS = flags.DEFINE_list("dims_per_block", ["2", "3", "4", "8", "16"], "without leaves")
_REORDER = flags.DEFINE_list("reorder", ["50", "100", "200", "500", "1000"], "per part")
_BASE = flags.DEFINE_integer("base", 4, "dims_per_block of the following cases")
_DTYPES = flags.DEFINE_list("reorder_dtypes", ["float32", "bfloat16"], "beside int8")
_THRESHOLDS = flags.DEFINE_list("thresholds", ["0.03", "0.2"], "beside 0")
_TRAINING = flags.DEFINE_list("training_rows", ["1000", "20000"], "beside 5000")
_LEAVES = flags.DEFINE_list("leaves", ["64", "256"], "of a part")
_SHARES = flags.DEFINE_list("shares", ["0.02", "0.05", "0.1", "0.25", "0.5", "1"], "of leaves")
_KINDS = flags.DEFINE_list("kinds", ["plain", "residual", "soar"], "of leaves")
_REDUCED = flags.DEFINE_list("reduced", ["512", "1024", "2048", "4096"], "dimensions left by PCA")

K, GOAL = 10, 0.95
# Rows that principal directions are taken of.
_SAMPLE = 6000
SETTINGS = dict(reorder_dtype="int8", training_rows=5000, threshold=0.0)
KINDS = {"plain": {}, "residual": dict(residual=True), "soar": dict(soar=1.5)}


@dataclasses.dataclass(frozen=True)
class Case:
    """One index, and the ways in which it is searched: (leaves to search, rows reordered)."""

    name: str
    settings: Settings
    searches: tuple[tuple[int, int], ...]


def cases() -> list[Case]:
    """Codes of every size; then, of one size, other dtypes, other thresholds, and leaves."""
    reorders = tuple((0, int(r)) for r in _REORDER.value)
    one = functools.partial(Settings, **(SETTINGS | dict(part_rows=_PART_ROWS.value)))
    base = dict(dims_per_block=_BASE.value)
    out = [Case(f"{b} dims", one(dims_per_block=int(b)), reorders) for b in _BLOCKS.value]
    for dtype in _DTYPES.value:
        name = f"{_BASE.value} dims, {dtype}"
        out.append(Case(name, one(**base | dict(reorder_dtype=dtype)), reorders))
    for threshold in map(float, _THRESHOLDS.value):
        name = f"{_BASE.value} dims, threshold {threshold:g}"
        out.append(Case(name, one(**base | dict(threshold=threshold)), reorders))
    for training in map(int, _TRAINING.value):
        name = f"{_BASE.value} dims, {training} training rows"
        out.append(Case(name, one(**base | dict(training_rows=training)), reorders))
    for leaves in map(int, _LEAVES.value):
        searched = sorted({max(1, round(float(s) * leaves)) for s in _SHARES.value})
        searches = tuple((n, r) for n in searched for r in (100, 500))
        for kind in _KINDS.value:
            settings = one(**base, leaves=leaves, leaves_to_search=leaves, **KINDS[kind])
            name = f"{_BASE.value} dims, {leaves} leaves, {kind}"
            out.append(Case(name, settings, searches))
    return out


class Exact:
    """Exact search over rows in memory.

    Args:
        passages_CxE: float32; a memory map is read where it lies.
    """

    def __init__(self, passages_CxE: np.ndarray):
        self._rows = jax.device_put(passages_CxE)

    def __call__(self, queries_QxE: np.ndarray) -> Ranked:
        """Returns the best and the worst K rows of every query."""
        best, rows, worst, last = map(np.asarray, _exact(queries_QxE, self._rows))
        return Ranked(rows.astype(np.int64), best, last.astype(np.int64), -worst, {})


@jax.jit
def _exact(queries_QxE, passages_CxE):
    scores = jnp.matmul(passages_CxE, queries_QxE.T, precision=jax.lax.Precision.HIGHEST).T
    return *jax.lax.top_k(scores, K), *jax.lax.top_k(-scores, K)


def in_batches(search, queries_QxE) -> Ranked:
    """Returns a ranking of all queries, a batch at a time."""
    size = _BATCH.value
    some = [search(queries_QxE[a : a + size]) for a in range(0, len(queries_QxE), size)]
    names = [f.name for f in dataclasses.fields(Ranked) if f.name != "first_ranks"]
    return Ranked(*(np.concatenate([getattr(r, n) for r in some]) for n in names), {})


def one_by_one(search, queries_QxE) -> None:
    """Searches for each query alone."""
    for i in range(len(queries_QxE)):
        search(queries_QxE[i : i + 1])


def anatomy(passages_CxE, queries_QxE, wanted: Ranked) -> tuple[dict, np.ndarray]:
    """Returns figures of the scores: of the best rows, of the bulk, and in fewer dimensions.

    And which of the best rows are signal, bool [Q, K].
    """
    product = jax.jit(lambda q, x: jnp.matmul(q, x.T))
    scores_QxC = np.asarray(product(queries_QxE, passages_CxE))
    quantiles = {
        f"{n}th best": float(np.median(np.partition(scores_QxC, -n, axis=1)[:, -n]))
        for n in (1, 10, 100, 1000)
        if n < scores_QxC.shape[1]
    }
    limits_Q = scores_QxC.mean(axis=1) + scores_QxC.std(axis=1) * np.sqrt(
        2 * np.log(scores_QxC.shape[1])
    )
    signal_QxK = wanted.proponent_scores > limits_Q[:, None]
    figures = {
        "share of signal, by rank": signal_QxK.mean(axis=0).round(4).tolist(),
        "scores, median over queries": quantiles
        | {
            "1st worst": float(np.median(scores_QxC.min(axis=1))),
            "10th worst": float(np.median(wanted.opponent_scores[:, -1])),
            "mean": float(scores_QxC.mean()),
            "deviation": float(np.median(scores_QxC.std(axis=1))),
        },
        "1 / sqrt(width)": float(passages_CxE.shape[1] ** -0.5),
        "reduced by PCA": {},
    }
    # Directions of a sample: no more than it has rows.
    rng = np.random.default_rng(0)
    some = np.sort(rng.choice(len(passages_CxE), min(len(passages_CxE), _SAMPLE), replace=False))
    sample_SxE = np.array(passages_CxE[some])
    values, vectors = np.linalg.eigh(np.asarray(product(sample_SxE, sample_SxE)))
    values, vectors = values[::-1], vectors[:, ::-1]
    for dims in map(int, _REDUCED.value):
        if dims >= min(sample_SxE.shape):
            continue
        basis_PxE = np.asarray(product(vectors[:, :dims].T, sample_SxE.T))
        basis_PxE = basis_PxE / np.sqrt(values[:dims, None])
        rows_CxP = np.asarray(product(passages_CxE, basis_PxE))
        of_queries_QxP = np.asarray(product(queries_QxE, basis_PxE))
        reduced_QxC = np.asarray(product(of_queries_QxP, rows_CxP))
        first = {n: np.argpartition(-reduced_QxC, n, axis=1)[:, :n] for n in (10, 200, 1000)}
        figures["reduced by PCA"][dims] = {
            "share of the passages' squared norm": float(np.square(rows_CxP).sum(1).mean()),
            "share of the queries' squared norm": float(np.square(of_queries_QxP).sum(1).mean()),
            **{
                f"recall@10 in the first {n}": shared(f, wanted.proponents)
                for n, f in first.items()
            },
        }
    return figures, signal_QxK


def measured(
    case: Case, directory: str, passages_CxE, queries_QxE, exact: Exact, wanted, signal_QxK
) -> dict:
    """Measures recall and times of an index, searched in every way, and of exact search."""

    started = time.perf_counter()
    encodings = scann_index.Encodings(passages_CxE.__getitem__, *passages_CxE.shape, {})
    index = scann_index.build(directory, encodings, case.settings)
    figures = {
        "settings": vars(case.settings),
        "parts": len(index.parts),
        "build, s": time.perf_counter() - started,
        "bytes a row": case.settings.row_bytes(encodings.width),
        "searches": [],
    }
    batch, few = queries_QxE[: _BATCH.value], queries_QxE[: _SINGLE.value]
    sides = {("exact", "batch"): functools.partial(exact, batch)}
    sides["exact", "single"] = functools.partial(one_by_one, exact, few)

    def search_index(queries_QxE, how, opponents=True):
        leaves, reorder = how
        index.settings = dataclasses.replace(
            case.settings, leaves_to_search=leaves, reorder=reorder
        )
        return index.search(queries_QxE, K, opponents=opponents)

    for how in case.searches:
        for both in (True, False):
            search = functools.partial(search_index, how=how, opponents=both)
            sides[how, both, "batch"] = functools.partial(search, batch)
            sides[how, both, "single"] = functools.partial(one_by_one, search, few)
    times = record.in_turns(sides, _ROUNDS.value)
    count = {"batch": len(batch), "single": len(few)}
    for of in count:
        name = f"exact, {of}, queries a second"
        figures[name] = count[of] / statistics.median(times["exact", of])
    for how in case.searches:
        found = search_index(queries_QxE, how)
        point = {
            "case": case.name,
            "leaves searched": how[0],
            "reorder": how[1],
            "recall of proponents": shared(found.proponents, wanted.proponents),
            "recall of signal": shared(found.proponents, wanted.proponents, signal_QxK),
            "recall of opponents": shared(found.opponents, wanted.opponents),
        }
        for both, name in ((True, "both"), (False, "proponents")):
            for of in count:
                seconds = times[how, both, of]
                ratios = [e / s for e, s in zip(times["exact", of], seconds, strict=True)]
                point[f"{name}, {of}, queries a second"] = count[of] / statistics.median(seconds)
                point[f"{name}, {of}, over exact"] = statistics.median(ratios)
        figures["searches"].append(point)
    return figures


def shared(found_Qxk, exact_Qxk, among_Qxk=True) -> float:
    """Returns what share of the exact rows, or of some among them, was found."""
    hit_Qxk = (exact_Qxk[:, :, None] == found_Qxk[:, None, :]).any(axis=2)
    return float(hit_Qxk.mean(where=among_Qxk))


def front(points: list[dict], recall, rate: str) -> list[dict]:
    """Returns the points that no other beats in both recall and rate, fastest first."""
    out, best = [], -1.0
    for point in sorted(points, key=lambda p: -p[rate]):
        if recall(point) > best:
            out.append(point)
            best = recall(point)
    return out


def show(points: list[dict]) -> None:
    """Prints the Pareto fronts, and the fastest searches that reach the goal."""
    goals = {
        "proponents": lambda p: p["recall of proponents"],
        "both": lambda p: min(p["recall of proponents"], p["recall of opponents"]),
    }
    for of in ("batch", "single"):
        for name, recall in goals.items():
            rate = f"{name}, {of}, queries a second"
            print(f"\n{name}, {of}: Pareto front")
            for p in front(points, recall, rate):
                print(f"  {line(p, f'{name}, {of}')}")
            reached = [p for p in points if recall(p) >= GOAL]
            if reached:
                p = max(reached, key=lambda p: p[rate])
                print(f"  fastest with recall@{K} of {GOAL}: {line(p, f'{name}, {of}')}")
            else:
                print(f"  none reaches recall@{K} of {GOAL}")


def line(point: dict, what: str) -> str:
    """Formats a search's figures."""
    leaves = f", {point['leaves searched']} searched" if point["leaves searched"] else ""
    return (
        f"{point['recall of proponents']:.3f} {point['recall of opponents']:.3f} "
        f"signal {point['recall of signal']:.3f} "
        f"{point[f'{what}, queries a second']:8.1f}/s {point[f'{what}, over exact']:6.2f} x exact  "
        f"{point['case']}{leaves}, reorder {point['reorder']}"
    )


def main(config, workdir):
    """Measures every case and prints the fronts."""
    path = f"{workdir}/scann_curve_{_METHOD.value}.npy"
    passages_CxE, queries_QxE = finished_run.encodings(config, workdir, _METHOD.value, path)
    passages_CxE = passages_CxE[: _ROWS.value or len(passages_CxE)]
    exact = Exact(passages_CxE)
    wanted = in_batches(exact, queries_QxE)
    figures = {"rows": len(passages_CxE), "width": passages_CxE.shape[1]}
    figures |= {"queries": len(queries_QxE), "batch": min(_BATCH.value, len(queries_QxE))}
    print(figures, flush=True)
    figures["anatomy"], signal_QxK = anatomy(passages_CxE, queries_QxE, wanted)
    for name, value in figures["anatomy"].items():
        print(f"{name}: {value}", flush=True)
    figures["indices"], points = {}, []
    for case in cases():
        directory = tempfile.mkdtemp(prefix="scann_curve_", dir=workdir)
        try:
            data = passages_CxE, queries_QxE, exact, wanted, signal_QxK
            found = measured(case, f"{directory}/index", *data)
        finally:
            shutil.rmtree(directory)
        figures["indices"][case.name] = found
        points += found["searches"]
        print(
            f"{case.name}: {found['build, s']:.0f} s to build, {found['bytes a row']} bytes a row,"
            f" exact {found['exact, batch, queries a second']:.1f}/s in batches,"
            f" {found['exact, single, queries a second']:.1f}/s single"
        )
        for point in found["searches"]:
            print(f"  {line(point, 'both, batch')}  ({line(point, 'proponents, batch')[25:45]})")
        print(flush=True)
        record.write("scann_curve", figures)
    show(points)


if __name__ == "__main__":
    launch.launch(main)
