"""Table 2 of the paper: any corpus, whose retrieved passages a judge reads.

python -m experiments.table2 --config=configs/open_wiki.py --workdir=DIR
"""

import functools

from . import engine_flags
from .launch import launch
from .table1 import main

if __name__ == "__main__":
    table2 = functools.partial(main, table="table2")
    launch(table2, tells_idle_keys=True, read_engine=engine_flags.read)
