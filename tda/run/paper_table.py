"""Tables 1 and 2 of the paper on one corpus: all stages, and the table in three formats."""

from tda import methods
from tda.reports import plots, spectra, tables
from tda.run import retrieve, stages
from tda.run.workdir import Workdir
from tda.runtime import processes
from tda.runtime.engine import PROCESSES, Engine

# The rows of the paper's tables, by the file that they are written to.
_ROWS = {"table1": methods.PAPER, "table2": methods.PAPER_OPEN}


def run(config, workdir: Workdir, engine: Engine = PROCESSES, table: str = "table1") -> dict:
    """Runs all stages in order; returns the metrics by method.

    Args:
        config, workdir, engine: as for `stages.trace`.
        table: "table1"; or "table2", whose corpus may have no labels and whose proponents a judge
            reads.

    Raises:
        ValueError: table 2 has no judge, or as for `stages.trace`.
    """
    if table == "table2" and not config.judge.name:
        raise ValueError(
            "in table 2 a judge says which passages are correct, and judge.name is empty; use "
            "--config.judge.name=lexical, or nli with --config.judge.model"
        )
    metrics, notes = stages.trace(config, workdir, engine)
    # Every task of an array that reaches the end writes the same files.
    with engine.alone():
        processes.on_first_process(
            "write the table", lambda: _write_table(config, metrics, notes, workdir, table)
        )
        # Plots are an extra; a table without them is complete.
        if plots.is_installed():
            processes.on_first_process("draw the spectra", lambda: _draw_spectra(notes, workdir))
    print(f"table: {workdir.path}/{table}.md, {table}.csv, {table}.tex")
    return metrics


def _write_table(config, metrics: dict, notes: dict, workdir: Workdir, table: str) -> None:
    remarks = {name: retrieve.describe(note) for name, note in notes.items()}
    chosen = methods.parse(config.methods)
    titles = ", ".join(methods.METHODS[n].title for n in _ROWS[table] if n not in chosen)
    missing = f"\nRows of the paper's table that are left out here: {titles}.\n" if titles else ""
    parts = [tables.markdown(chosen, metrics, remarks) + missing]
    if table == "table2":
        parts += tables.differences(metrics)
    for suffix, text in (
        ("md", "\n\n".join(filter(None, parts))),
        ("csv", tables.comma_separated(chosen, metrics)),
        ("tex", tables.latex(chosen, metrics)),
    ):
        (workdir / f"{table}.{suffix}").write_text(text, encoding="utf-8")


def _draw_spectra(notes: dict, workdir: Workdir) -> None:
    """Draws the spectra of TrackStar's R, or of the first method's that mixes R."""
    mixed = [n for n in notes.values() if n.get("spectra") and "lambda" in n]
    if mixed:
        note = notes["trackstar"] if notes.get("trackstar") in mixed else mixed[0]
        file = workdir / "retrieval" / note["spectra"]
        spectra.draw(file, note["component"], workdir / "spectra")
