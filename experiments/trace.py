"""Trains a model, encodes its corpus, and traces queries back to passages.

    python -m experiments.trace --config=configs/world_facts.py --workdir=DIR

Every stage is resumed where it was killed, and skipped when its output is there and matches.
"""

from experiments import attribution, corpus, evaluation, indexing, live, report, training
from experiments.launch import launch
from experiments.workdir import Workdir
from tda import methods, processes


def main(config, workdir):
    """Runs all stages and prints the table."""
    run(config, Workdir(workdir))


def run(config, workdir: Workdir) -> dict:
    """All stages in order; returns the metrics by method.

    Every process of a run calls it; the first alone writes what is not a shard or a checkpoint.
    """
    processes.check_alike("config", config.to_json())
    methods.parse(config.methods)  # a wrong name is told before hours of training
    indexing.check(config)
    data = corpus.load(config, workdir)
    trained = training.run(config, data, workdir)
    ranked, notes = attribution.retrieve(config, data, trained, workdir)
    metrics = evaluation.run(config, data, trained, ranked, workdir)
    text = "\n".join([report.table(metrics), *indexing.told(notes)])
    if processes.is_first():
        (workdir / "table.md").write_text(text + "\n", encoding="utf-8")
        live.remember(config, workdir)
    print("\n" + report.examples(config, data, ranked))
    print(text)
    for name, note in notes.items():
        if "lambda" in note:
            print(f"{name}: λ = {note['lambda']:.3f} at component {note['component']}")
    print(f"\nfiles: {workdir.path}/results/METHOD.jsonl, metrics.json, table.md")
    print(f"to look at them: python -m experiments.view --workdir={workdir.path}")
    return metrics


if __name__ == "__main__":
    launch(main)
