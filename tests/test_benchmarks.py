"""What benchmarks keep: every finished case, through kills and with the best batch."""

import json
import math
import pathlib
import re
import subprocess
import sys

import pytest

from benchmarks import record
from benchmarks.case_record import Case, Record

ROOT = pathlib.Path(record.__file__).parents[1]
CASES = [Case("train", "1b"), Case("encode", "1b", 16, "none"), Case("search", queries=8)]


def test_the_best_batch_is_the_one_before_the_rate_falls():
    rates = {8: 10.0, 16: 20.0, 32: 19.0, 64: 12.0, 128: 99.0}
    tried = record.best_batch(rates.__getitem__, list(rates))
    assert list(tried) == [8, 16, 32, 64] and max(tried, key=tried.get) == 16


@pytest.mark.parametrize(("most", "tried"), [(16, [8, 16]), (2, [2]), (0, [])])
def test_batches_end_where_memory_does(most, tried):
    def rate_of(batch):
        if batch > most:
            raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate")
        return float(batch)

    assert list(record.best_batch(rate_of, [8, 16, 32])) == tried


def test_other_errors_are_no_end_of_memory():
    def rate_of(batch):
        raise RuntimeError("a batch of the wrong shape")

    with pytest.raises(RuntimeError, match="wrong shape"):
        record.best_batch(rate_of, [8])


def test_a_record_goes_on_and_is_about_one_machine(tmp_path):
    path, about = tmp_path / "record.jsonl", {"device": "A", "jax": "1"}
    lines = Record(path, about)
    lines.add(CASES[0], {"tokens a second": 300.0, "batch": 8, "share of the peak": 0.25})
    lines.add(CASES[1], {"tokens a second": 600.0, "batch": 16})
    lines = Record(path, about)
    assert set(lines.figures) == {"train, 1b", "encode, 1b, none, side 16"}
    lines.add(CASES[2], {"failed": "out of memory"})
    rows = lines.markdown(CASES).splitlines()
    assert rows[2] == "| train, 1b | 300 tokens/s | 8 |  | 25% |"
    assert rows[3] == "| encode, 1b, none, side 16 | 600 tokens/s | 16 | 0.50 |  |"
    assert rows[4] == "| search, queries 8 | out of memory |  |  |  |"
    with pytest.raises(ValueError, match="is about .*'A'.*, and this is .*'B'.*; give another"):
        Record(path, {"device": "B", "jax": "1"})


def test_no_two_flags_of_a_benchmark_have_one_name():
    """Mistake: a flag that a benchmark defines, and another that imports it: neither starts."""
    sources = {p.stem: p.read_text() for p in (ROOT / "benchmarks").glob("*.py")}

    def modules_of(name, found):
        if name not in found:
            found[name] = None
            for names in re.findall(r"^from benchmarks import (.*)$", sources[name], re.MULTILINE):
                for imported in names.split(","):
                    modules_of(imported.split(" as ")[0].strip(), found)
            for imported in re.findall(
                r"^from benchmarks\.(\w+) import", sources[name], re.MULTILINE
            ):
                modules_of(imported, found)
        return list(found)

    assert {"encoder", "vs_bergson", "record"} <= set(modules_of("accelerator", {}))
    for name in sources:
        texts = [sources[m] for m in modules_of(name, {})]
        defined = [f for t in texts for f in re.findall(r"flags\.DEFINE_\w+\(\s*\"(\w+)\"", t)]
        assert len(defined) == len(set(defined)), f"{name}: {sorted(defined)}"


@pytest.mark.slow
def test_the_accelerator_benchmark_measures_every_case_once(tmp_path):
    """On this machine's CPU, with a tiny model."""

    def run(parts):
        flags = "--shapes=micro --sides=4 --corrections=none --sequences=2 --length=8 --batches=2"
        flags += f" --vocabulary=16 --search_mib=1 --search_width=64 --pairs=2 --rounds=1 {parts}"
        command = [sys.executable, "-m", "benchmarks.accelerator", f"--out={tmp_path}"]
        run = [*command, *flags.split()]
        return subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=True).stdout

    assert "[1/1] train, micro" in run("--parts=train")
    before = (tmp_path / "record.jsonl").read_text()
    out = run("--parts=train,capture,encode,tail_patch,search")
    assert "[1/7]" not in out and "[7/7] search, queries 1024" in out
    text = (tmp_path / "record.jsonl").read_text()
    assert text.startswith(before)
    rates = {
        "train": "tokens",
        "capture": "tokens",
        "encode": "tokens",
        "tail_patch": "pairs",
        "search": "rows",
    }
    entries = [json.loads(line) for line in text.splitlines()]
    assert len(entries) == 7
    for entry in entries:
        value = entry["figures"][f"{rates[entry['case'].split(',')[0]]} a second"]
        assert math.isfinite(value) and value > 0
        assert entry["case"] in (tmp_path / "table.md").read_text()
