"""`experiments.view`: what the flags name is shown; what is wrong with them is told."""

import json
import re
import shutil
import signal
import subprocess
import sys
import urllib.request

import pytest

from experiments import ask
from tda import results
from tda.answers import Answer, RankedPassage, TraceResult
from tda.viewer import opening
from tests.viewer.big_file import records


@pytest.fixture
def workdir(tmp_path):
    (tmp_path / "w" / "results").mkdir(parents=True)
    for name in ("bm25", "trackstar", "mine"):
        results.write(tmp_path / "w" / "results" / f"{name}.jsonl", records(3, 2, 30))
    metrics = {name: {"mrr": 0.5} for name in ("mine", "bm25", "trackstar")}
    (tmp_path / "w" / "metrics.json").write_text(json.dumps(metrics))
    return tmp_path / "w"


def test_a_workdirs_results_are_shown_in_the_runs_order(workdir, tmp_path):
    found = opening.collect(str(workdir), [], None, str(tmp_path))
    assert [f.label for f in found.files] == ["mine", "bm25", "trackstar"]  # as in metrics.json
    assert found.notes.path == str(workdir / "notes.jsonl")


def test_results_of_another_evaluation_are_left_out_and_told(workdir, tmp_path, capsys):
    """Mistakes: methods of an earlier evaluation, of other queries, shown beside the new ones."""
    (workdir / "metrics.json").write_text('{"trackstar": {}}')
    found = opening.collect(str(workdir), [], None, str(tmp_path))
    assert [f.label for f in found.files] == ["trackstar"]
    told = capsys.readouterr().out
    assert "from an earlier evaluation" in told and "bm25.jsonl, mine.jsonl" in told
    assert "--results" in told and (workdir / "results" / "bm25.jsonl").exists()
    names = [str(workdir / "results" / f"{n}.jsonl") for n in ("bm25", "trackstar")]
    found = opening.collect(str(workdir), names, None, str(tmp_path))
    assert [f.label for f in found.files] == ["bm25", "trackstar"]
    # One that was killed while it wrote left no metrics: whose the files are, nobody knows.
    (workdir / "metrics.json").write_text("{")
    with pytest.raises(ValueError, match="metrics.json is damaged .* or name files with --results"):
        opening.collect(str(workdir), [], None, str(tmp_path))
    (workdir / "metrics.json").unlink()
    with pytest.raises(ValueError, match="no metrics.json.*run the same command again.*--results"):
        opening.collect(str(workdir), [], None, str(tmp_path))


def test_answers_to_several_questions_stay_and_are_all_shown(tmp_path):
    def answers(prompt):
        passage = RankedPassage("p", 0.5, "text")
        return TraceResult("TrackStar", [Answer("0", prompt, "t", (passage,), ())])

    paths = [ask.save(answers(q), tmp_path) for q in ("one", "two", "one", "three", "two")]
    names = ["results.jsonl", "results-2.jsonl", "results-3.jsonl"]
    assert [p.name for p in paths] == [names[i] for i in (0, 1, 0, 2, 1)]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(names)
    # A tenth question comes after the ninth.
    shutil.copyfile(tmp_path / "results-3.jsonl", tmp_path / "results-10.jsonl")
    (tmp_path / "results-old.jsonl").write_text("another program's")
    found = opening.collect(str(tmp_path), [], None, str(tmp_path))
    assert [f.label for f in found.files] == ["results", "results_2", "results_3", "results_10"]
    assert [f.record(0)["inputs_plaintext"] for f in found.files] == [
        "one",
        "two",
        "three",
        "three",
    ]


@pytest.mark.parametrize("queries", [3, 50])
def test_a_few_queries_stand_for_a_large_file(workdir, tmp_path, queries):
    """Mistakes: other queries of one file than of the next; the first ones, which are alike."""
    for name in ("bm25", "trackstar", "mine"):
        results.write(workdir / "results" / f"{name}.jsonl", records(20, 2, 30))
    found = opening.collect(str(workdir), [], None, str(tmp_path), queries)
    rows = [0, 6, 13] if queries == 3 else range(20)
    for file in found.files:
        assert file.columns["id"] == [f"q{row:05}" for row in rows]


