"""Files that appear whole or not at all."""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from tda.gradients.moments import kept_scales
from tda.gradients.moments.scales import Scale
from tda.runtime import atomic_file

ENVIRONMENT = os.environ | {"PYTHONPATH": os.getcwd()}


def test_the_file_appears_at_the_end(tmp_path):
    path = tmp_path / "a.txt"
    with atomic_file.open_atomic(path) as out:
        out.write("é")
        assert not path.exists()
    assert path.read_bytes() == "é".encode()
    with atomic_file.open_atomic(path, "wb") as out:
        out.write(b"\x00")
        assert path.read_bytes() == "é".encode()
    assert path.read_bytes() == b"\x00"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_an_error_leaves_what_was_there(tmp_path):
    """Guards: half a file in the place of a good one."""
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_file.open_atomic(path) as out:
        out.write("new")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("left", [0, 0.5])
def test_a_file_that_was_cut_off_is_named(tmp_path, left):
    """Mistake: the error of a library, which says neither the file nor what to do."""
    made_from, scale = {"seed": 0}, Scale(left=np.ones((1, 3)), right=np.ones((1, 2)))
    for name, write, read in (
        ("a.json", lambda p: atomic_file.write_json(p, made_from), atomic_file.read_json),
        (
            "b.npz",
            lambda p: atomic_file.write_arrays(p, {"x": np.ones(9)}),
            atomic_file.read_arrays,
        ),
        (
            "c.safetensors",
            lambda p: kept_scales.save(p, {"w": scale}, made_from),
            lambda p: kept_scales.load(p, made_from),
        ),
    ):
        write(tmp_path / name)
        read(tmp_path / name)
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[: int(left * len(content))])
        with pytest.raises(atomic_file.DamagedError, match=f"{name} is damaged .*; remove it"):
            read(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        atomic_file.read_json(tmp_path / "absent.json")


def test_two_writers_of_one_path_both_write_whole_files(tmp_path):
    """Guards: one part for both, which the second empties while the first writes on."""
    path = tmp_path / "a.txt"
    with atomic_file.open_atomic(path) as first:
        first.write("first ")
        first.flush()
        with atomic_file.open_atomic(path) as second:
            second.write("second")
        assert path.read_text() == "second"
        first.write("writer")
    assert path.read_text() == "first writer"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_of_two_writers_of_a_directory_the_first_to_end_stays(tmp_path):
    path = tmp_path / "index"
    with atomic_file.replacing(path, is_directory=True) as first:
        (first / "rows").write_text("same")
        with atomic_file.replacing(path, is_directory=True) as second:
            (second / "rows").write_text("same")
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")] == ["index", "index/rows"]


KILLED = """
import os, pathlib, signal, sys
from tda.runtime import atomic_file
path = pathlib.Path(sys.argv[1])
with (
    atomic_file.open_atomic(path / "a.txt") as out,
    atomic_file.replacing(path / "b", is_directory=True) as part,
):
    (part / "c").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_parts_of_killed_writers_are_removed_and_those_of_living_ones_stay(tmp_path):
    killed = subprocess.run([sys.executable, "-c", KILLED, tmp_path], env=ENVIRONMENT)
    assert killed.returncode == -signal.SIGKILL
    left = {p.name for p in tmp_path.iterdir()}
    assert len(left) == 2 and all(n.endswith(".part") for n in left)
    elsewhere = tmp_path / "a.txt.other-host.0123456789ab.part"  # its lock may not be seen here
    old = tmp_path / "a.txt.other-host.ba9876543210.part"
    for part in (elsewhere, old, tmp_path / "notes.part"):
        part.write_text("half")
    os.utime(old, (0, 0))
    with atomic_file.open_atomic(tmp_path / "a.txt") as first:
        atomic_file._remove_leftovers.cache_clear()  # as in another process
        with atomic_file.open_atomic(tmp_path / "a.txt") as second:
            second.write("second")
        first.write("first")
    assert (tmp_path / "a.txt").read_text() == "first"
    names = {p.name for p in tmp_path.iterdir()}
    assert names == {"a.txt", elsewhere.name, "notes.part"}
