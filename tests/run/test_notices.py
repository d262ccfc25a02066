"""SIGTERM to one of several joined processes, in every stage, and other numbers of processes."""

import shutil

import pytest

from tests.run.test_array_run import KEPT, contents
from tests.run.test_many_processes import join, keys, run_alone

# Small groups. A process gets a notice at its first group, shard or part of a stage, and takes its
# time, so that the others must not wait for its result.
PROGRAM = """
import os, signal, time
import jax
from experiments.trace import launch, main
from tda.encoding import table
from tda.gradients import second_stage
from tda.retrieval.scann import index, settings
from tda.run import measures, run
from tda.runtime import groups

run._GROUP_SHARDS, groups._ROWS_PER_RESULT, measures._PAIRS_PER_GROUP = 2, 0, 4
settings._EXACT_NUMBERS, second_stage._PASSAGES_PER_GROUP = 0, 3
is_noticed = False

def wait_for_notice(stage, name):
    global is_noticed
    if name.startswith(stage) and jax.process_index() == NOTICED and not is_noticed:
        is_noticed = True
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)

def noticed(function, name_of):
    def call(*arguments):
        wait_for_notice("STAGE", name_of(*arguments))
        return function(*arguments)
    return call

groups._write = noticed(groups._write, lambda folder, *_: folder.name)
table.encode_kinds = noticed(table.encode_kinds, lambda *_: "encode")
index.write_part = noticed(index.write_part, lambda *_: "index")
launch(main)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("methods", "search", "stages"),
    [
        (
            "trackstar,rerank_cos",
            {"eval.samples": 0},
            [(4, "encode"), (2, "R"), (3, "search"), (4, "second"), (2, "tail"), (3, "none")],
        ),
        (
            "trackstar_train",
            {"search.index": "scann", "search.scann.part_rows": 4, "eval.tail_patch_queries": 0},
            [(3, "index"), (2, "scann"), (4, "none")],
        ),
    ],
    ids=["exact", "index"],
)
def test_a_notice_in_every_stage_costs_a_group_on_any_number(tmp_path, methods, search, stages):
    # Shards of few rows, so that every process has a group of every stage.
    arguments = keys(tmp_path, methods=methods, **{"store.shard_bytes": 128}, **search)
    one, many = tmp_path / "one", tmp_path / "many"
    run_alone([*arguments, f"--workdir={one}"], devices=1, program=PROGRAM)
    # The same model: joined processes would train another, in its last bits.
    shutil.copytree(one, many, ignore=lambda _, names: {*KEPT, "groups", "indices"} & {*names})
    for log in many.glob("*.jsonl"):
        log.unlink()
    for count, stage in stages:
        # Once it is process 0, which reduces and hosts the coordinator.
        noticed = int(stage != "tail")
        program = PROGRAM.replace("STAGE", stage).replace("NOTICED", str(noticed))
        ended = join([*arguments, f"--workdir={many}"], program=program, count=count, devices=1)
        status = 0 if stage == "none" else 143
        told = [f"{stage}: {errors[-2000:]}" for _, _, errors in ended]
        assert [code for code, _, _ in ended] == [status] * count, "\n".join(told)
        if status:
            assert f"ended by SIGTERM. Finished work is kept in {many}" in ended[0][2]
            if stage in ("R", "search", "second", "tail"):
                kept = {path.name.partition("-")[0] for path in (many / "groups").iterdir()}
                assert stage in kept
    assert contents(many) == contents(one)
