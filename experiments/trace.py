"""Trains a model, encodes its corpus, and traces queries back to passages.

    python -m experiments.trace --config=configs/world_facts.py --workdir=DIR

Every stage is resumed where it was killed, and skipped when its output is there and matches.
"""

from experiments.launch import launch
from tda import methods
from tda.live import finished_run
from tda.reports import report
from tda.run import corpus, evaluate, index, measures, retrieve, train
from tda.run.workdir import Workdir
from tda.runtime import processes


def main(config, workdir):
    """Runs all stages and prints the table."""
    run(config, Workdir(workdir))


def run(config, workdir: Workdir) -> dict:
    """All stages in order; returns the metrics by method."""
    return trace(config, workdir)[0]


def check(config, encoder: bool = True) -> None:
    """Nothing, where the config can be obeyed as far as it tells: before hours of training.

    Args:
        config: of the run.
        encoder: whether a sentence encoder is looked for too, which may have to be loaded.

    Raises:
        ValueError: it cannot; the message names the key.
    """
    chosen = methods.parse(config.methods)
    if not encoder:
        chosen = {n: m for n, m in chosen.items() if m.retriever != "dense"}
    retrieve.check(config, chosen)
    index.check(config)
    measures.check(config)


def trace(config, workdir: Workdir) -> tuple[dict, dict]:
    """All stages in order; returns the metrics, and what is to be told of them, by method.

    Every process of a run calls it; the first alone writes what is not a shard or a checkpoint.
    """
    processes.check_alike("config", config.to_json())
    check(config)
    data = corpus.load(config, workdir)
    trained = train.run(config, data, workdir)
    measures.check_step(config, trained)
    ranked, notes = retrieve.retrieve(config, data, trained, workdir)
    metrics = evaluate.run(config, data, trained, ranked, workdir)
    text = "\n".join([report.table(metrics), *index.told(notes)])
    if processes.is_first():
        whole = f"{text}\n\n{report.details(metrics)}\n"
        (workdir / "table.md").write_text(whole, encoding="utf-8")
        finished_run.remember(config, data, workdir)
    print("\n" + report.examples(config, data, ranked))
    print(text)
    for name, note in notes.items():
        if told := retrieve.told(note):
            print(f"{name}: {told}")
    print(f"\nfiles: {workdir.path}/results/METHOD.jsonl, metrics.json, table.md")
    print(f"to look at them: python -m experiments.view --workdir={workdir.path}")
    return metrics, notes


if __name__ == "__main__":
    launch(main)
