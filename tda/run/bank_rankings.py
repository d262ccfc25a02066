"""Scores of a bank's passages by the methods of any run, each computed as if it were alone.

Each method has a directory of its own, so that it reuses nothing of another method's, and its time
is its full cost. For methods that rank by captured gradients the training runs again and keeps
them; the time of a training is not part of their cost.
"""

import dataclasses
import shutil

import jax
import numpy as np
from ml_collections import ConfigDict

from tda import methods as method_lib
from tda.encoding import captured
from tda.encoding.captured import TrainingRows
from tda.retrieval.ranked import Ranked
from tda.run import capturing, first_stage, retrieve, train
from tda.run.counterfactual import Retrained
from tda.run.registry import retriever_of
from tda.run.run import Run
from tda.run.workdir import Workdir
from tda.runtime.engine import PROCESSES
from tda.training import loop


def name_of(retrained: Retrained, name: str) -> str:
    """Returns a hash of all that a method's scores depend on."""
    method = method_lib.parse(name)[name]
    run = run_alone(retrained, name, retrained.directory)
    return retriever_of(method)(run).ranking_name(method)


def takes_captured(retrained: Retrained, name: str) -> bool:
    """Returns whether a method, or one that finds its candidates, ranks by captured gradients."""
    chosen = method_lib.parse(name)
    chosen = first_stage.with_first(retrained.run.config, chosen)
    return any(method.retriever == "captured" for method in chosen.values())


def scores_by(retrained: Retrained, name: str) -> np.ndarray:
    """Returns a method's score of every passage for every query, float32 [Q, N]."""
    folder = retrained.directory / "alone"
    # Files of a killed program would be work that is not timed.
    shutil.rmtree(folder, ignore_errors=True)
    run = run_alone(retrained, name, Workdir(folder))
    if takes_captured(retrained, name):
        train_capturing(retrained, run)
    ranked = retrieve.retrieve(run)[0][name]
    shutil.rmtree(folder)
    return all_scores(ranked, run.corpus.rows)


def run_alone(retrained: Retrained, name: str, workdir: Workdir) -> Run:
    """Returns the bank's run with one method, in a directory of its own."""
    config = ConfigDict(retrained.run.config.to_dict())
    config.methods, config.store.root = name, ""
    config.eval.top_k, config.eval.queries = retrained.run.corpus.rows, 0
    return dataclasses.replace(retrained.run, config=config, workdir=workdir, engine=PROCESSES)


def train_capturing(retrained: Retrained, run: Run) -> dict:
    """Trains as the bank does, in its first order, and keeps each example's part of every step.

    Args:
        retrained: the bank.
        run: the run whose store takes the parts.

    Returns:
        The final state.
    """
    training = retrained.trainings[0]
    layout, seed = retrained.run.trained.batches
    rows = TrainingRows.of(training.table, layout, training.steps, seed)
    model = training.model_fn.merge(training.params)
    recorder = capturing.make_recorder(
        run.config, run.corpus, run.workdir, model, run.trained.fingerprint, rows
    )
    rates = train.learning_rates(run.config, training.steps)(np.arange(training.steps))
    path = capturing.path_of(run.config, run.workdir, run.trained.fingerprint)
    captured.keep_steps(path, rows, rates)
    advance = loop.make_step(training.model_fn.merge, training.tx, recorder)
    state = training.start()
    for step, batch in enumerate(training.batches):
        state, _, parts = advance(state, batch.arrays)
        recorder.record(step, parts)
    recorder.keep(training.steps)
    return jax.block_until_ready(state)


def all_scores(ranked: Ranked, passages: int) -> np.ndarray:
    """Returns the score of every passage of a full ranking, float32 [Q, N].

    Raises:
        ValueError: the ranking leaves passages out.
    """
    rows_QxN = ranked.proponents
    if rows_QxN.shape[1] != passages or (rows_QxN < 0).any():
        raise ValueError(
            f"the ranking has {rows_QxN.shape[1]} of {passages} passages; a board needs the score "
            "of each of them"
        )
    scores_QxN = np.empty(rows_QxN.shape, np.float32)
    np.put_along_axis(scores_QxN, rows_QxN, ranked.proponent_scores, axis=1)
    return scores_QxN
