"""What tracing costs, before it is begun: time, disk and memory.

    python -m experiments.plan --config=configs/NAME.py                      # on this machine
    python -m experiments.plan --config=configs/NAME.py --hardware=v5p-256   # or h200x8, v5e-64, …

Without `--hardware` the encoder and the products are timed here for some seconds; with it, the
count of operations is divided by what such chips do at most, times `--mfu`. The exit status is 1
where something does not fit. Nothing is trained, and nothing is put into `--workdir`: it only says
on which disk the stores will be. Training, tail-patches and BM25 are not reckoned, nor methods of
several checkpoints, other output functions or curvature: their titles are told.
"""

import sys

from absl import flags

from experiments.launch import launch
from tda.plan import chips, planner, report
from tda.runtime.atomic_file import write_json

HARDWARE = flags.DEFINE_string("hardware", None, "What it is to run on; measured here if absent.")
MFU = flags.DEFINE_float("mfu", 0.4, "Share of a chip's peak that --hardware is taken to reach.")
READING = flags.DEFINE_float("reading", 1.0, "GB/s at which a store is read.")
HOST_MEMORY = flags.DEFINE_float("host_memory", None, "GiB of the host that takes R.")
DISK = flags.DEFINE_float("disk", None, "TiB that the stores may take.")
JSON = flags.DEFINE_string("json", None, "File that all figures are written to.")


def main(config, workdir):
    """Prints the plan; ends with status 1 where something does not fit."""
    figures = planner.run(
        config,
        workdir,
        hardware=chips.parse(HARDWARE.value) if HARDWARE.value else None,
        mfu=MFU.value,
        reading=READING.value * 1e9,
        host_memory=None if HOST_MEMORY.value is None else HOST_MEMORY.value * 2**30,
        disk=None if DISK.value is None else DISK.value * 2**40,
    )
    print("\n" + report.text(figures))
    if JSON.value:
        write_json(JSON.value, figures)
    if figures["lacking"]:
        sys.exit("\n".join(["error: this does not fit", *figures["lacking"]]))


if __name__ == "__main__":
    launch(main, needs_workdir=False)
