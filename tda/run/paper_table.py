"""Table 1 of the paper on one corpus: all stages, and the table in three formats."""

import importlib.util

from tda import methods
from tda.reports import spectra, tables
from tda.run import retrieve, stages
from tda.run.workdir import Workdir
from tda.runtime import processes
from tda.runtime.engine import PROCESSES, Engine


def run(config, workdir: Workdir, engine: Engine = PROCESSES) -> dict:
    """Runs all stages in order; returns the metrics by method."""
    metrics, notes = stages.trace(config, workdir, engine)
    # Each task of an array that comes to the end writes the same.
    with engine.alone():
        processes.on_first_process(
            "write the table", lambda: _write_table(config, metrics, notes, workdir)
        )
        # Plots are an extra; a table without them is complete.
        if importlib.util.find_spec("matplotlib"):
            processes.on_first_process("draw the spectra", lambda: _draw_spectra(notes, workdir))
    print(f"table: {workdir.path}/table1.md, table1.csv, table1.tex")
    return metrics


def _write_table(config, metrics: dict, notes: dict, workdir: Workdir) -> None:
    remarks = {name: retrieve.describe(note) for name, note in notes.items()}
    chosen = methods.parse(config.methods)
    titles = ", ".join(methods.METHODS[n].title for n in methods.PAPER if n not in chosen)
    missing = f"\nRows of the paper's table that are left out here: {titles}.\n" if titles else ""
    for name, text in (
        ("table1.md", tables.markdown(chosen, metrics, remarks) + missing),
        ("table1.csv", tables.comma_separated(chosen, metrics)),
        ("table1.tex", tables.latex(chosen, metrics)),
    ):
        (workdir / name).write_text(text, encoding="utf-8")


def _draw_spectra(notes: dict, workdir: Workdir) -> None:
    """Draws the spectra of TrackStar's R, or of the first method's that mixes R."""
    mixed = [n for n in notes.values() if n.get("spectra") and "lambda" in n]
    if mixed:
        note = notes["trackstar"] if notes.get("trackstar") in mixed else mixed[0]
        file = workdir / "retrieval" / note["spectra"]
        spectra.draw(file, note["component"], workdir / "spectra")
