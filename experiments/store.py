"""Inspects a gradient store, verifies its files, and withdraws passages from it.

    python -m experiments.store info DIR       contents and progress
    python -m experiments.store verify DIR     reads every file; removes damaged shards
    python -m experiments.store withdraw DIR --ids=a,b --documents=c

The next run of the command that made the store encodes the removed shards again, and no others.
Withdrawn passages are never retrieved and take no part in R.
"""

import sys

from absl import flags

from tda.runtime.command import of_main
from tda.store import inspection

from .launch import start

_REPORT = flags.DEFINE_bool("report_only", False, "verify: remove nothing.")
_IDS = flags.DEFINE_list("ids", [], "withdraw: ids of passages.")
_DOCUMENTS = flags.DEFINE_list("documents", [], "withdraw: documents, with all their passages.")


def main(arguments):
    """Runs a command on a store."""
    commands = {
        "info": inspection.info,
        "verify": lambda path: inspection.verify(path, _REPORT.value),
        "withdraw": lambda path: inspection.withdraw(path, _IDS.value, _DOCUMENTS.value),
    }
    if len(arguments) != 2 or arguments[0] not in commands:
        sys.exit(f"usage: {of_main('store')} {'|'.join(commands)} DIR")
    command, path = arguments
    if _REPORT.value and command != "verify":
        sys.exit(f"error: --report_only has no effect on {command}; leave it out")
    if (_IDS.value or _DOCUMENTS.value) and command != "withdraw":
        sys.exit(f"error: --ids and --documents have no effect on {command}; leave them out")
    sys.exit(commands[command](path))


if __name__ == "__main__":
    start(main, takes_arguments=True)
