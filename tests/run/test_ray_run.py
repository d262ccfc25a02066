"""A whole run by workers of a local Ray cluster, each killed once: what one process writes."""

import os
import subprocess
import sys

import pytest

from tests.run.test_array_run import contents
from tests.run.test_many_processes import FLAGS, keys, plain_keys

# Small groups. Of every work one worker is killed at its first group.
PROGRAM = """
import os, pathlib, signal, sys
from tda.retrieval.scann import settings
from tda.run import engines, ray_worker, run
from tda.runtime import groups

FOLDER = pathlib.Path(sys.argv[1])

def make_groups_small(run, groups, settings):
    run._GROUP_SHARDS, groups._ROWS_PER_RESULT, settings._EXACT_NUMBERS = 2, 0, 0

make_groups_small(run, groups, settings)

class Dying(ray_worker.Worker):
    def __init__(self, opening):
        make_groups_small(run, groups, settings)
        super().__init__(opening)

    def compute(self, work, number):
        stage = work.partition("-")[0]
        if work.startswith(("tokens", "index")):
            stage = work[: len("index")]
        try:
            (FOLDER / stage).touch(exist_ok=False)
        except FileExistsError:
            return super().compute(work, number)
        os.kill(os.getpid(), signal.SIGKILL)

engines.ray_worker.Worker = Dying
import experiments.trace
from experiments.launch import launch
sys.argv[1:] = sys.argv[2:]
launch(experiments.trace.main, read_engine=experiments.engine_flags.read)
"""


@pytest.mark.slow
@pytest.mark.parametrize("has_labels", [True, False])
def test_workers_of_ray_are_killed_in_every_stage_and_the_run_ends(tmp_path, has_labels):
    pytest.importorskip("ray")
    stages = {"encode queries", "encode corpus", "R", "search", "tail"}
    if has_labels:
        methods = "trackstar,exp2,rerank_cos,hidden_last,bm25"
        arguments = keys(tmp_path, methods=methods, **{"eval.samples": 0})
        stages |= {"hidden", "second"}
    else:
        index = {"search.index": "scann", "search.scann.part_rows": 4}
        arguments = plain_keys(tmp_path, methods="trackstar", **index, **{"eval.samples": 0})
        stages |= {"token", "index", "scann"}
    killed = tmp_path / "killed"
    killed.mkdir()
    flags = " ".join(["--xla_force_host_platform_device_count=1", *FLAGS])
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": os.getcwd()}
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    command = [sys.executable, script, killed, "--config=configs/world_facts.py", *arguments]
    for name, more in {
        "one": [],
        "ray": ["--engine=ray", "--workers=2", "--worker_resources=CPU=0.5"],
    }.items():
        done = subprocess.run(
            [*command, f"--workdir={tmp_path / name}", *more],
            env=env,
            capture_output=True,
            text=True,
            timeout=1500,
        )
        assert done.returncode == 0, done.stderr[-3000:]
    assert {path.name for path in killed.iterdir()} == stages
    assert contents(tmp_path / "ray") == contents(tmp_path / "one")
