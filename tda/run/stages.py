"""The stages of a run in order, from the corpus to the tables."""

import contextlib
from collections.abc import Iterator

import numpy as np
import optax

from tda import methods
from tda import store as stores
from tda.evaluation import summary
from tda.gradients.moments.scales import parse_correction
from tda.model.decoder import abstract_decoder
from tda.model.settings import DecoderSettings
from tda.reports import kinds, plots, tables
from tda.retrieval.ranked import Ranked
from tda.run import (
    capturing,
    corpus,
    evaluate,
    index,
    judging,
    measures,
    remembered,
    retrieve,
    train,
)
from tda.run.defaults import check_values
from tda.run.run import Run, Trained, projection_of, stored_as
from tda.run.workdir import Workdir
from tda.runtime import metrics as metric_writers
from tda.runtime import processes
from tda.runtime.atomic_file import open_atomic
from tda.runtime.command import of_main
from tda.runtime.engine import PROCESSES, Engine

_UNTRAINED = (
    "the model is not trained yet, and training is not split into groups: run the command once "
    "with --groups=none, which trains and prepares, and then this one"
)


def check(config, encoder: bool = True) -> None:
    """Checks the config before any file is read.

    Args:
        config: the config of a run.
        encoder: whether to check the sentence encoder too, which may have to be loaded.

    Raises:
        ValueError: a value is impossible or conflicts with another; the message names the key.
        FileNotFoundError: a file of the corpus does not exist.
    """
    chosen = methods.parse(config.methods)
    check_values(config)
    if not encoder:
        chosen = {n: m for n, m in chosen.items() if m.retriever != "dense"}
    DecoderSettings(**train.model_arguments(config))
    projection_of(config)
    stored_as(config)
    parse_correction(config.gradients.correction)
    evaluate.frequency_edges(config)
    retrieve.check(config, chosen)
    index.check(config)
    measures.check(config)
    judging.make_judge(config)
    metric_writers.check(config.metrics.writers)
    corpus.check_files(config)


def prepare(config, workdir: Workdir, engine: Engine = PROCESSES) -> Run:
    """Reads the corpus and trains the model, or opens both if they are finished.

    Raises:
        ValueError: the config does not fit the corpus or the model, which is checked before
            training; or the model is not trained, and the engine cannot train it.
    """
    is_untrained = not engine.can_train and not workdir.is_finished("train")
    # Tokenising needs a tokenizer alone.
    may_tokenise = config.model.pretrained or workdir.is_finished("tokenizer")
    if is_untrained and not (config.data.corpus and may_tokenise):
        raise ValueError(_UNTRAINED)
    if config.store.root:
        # Before training: it may be a bucket that this host may not write to.
        processes.on_first_process(
            "write to store.root", lambda: stores.check_root(config.store.root)
        )
    data = corpus.load(config, workdir, engine)
    processes.check_preemption(is_joint=True)
    if is_untrained:
        raise ValueError(f"the corpus is tokenised; {_UNTRAINED}")
    # The future run, with a model that has shapes but no values.
    settings = DecoderSettings(**train.model_arguments(config, data.tokenizer.vocab_size))
    mesh, tx = train.make_mesh(config), optax.identity()
    abstract = Trained(abstract_decoder(settings), "", 0, tx, mesh, {})
    retrieve.check_run(Run(config, workdir, data, abstract))
    run = Run(config, workdir, data, train.train(config, data, workdir), engine=engine)
    if config.eval.tail_patch_queries:
        measures.step_rule(run)  # at the traced checkpoint the learning rate may be 0
    return run


