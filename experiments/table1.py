"""Table 1 of the paper on one corpus: every row, with intervals, as Markdown, CSV and LaTeX.

    python -m experiments.table1 --config=configs/trex_table1.py --workdir=DIR

Does all that `experiments.trace` does, with the methods of the config, and writes `table1.md`,
`table1.csv` and `table1.tex`, and where matplotlib is installed the spectra of R (`spectra.png`,
`spectra.svg`). Every stage is resumed where it was killed.
"""

import importlib.util

from experiments.launch import launch
from tda import methods
from tda.reports import spectra, tables
from tda.run import retrieve, stages
from tda.run.workdir import Workdir
from tda.runtime import processes


def main(config, workdir):
    """Runs all stages and writes the table."""
    run(config, Workdir(workdir))


def run(config, workdir: Workdir) -> dict:
    """All stages in order; returns the metrics by method."""
    metrics, notes = stages.trace(config, workdir)
    told = {name: retrieve.describe(note) for name, note in notes.items()}
    chosen = methods.parse(config.methods)
    paper = [n for n in methods.PAPER if n not in chosen]
    titles = ", ".join(methods.METHODS[n].title for n in paper)
    left_out = f"\nRows of the paper's table that are left out here: {titles}.\n" if paper else ""

    def write():
        for name, text in (
            ("table1.md", tables.markdown(chosen, metrics, told) + left_out),
            ("table1.csv", tables.comma_separated(chosen, metrics)),
            ("table1.tex", tables.latex(chosen, metrics)),
        ):
            (workdir / name).write_text(text, encoding="utf-8")

    processes.on_first_process("write the table", write)
    kept = [n for n in notes.values() if n.get("spectra") and "lambda" in n]
    if kept and importlib.util.find_spec("matplotlib"):
        note = next((n for n in (notes.get("trackstar"),) if n in kept), kept[0])

        def draw():
            file = workdir / "retrieval" / note["spectra"]
            return spectra.draw(file, note["component"], workdir / "spectra")

        processes.on_first_process("draw the spectra", draw)
    print(f"table: {workdir.path}/table1.md, table1.csv, table1.tex")
    return metrics


if __name__ == "__main__":
    launch(main)
