"""The file of kept results: torn lines, several writers, and what is not such a file."""

import multiprocessing
import threading

import filelock
import pytest

from tda.run.result_log import ResultLog


def test_round_trip_and_a_torn_line(tmp_path):
    kept = ResultLog(tmp_path / "k.jsonl")
    assert kept.read() == {}
    kept.add([("a", 1), ("b", [0.1, 2.0])])
    kept.add([("é", {"x": None}), ("a", 3)])
    assert ResultLog(tmp_path / "k.jsonl").read() == {"a": 3, "b": [0.1, 2.0], "é": {"x": None}}
    whole = kept.path.read_bytes()
    for cut in range(1, 25):
        kept.path.write_bytes(whole[:-cut])
        assert kept.read() == {"a": 1, "b": [0.1, 2.0], "é": {"x": None}}
        assert kept.path.read_bytes() == whole[: whole.rindex(b"\n", 0, -1) + 1]
    kept.add([("c", 4)])
    assert kept.read()["c"] == 4


@pytest.mark.parametrize("line", [b"{}\n", b"[]\n", b"7\n", b"not JSON\n", b"\xff\n"])
def test_another_file_is_refused(tmp_path, line):
    kept = ResultLog(tmp_path / "k.jsonl")
    kept.add([("a", 1)])
    with open(kept.path, "ab") as out:
        out.write(line)
    with pytest.raises(ValueError, match="k.jsonl, line 2: not a saved result"):
        kept.read()


@pytest.mark.parametrize("work", [lambda k: k.read(), lambda k: k.add([("b", 2)])])
def test_one_waits_for_another(tmp_path, work):
    kept = ResultLog(tmp_path / "k.jsonl")
    kept.add([("a", 1)])
    other = threading.Thread(target=work, args=(kept,), daemon=True)
    with filelock.FileLock(tmp_path / ".k.jsonl.lock"):
        other.start()
        other.join(0.3)
        assert other.is_alive() and kept.path.read_bytes().count(b"\n") == 1
    other.join(60)
    assert not other.is_alive()


def _write(path, who):
    kept = ResultLog(path)
    for i in range(20):
        # Long enough to be written in many pieces.
        kept.add([(f"{who} {i} {j}", "x" * 4000) for j in range(50)])
        kept.read()


def test_several_writers_tear_nothing(tmp_path):
    path = tmp_path / "k.jsonl"
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_write, args=(path, who)) for who in range(3)]
    for w in writers:
        w.start()
    for w in writers:
        w.join()
    assert [w.exitcode for w in writers] == [0, 0, 0]
    assert set(ResultLog(path).read()) == {
        f"{w} {i} {j}" for w in range(3) for i in range(20) for j in range(50)
    }
