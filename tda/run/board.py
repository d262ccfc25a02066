"""The board: every method's scores of all units, compared with the bank."""

import dataclasses
import pathlib

import jax
import numpy as np
from ml_collections import ConfigDict

from tda import methods as method_lib
from tda.counterfactual import figures
from tda.counterfactual.bank import draw_subsets
from tda.counterfactual.figures import Lds
from tda.evaluation import statistics, summary
from tda.evaluation.statistics import Interval
from tda.reports import board as board_report
from tda.reports import plots
from tda.retrieval.ranked import Ranked, best_of, first_rank
from tda.run import counterfactual, evaluate, stages
from tda.run.bank_scores import TITLES, BankScores, family, own_methods, title
from tda.run.counterfactual import Retrained
from tda.run.run import Run
from tda.run.workdir import Workdir
from tda.runtime.atomic_file import open_atomic, read_json, write_arrays, write_json
from tda.runtime.engine import PROCESSES, Engine
from tda.runtime.fingerprint import plain

# The share of units that QLD removes, and the number of random sets that it is compared with.
_OWN_SHARE, _RANDOM_SETS = 0.01, 10
# Passages of a method that are written for each query.
_SHOWN = 10
# The step of the passages' weights that metasmoothness is measured by.
_WEIGHT_STEP = 0.05


def check(config) -> None:
    """Checks the bank's keys and the methods of the board.

    Raises:
        ValueError: a value is impossible, or a method is unknown or does not score every passage.
    """
    counterfactual.check(config)
    names = own_methods(config)
    unknown = [n for n in names if n not in TITLES]
    if unknown:
        raise ValueError(
            f"counterfactual.methods: unknown {', '.join(unknown)}; there are {', '.join(TITLES)}"
        )
    if config.counterfactual.subsets < 2:
        raise ValueError(
            f"counterfactual.subsets={config.counterfactual.subsets}: LDS is a correlation over "
            "retrainings; give two or more"
        )
    if "annotated" in method_lib.parse(config.methods):
        raise ValueError("annotated has no scores to sum; leave it out of methods")
    if config.search.index != "none":
        raise ValueError(
            f"search.index={config.search.index} scores some passages only; use search.index=none"
        )


def measure(config, workdir: Workdir, engine: Engine = PROCESSES) -> dict:
    """Trains, retrains, scores by every method, and writes `board.md` and `board.json`.

    Beside them `costs.png` and `costs.svg`, LDS and MRR by cost, if matplotlib is installed;
    `board.npz`, each retraining's changes of loss as predicted and as they were; and, where a unit
    is a passage, `counterfactual/results/METHOD.jsonl`, the passages of each method.

    Args:
        config: the config.
        workdir: where all files go.
        engine: who computes which retrainings, and which groups of the searches.

    Returns:
        The figures by method.

    Raises:
        ValueError: the config is impossible.
        tda.runtime.array_tasks.Unfinished: other tasks of an array have to compute their part, or
            a run of several processes has retrained.
    """
    check(config)
    with stages.opened(config, workdir, engine) as run:
        board = score(run)
        with engine.alone():
            if engine.party and workdir.has_new("board.json"):  # by another task of the array
                record = read_json(workdir / "board.json")
            else:
                record = board.write(workdir.path, board.retrained.directory.path)[0]
    print(board_report.summarise(record))
    return record


def score(run: Run) -> "Board":
    """Retrains, which is computed in groups, and scores by every method."""
    bank_scores = BankScores(counterfactual.retrain(run))
    board = Board(bank_scores, bank_scores.compute())
    if board.config.counterfactual.own_top:
        board.compute_own_top()
    return board


def _write_passages(
    retrained: Retrained, scores: dict[str, np.ndarray], out: pathlib.Path
) -> dict[str, dict]:
    """Writes each method's passages, and whether they are correct, into a directory.

    Returns:
        The metrics of each method (`tda.run.evaluate`).
    """
    run, config = retrained.run, ConfigDict(retrained.run.config.to_dict())
    config.eval.update(samples=0, queries=0)
    config.eval.resamples = config.counterfactual.resamples
    rows_QxN = np.broadcast_to(np.arange(run.corpus.rows), next(iter(scores.values())).shape)
    rankings = {}
    for name, scores_QxN in scores.items():
        best_QxK, best_rows_QxK = best_of(scores_QxN, rows_QxN, _SHOWN)
        first_ranks = {
            label: np.array([first_rank(*pair) for pair in zip(scores_QxN, correct, strict=True)])
            for label, correct in run.corpus.correct.items()
        }
        rankings[name] = Ranked.of_proponents(best_rows_QxK, best_QxK, first_ranks)
    run = dataclasses.replace(run, config=config, engine=PROCESSES)
    return evaluate.evaluate(run, rankings, out)


