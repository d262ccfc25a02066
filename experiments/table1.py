"""Table 1 of the paper on one corpus, with intervals, as Markdown, CSV and LaTeX.

    python -m experiments.table1 --config=configs/trex_table1.py --workdir=DIR

Does what `experiments.trace` does, with the config's methods, and writes `table1.md`, `table1.csv`
and `table1.tex`, and with matplotlib the spectra of R (`spectra.png`, `spectra.svg`). A killed run
continues where it stopped. Many machines share the work as in `experiments.trace`: docs/pods.md.
"""

from tda.run import paper_table
from tda.run.workdir import Workdir

from . import engine_flags
from .launch import launch


def main(config, workdir, table="table1"):
    """Runs all stages and writes the table."""
    directory = Workdir(workdir)
    paper_table.run(config, directory, engine_flags.choose(config, directory), table)


if __name__ == "__main__":
    launch(main, tells_idle_keys=True, read_engine=engine_flags.read)
