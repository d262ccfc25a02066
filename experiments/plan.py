"""Estimates in advance what tracing takes: time, disk and memory.

    python -m experiments.plan --config=configs/NAME.py                      # on this machine
    python -m experiments.plan --config=configs/NAME.py --hardware=v5p-256   # or h200x8, v5e-64, …

Without `--hardware` the encoder and the products are timed here for some seconds; with it, the
number of operations is divided by the peak rate of such chips times `--mfu`. The exit status is 1
if something does not fit. Nothing is trained or written to `--workdir`, which only decides the disk
of the stores, and may have the tokens of `data.corpus`. Training, tail-patches and BM25 are not
estimated, nor are methods with several checkpoints, other outputs or curvature: the plan lists
those that it leaves out.
"""

import pathlib
import sys

from absl import flags

from tda.plan import chips, planner, report
from tda.runtime.atomic_file import write_json
from tda.runtime.directories import make_directory

from .launch import launch

HARDWARE = flags.DEFINE_string("hardware", None, "Chips, such as v5p-256; absent: measure here.")
MFU = flags.DEFINE_float("mfu", 0.4, "Share of the peak rate that --hardware reaches.")
READING = flags.DEFINE_float("reading", 1.0, "Rate at which a host reads a store, GB/s.")
TOKENISING = flags.DEFINE_float("tokenising", 0.3, "Rate of a host's CPU, million tokens/s.")
HOST_MEMORY = flags.DEFINE_float("host_memory", None, "Memory of a host, GiB.")
DISK = flags.DEFINE_float("disk", None, "Disk space for the stores, TiB.")
JSON = flags.DEFINE_string("json", None, "File to write all figures to.")


def main(config, workdir):
    """Prints the plan; exits with status 1 if something does not fit."""
    if JSON.value:
        make_directory(pathlib.Path(JSON.value).parent, f"the folder of --json={JSON.value}")
    figures = planner.run(
        config,
        workdir,
        hardware=chips.parse(HARDWARE.value) if HARDWARE.value else None,
        mfu=MFU.value,
        reading=READING.value * 1e9,
        tokenising=TOKENISING.value * 1e6,
        host_memory=None if HOST_MEMORY.value is None else HOST_MEMORY.value * 2**30,
        disk=None if DISK.value is None else DISK.value * 2**40,
    )
    print("\n" + report.text(figures))
    if JSON.value:
        write_json(JSON.value, figures)
    # A status that a script can branch on, after all figures were printed.
    if figures["lacking"]:
        sys.exit("\n".join(["error: this does not fit", *figures["lacking"]]))


if __name__ == "__main__":
    launch(main, needs_workdir=False)