def _add_metrics(record: dict, metrics: dict[str, dict]) -> None:
    """Adds MRR and tail-patch to a board, and how well they agree with LDS on the methods."""
    for name, of_method in metrics.items():
        for metric in ("tail_patch", "mrr"):
            if of_method.get(metric) is not None:  # without labels there is no MRR
                low, high = of_method["intervals"].get(metric, (None, None))
                interval = {"mean": of_method[metric], "low": low, "high": high}
                record["methods"][name][metric] = interval
    for fraction in record["banks"]:
        agreements = record["agreements"].setdefault(fraction, {})
        for metric in ("own_top", "tail_patch", "mrr"):
            pairs = [
                (m["lds"][fraction]["same order"]["mean"], m[metric]["mean"])
                for m in record["methods"].values()
                if metric in m
            ]
            if len(pairs) > 2:
                pairs_Mx2 = np.array(pairs)
                lds_M, metric_M = pairs_Mx2[np.isfinite(pairs_Mx2).all(axis=1)].T
                agreements[metric] = figures.spearman(lds_M[:, None], metric_M[:, None]).item()


class Board:
    """The figures of methods.

    Args:
        bank_scores: the bank, and the costs of its methods.
        scores: each method's scores of every unit, [Q, U].
    """

    def __init__(self, bank_scores: BankScores, scores: dict[str, np.ndarray]):
        self.retrained, self.scores = bank_scores.retrained, scores
        self._bank_scores = bank_scores
        self.config = self.retrained.run.config
        self.own_top: dict[str, Interval] = {}
        self.lds: dict[float, Lds] = {}
        """By fraction, in the first order of the data."""
        self.arrays: dict[str, np.ndarray] = {}
        """float64: FRACTION/LABEL holds the rises of the losses, [M, Q]; FRACTION/METHOD those that
        the method predicted, [M, Q]; FRACTION/LABEL/METHOD the LDS of each query, [Q]."""

    def write(self, directory: pathlib.Path, passages: pathlib.Path) -> tuple[dict, dict]:
        """Writes the board's files into a directory, and the methods' passages into another.

        Returns:
            The board as JSON values; and the metrics of each method's passages
            (`tda.run.evaluate`), none where a unit is not a passage.
        """
        record = self.figures()
        metrics: dict[str, dict] = {name: {} for name in self.scores}
        if self.config.counterfactual.unit == "passage":
            metrics = _write_passages(self.retrained, self.scores, passages)
            _add_metrics(record, metrics)
        with open_atomic(directory / "board.md") as out:
            out.write(f"{board_report.describe(record)}\n")
        write_arrays(directory / "board.npz", self.arrays)
        # Plots are an extra; a board without them is complete.
        if plots.is_installed():
            board_report.draw_costs(record, directory / "costs")
        # Last: other tasks of an array take this file as a sign that the board is finished.
        write_json(directory / "board.json", plain(record))
        return record, metrics

    def add_lds(self, metrics: dict[str, dict]) -> None:
        """Adds the LDS of every method to its metrics, and the differences to the other methods'.

        It is that in the first order of the data, by fraction: "lds_0.05". The board has been
        written before.
        """
        for fraction, lds in self.lds.items():
            key = f"lds_{fraction}"
            for name, of_method in metrics.items():
                figures_of_lds = summary.as_json({key: lds.interval(name)})
                of_method[key] = figures_of_lds[key]
                for part in ("counts", "intervals"):
                    of_method.setdefault(part, {}).update(figures_of_lds[part])
                differences = of_method.setdefault("differences", {})
                for other in (n for n in metrics if n != name):
                    d = lds.difference(name, other)
                    of_other = differences.setdefault(other, {})
                    of_other[key] = summary.difference_as_json(d.mean, d.low, d.high)

    def figures(self) -> dict:
        """Returns the board as JSON values."""
        settings, scores = self.config.counterfactual, self.scores
        record: dict = {"methods": {}, "ceilings": {}, "banks": {}, "agreements": {}}
        for name in scores:
            cost = self._bank_scores.costs.get(name)
            about = {"title": title(name, settings.unit), "family": family(name), "cost": cost}
            record["methods"][name] = about | {"lds": {}}
        for fraction, banks in self.retrained.banks.items():
            changes = {"same order": banks[0].changes_MxQ}
            if len(banks) > 1:
                changes["mean of orders"] = np.mean([b.changes_MxQ for b in banks], axis=0)
                c = figures.ceiling(*(b.changes_MxQ for b in banks))
                record["ceilings"][str(fraction)] = dataclasses.asdict(c)
            record["banks"][str(fraction)] = {
                "subsets": len(banks[0].losses_MxQ),
                "orders": len(banks),
                "mean change": float(np.mean(banks[0].changes_MxQ)),
                "sd of changes": float(np.std(banks[0].changes_MxQ, axis=0).mean()),
            }
            for name, scores_QxU in scores.items():
                predicted_MxQ = figures.predictions(scores_QxU, banks[0].removed_MxU)
                self.arrays[f"{fraction}/{name}"] = predicted_MxQ
            for label, changes_MxQ in changes.items():
                self.arrays[f"{fraction}/{label}"] = changes_MxQ
                lds = figures.lds(scores, banks[0], settings.resamples, settings.seed, changes_MxQ)
                self.lds.setdefault(fraction, lds)
                for name in scores:
                    of_method = record["methods"][name]["lds"].setdefault(str(fraction), {})
                    of_method[label] = _as_json(lds.interval(name))
                    self.arrays[f"{fraction}/{label}/{name}"] = lds.by_query[name]
                    if "ekfac_whole" in scores and name != "ekfac_whole":
                        difference = lds.difference(name, "ekfac_whole")
                        of_method[f"{label}, less EK-FAC's"] = _as_json(difference)
        for name, interval in self.own_top.items():
            record["methods"][name]["own_top"] = _as_json(interval)
        record["queries"] = len(self.retrained.queries)
        record["texts"] = [
            {"id": f.fact_id, "prompt": f.prompt(self.config.data.prompt), "target": f.entity1}
            for f in self.retrained.run.corpus.queries
        ]
        record["units"], record["unit"] = len(self.retrained.units), settings.unit
        record["steps"] = self.retrained.trainings[0].steps
        record["seconds of a training"] = self._bank_scores.training_seconds
        record["metasmoothness"] = self._metasmoothness()
        return record

    def _metasmoothness(self) -> float:
        """Returns the metasmoothness of the training along a random direction of the weights."""
        training = self.retrained.trainings[0]
        rng = np.random.default_rng([self.config.counterfactual.seed, 11])
        direction_U = np.append(rng.normal(size=len(self.retrained.units)), 0.0)
        direction_C = direction_U[self.retrained.unit_C].astype(np.float32)
        thetas = []
        for i in range(3):
            weights = training.even_weights + i * _WEIGHT_STEP * direction_C
            params = training.run(weights)["params"]
            leaves = [np.asarray(x).ravel() for x in jax.tree.leaves(params)]
            thetas.append(np.concatenate(leaves))
        return figures.metasmoothness(*thetas)

    def compute_own_top(self) -> None:
        """Computes each method's QLD, the mean over the first `counterfactual.own_top` queries.

        QLD is how much more a query's loss rises without its own top 1 % of the units than without
        as many random ones.
        """
        settings = self.config.counterfactual
        count = min(settings.own_top, len(self.retrained.queries))
        retraining, U = self.retrained.retraining(), len(self.retrained.units)
        random = draw_subsets(U, _OWN_SHARE, _RANDOM_SETS, settings.seed + 1)
        draw = {"own top": _OWN_SHARE, "seed": settings.seed + 1, "units": U}
        random_Q = retraining.losses(random, "retrain without a random 1 %", draw).mean(axis=0)
        for name, scores_QxU in self.scores.items():
            removed = figures.top_units(scores_QxU[:count], _OWN_SHARE)
            losses = retraining.losses(removed, f"retrain without the top of {name}")
            change_Q = np.diagonal(losses)[:count] - random_Q[:count]
            (self.own_top[name],) = statistics.intervals(
                change_Q[:, None], settings.resamples, settings.seed
            )


def _as_json(interval: Interval) -> dict:
    return {"mean": interval.mean, "low": interval.low, "high": interval.high}
