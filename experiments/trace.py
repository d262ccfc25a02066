"""Trains a model, encodes its corpus, and traces queries back to passages.

    python -m experiments.trace --config=configs/world_facts.py --workdir=DIR

Every stage is resumed where it was killed, and skipped when its output is there and matches.
"""

import sys

from absl import app, flags
from ml_collections import config_flags

from experiments import attribution, corpus, evaluation, report, training
from experiments.workdir import Workdir

_CONFIG = config_flags.DEFINE_config_file("config", None, "File of the run's config.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run's files.")


def main(argv):
    """Runs all stages and prints the table."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    config = _CONFIG.value
    try:
        run(config, Workdir(_WORKDIR.value))
    except (ValueError, OSError) as error:
        # What the user can mend is told in a line; anything else keeps its traceback.
        sys.exit(f"error: {error}")


def run(config, workdir: Workdir) -> dict:
    """All stages in order; returns the metrics by method."""
    from tda import methods

    methods.parse(config.methods)  # a wrong name is told before hours of training
    data = corpus.load(config, workdir)
    trained = training.run(config, data, workdir)
    ranked, notes = attribution.retrieve(config, data, trained, workdir)
    metrics = evaluation.run(config, data, trained, ranked, workdir)
    text = report.table(metrics)
    (workdir / "table.md").write_text(text + "\n", encoding="utf-8")
    print("\n" + report.examples(config, data, ranked))
    print(text)
    for name, note in notes.items():
        print(f"{name}: λ = {note['lambda']:.3f} at component {note['component']}")
    print(f"\nfiles: {workdir.path}/results/METHOD.jsonl, metrics.json, table.md")
    return metrics


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main)