def test_named_files_take_their_place(workdir, tmp_path):
    bm25 = workdir / "results" / "bm25.jsonl"
    found = opening.collect(
        str(workdir), [f"new={bm25}", str(bm25), str(bm25)], None, str(tmp_path)
    )
    assert [f.label for f in found.files] == ["new", "bm25", "bm25_2"]
    assert [f.title for f in found.files] == ["new", "BM25", "BM25"]
    found = opening.collect(None, [str(bm25)], str(tmp_path / "n.jsonl"), str(tmp_path))
    assert found.workdir is None and found.notes.path == str(tmp_path / "n.jsonl")


def test_results_from_an_address(workdir, tmp_path):
    from tests.viewer.test_browser import static_server

    with static_server(workdir / "results") as address:
        url = address.replace("index.html", "mine.jsonl")
        found = opening.collect(None, [url], None, str(tmp_path))
        assert [f.label for f in found.files] == ["mine"] and len(found.files[0]) == 3
        with pytest.raises(OSError, match="cannot fetch .*none.jsonl"):
            opening.collect(None, [url.replace("mine", "none")], None, str(tmp_path))


def test_refusals(workdir, tmp_path):
    for arguments, why in (
        ((None, [], None), "give --workdir=DIR or --results"),
        ((str(tmp_path / "absent"), [], None), "is not a directory"),
        ((str(tmp_path), [], None), "holds no results: finish its run .* ask a"),
    ):
        with pytest.raises(ValueError, match=why):
            opening.collect(*arguments, str(tmp_path))
    with pytest.raises(FileNotFoundError, match="absent.jsonl"):
        opening.collect(None, [str(tmp_path / "absent.jsonl")], None, str(tmp_path))


@pytest.mark.slow
def test_the_program_serves_exports_and_ends(workdir, tmp_path):
    command = [sys.executable, "-m", "experiments.view", f"--workdir={workdir}"]
    served = subprocess.Popen([*command, "--port=0"], stdout=subprocess.PIPE, text=True)
    try:
        lines = [served.stdout.readline() for _ in range(2)]
        address = re.search(r"http://127\.0\.0\.1:\d+/", lines[1])[0]
        index = json.load(urllib.request.urlopen(f"{address}data/index.json"))
        assert len(index["files"]) == 3 and not index["live"]
    finally:
        served.send_signal(signal.SIGINT)
    assert served.wait(20) in (0, -signal.SIGINT)
    subprocess.run([*command, f"--export={tmp_path / 'out'}"], check=True, capture_output=True)
    assert (tmp_path / "out" / "index.html").exists()
    again = subprocess.run(
        [*command, f"--export={workdir}"], capture_output=True, text=True, check=False
    )
    assert again.returncode == 1 and "holds other files" in again.stderr
    corpus = tmp_path / "corpus.jsonl"
    lines = [{"id": f"c4-0-{d}", "text": "a", "source": "web"} for d in range(3000)]
    corpus.write_text("".join(json.dumps(line) + "\n" for line in lines))
    by = [*command, "--by=source"]
    grouped = [*by, f"--metadata={corpus}", f"--export={tmp_path / 'grouped'}"]
    subprocess.run(grouped, check=True, capture_output=True)
    assert '"label":"web","size":6' in (tmp_path / "grouped" / "data" / "0" / "by-0.js").read_text()
    alone = subprocess.run(by, capture_output=True, text=True, check=False, timeout=60)
    assert alone.returncode == 1 and "--metadata; give both" in alone.stderr
    # Without notes there is nothing to compare; served, the results would seem to be the answer.
    alone = [*command[:3], f"--results={workdir}/results/bm25.jsonl", "--agreement"]
    compared = subprocess.run(alone, capture_output=True, text=True, check=False, timeout=60)
    assert compared.returncode == 1 and "give --notes=FILE" in compared.stderr