def trace(config, workdir: Workdir, engine: Engine = PROCESSES) -> tuple[dict, dict]:
    """Runs all stages in order; returns metrics and notes (λ and the like) by method.

    Every process of a run calls it; process 0 writes all files but shards and checkpoints.

    Args:
        config: the config.
        workdir: the directory of all files.
        engine: who computes which group of a stage's work.

    Raises:
        ValueError: the config is impossible, or so for a task of an array, or another job works
            in the workdir.
        tda.runtime.array_tasks.Unfinished: other tasks of an array have not computed their part.
    """
    capturing.check(config)
    with opened(config, workdir, engine) as run:
        return _trace(run)


@contextlib.contextmanager
def opened(config, workdir: Workdir, engine: Engine = PROCESSES) -> Iterator[Run]:
    """Locks the workdir, and yields the run with its trained model; arguments as for `trace`.

    Raises:
        ValueError: the config is impossible, or another job works in the workdir.
    """
    # Processes of different commands would wait for each other in vain.
    processes.check_same_code()
    processes.check_alike("config", config.to_json())
    check(config)
    if engine.party and config.metrics.writers:
        raise ValueError(
            f"metrics.writers={config.metrics.writers} cannot be used by the tasks of an array, "
            "which would all write the same series; leave it out of their command"
        )
    run: list[Run] = []

    def remove_groups() -> None:
        if run:
            run[0].remove_groups()

    # The last of several jobs removes what only unfinished rankings need.
    on_last = remove_groups if engine.has_readers else lambda: None
    with workdir.hold(engine.party, on_last=on_last):
        try:
            with metric_writers.writing(config.metrics.writers, workdir.path, config.to_dict()):
                run.append(prepare(config, workdir, engine))
                yield run[0]
        finally:
            engine.close()


def _trace(run: Run) -> tuple[dict, dict]:
    workdir = run.workdir
    rankings, notes = retrieve.retrieve(run)
    metrics = evaluate.evaluate(run, rankings)
    text = "\n".join([tables.run_table(metrics), *index.describe(notes)])

    def write():
        if run.engine.party and workdir.has_new("table.md"):
            return  # another task of the array has written both
        remembered.remember(run)
        with open_atomic(workdir / "table.md") as out:
            out.write(f"{text}\n\n{tables.run_details(metrics)}\n")
        # Plots are an extra; a run without them is complete.
        if run.config.judge.name and plots.is_installed():
            kinds.draw(workdir / "kinds", metrics)

    with run.engine.alone():
        if processes.is_first():
            write()
    print("\n" + examples(run, rankings))
    print(text)
    for name, note in notes.items():
        if description := retrieve.describe(note):
            print(f"{name}: {description}")
    print(f"\nfiles: {workdir.path}/results/METHOD.jsonl, metrics.json, table.md")
    print(f"to look at them: {of_main('view', f'--workdir={workdir.path}')}")
    return metrics, notes


def examples(run: Run, rankings: dict[str, Ranked]) -> str:
    """Describes a few queries with the top three proponents of each method in full text.

    Facts that the model knows come first: of what it guesses or does not say, no passage may be the
    reason.
    """
    config, corpus = run.config, run.corpus
    queries = run.evaluated
    is_known = measures.knowledge(run, queries) == summary.KNOWLEDGE.index("knows")
    order = np.random.default_rng(config.data.seed + 1).permutation(len(queries))
    chosen = queries[sorted(order, key=lambda i: not is_known[i])[:3]]
    lines = []
    for q in sorted(map(int, chosen)):
        fact = corpus.queries[q]
        correct = set(corpus.correct["all"][q].tolist()) if corpus.has_labels else ()
        lines.append(f"{fact.prompt(config.data.prompt)} → {fact.entity1}")
        for name, ranked in rankings.items():
            lines.append(f"  {name}")
            for row, score in list(
                zip(ranked.proponents[q], ranked.proponent_scores[q], strict=True)
            )[:3]:
                if row < 0:  # a method that found fewer
                    continue
                mark = "✓" if int(row) in correct else " "
                lines.append(f"    {mark} {score:8.3f}  {corpus.text_of(int(row))}")
        lines.append("")
    return "\n".join(lines)
