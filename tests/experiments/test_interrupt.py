"""Ctrl-C ends a program with the command that continues it, and without a traceback."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.experiments.test_trace import make_config


def restore_interrupts():
    """Undoes what a shell does to the programs that it starts in the background."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def interrupt(words, directory, file):
    """Starts a program, interrupts it once a file of this name appears; returns its status."""
    program = subprocess.Popen(
        [sys.executable, "-m", *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"XLA_FLAGS": ""},
        preexec_fn=restore_interrupts,
    )
    while program.poll() is None:
        # os.walk passes over what vanishes while it looks.
        names = [n for _, folders, files in os.walk(directory) for n in folders + files]
        if any(name.startswith(file) for name in names):
            program.send_signal(signal.SIGINT)
            break
        time.sleep(0.02)
    try:
        _, errors = program.communicate(timeout=300)
    finally:
        program.kill()
    return program.returncode, errors


def flags_of(config, directory):
    keys = ("data.sentences", "data.facts", "data.pool", "tokenizer.vocab_size", "model.context")
    keys += ("train.epochs", "train.tokens_per_batch", "train.warmup", "train.save_every")
    keys += ("projection.side", "projection.pooling", "projection.blocks")
    keys += ("eval.tail_patch_queries",)
    flat = {k: config[k.split(".")[0]][k.split(".")[1]] for k in keys}
    return [
        "--config=configs/world_facts.py",
        f"--workdir={directory}",
        *(f"--config.{key}={value}" for key, value in flat.items()),
    ]


def check(status, errors, command, directory):
    assert status == 130, errors
    assert "Traceback" not in errors and "Fatal" not in errors
    interrupted, resume = errors.splitlines()[-2:]
    assert interrupted == f"interrupted. Finished work is kept in {directory}; to continue:"
    assert f"{command} --config=configs/world_facts.py --workdir={directory}" in resume


def test_an_interrupted_run_says_how_to_continue(tmp_path):
    flags = flags_of(make_config(tmp_path), tmp_path / "w")
    status, errors = interrupt(["tda", "trace", *flags], tmp_path, "train.json")
    check(status, errors, "-m tda trace", tmp_path / "w")


@pytest.mark.slow
def test_whatever_stage_is_interrupted_the_same_command_finishes_the_run(tmp_path):
    flags = flags_of(make_config(tmp_path), tmp_path / "w")
    for file in ("tokenizer.json", "train.jsonl", "stores", "retrieval", "tail_patch-"):
        if list((tmp_path / "w").rglob(f"{file}*")):
            continue  # on a busy machine the last interrupt came after this stage had begun
        status, errors = interrupt(["experiments.table1", *flags], tmp_path / "w", file)
        check(status, errors, "-m experiments.table1", tmp_path / "w")
    words = [sys.executable, "-m", "experiments.table1", *flags]
    subprocess.run(words, check=True, capture_output=True)


@pytest.mark.slow
def test_an_interrupted_sweep_ends_its_points(tmp_path):
    flags = flags_of(make_config(tmp_path), tmp_path / "w")
    sweep = ["experiments.sweep", *flags, "--sweep=lambda", "--parallel=2"]
    status, errors = interrupt(sweep, tmp_path / "w", "train.json")
    check(status, errors, "-m experiments.sweep", tmp_path / "w")
    time.sleep(1)
    assert not list((tmp_path / "w" / "points").glob("*/point.json"))


@pytest.mark.parametrize(
    ("takes_config", "interrupt"),
    [
        (True, "signal.raise_signal(signal.SIGINT)"),
        # Python drops an exception that is raised in a callback of the garbage collector.
        (False, "gc.callbacks.append(callback); gc.collect(); time.sleep(30)"),
        # asyncio drops one that comes as its last task ends.
        (True, "drop(); time.sleep(30)"),
    ],
)
def test_every_main_ends_in_the_same_way(takes_config, interrupt):
    """Wherever the signal comes: here, as soon as the program begins its own work."""
    start = "launch(main, needs_workdir=False)" if takes_config else "start(main)"
    program = (
        "import gc, signal, time\n"
        "from experiments.launch import launch, start\n"
        "def callback(*arguments):\n"
        "  gc.callbacks.remove(callback)\n"
        "  signal.raise_signal(signal.SIGINT)\n"
        "def drop():\n"
        "  try:\n"
        "    signal.raise_signal(signal.SIGINT)\n"
        "  except KeyboardInterrupt:\n"
        "    pass\n"
        f"def main(*arguments):\n  {interrupt}\n"
        f"{start}\n"
    )
    words = ["-c", program, *["--config=configs/world_facts.py"] * takes_config]
    done = subprocess.run(
        [sys.executable, *words],
        capture_output=True,
        text=True,
        timeout=300,
        preexec_fn=restore_interrupts,
    )
    assert done.returncode == 130 and "Traceback" not in done.stderr
    assert "interrupted. To run it again:" in done.stderr


def test_a_notice_ends_a_program_with_the_command_that_continues_it():
    """Guards: a traceback and status 1 where abandoned work in a thread has silenced the output."""
    program = (
        "import signal, sys\n"
        "from experiments.launch import launch\n"
        "from tda.runtime import preemption, progress\n"
        "def main(*arguments):\n"
        "  print('begun')\n"
        "  sys.stdout = None\n"
        "  signal.raise_signal(signal.SIGTERM)\n"
        "  assert preemption.is_due(3)\n"
        "  progress.bar(9, 'work', 'step').update()\n"
        "  raise AssertionError('the notice is not heeded')\n"
        "launch(main, needs_workdir=False)\n"
    )
    words = [sys.executable, "-c", program, "--config=configs/world_facts.py"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 143 and "Traceback" not in done.stderr
    assert "ended by SIGTERM. To run it again:" in done.stderr and "begun" in done.stdout


def test_the_traceback_of_a_failed_try_goes_once_a_later_one_succeeds(tmp_path):
    program = (
        "import pathlib, sys\n"
        "from experiments.launch import launch\n"
        "def main(config, workdir):\n"
        "  if not (pathlib.Path(workdir) / 'error.txt').exists():\n"
        "    raise ValueError('the first try')\n"
        "def attempt():\n"
        "  try:\n"
        "    launch(main)\n"
        "  except SystemExit as end:\n"
        "    return end.code, sorted(p.name for p in pathlib.Path(sys.argv[2][10:]).iterdir())\n"
        "print(attempt(), attempt())\n"
    )
    for name in ("error-3.txt", "error_bars.txt"):  # of another process, and of the user
        (tmp_path / name).touch()
    flags = ["--config=configs/world_facts.py", f"--workdir={tmp_path}"]
    words = [sys.executable, "-c", program, *flags]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    failed, succeeded = ["error-3.txt", "error.txt", "error_bars.txt"], ["error_bars.txt"]
    assert done.stdout.splitlines() == [f"{(1, failed)} {(None, succeeded)}"], done.stderr
