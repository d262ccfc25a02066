"""The approximate index against a direct computation; kills, refusals, and the rule of sizes."""

import dataclasses
import json
import os
import pathlib
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from tda.retrieval.ranked import Ranked
from tda.retrieval.scann import build, part

pytest.importorskip("scann", reason="ScaNN is not installed: pip install 'tda[scann]'")

MADE = {"encodings": "of a test", "widths": (32, 32)}
FLAT = build.Settings(part_rows=1000, dims_per_block=2, reorder=100, training_rows=1000)
TREE = build.Settings(
    part_rows=1000,
    dims_per_block=2,
    reorder=100,
    reorder_dtype="float32",
    leaves=20,
    leaves_to_search=16,
    training_rows=1000,
)


def clustered(rows, width=64, clusters=50, seed=0):
    """Rows of unit norm around random centres, and queries near some of them."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(clusters, width))
    x = centres[rng.integers(0, clusters, rows + 40)] + 0.7 * rng.normal(size=(rows + 40, width))
    x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
    return x[:rows], x[rows:]


def exact(queries, x, k=10, without=()):
    """Brute force over the rows that are neither infinite nor withdrawn."""
    usable = np.isfinite(x[:, 0])
    usable[list(without)] = False
    rows = np.flatnonzero(usable)
    scores = queries.astype(np.float64) @ x[rows].T.astype(np.float64)
    best, worst = (np.argsort(s, axis=1, kind="stable")[:, :k] for s in (-scores, scores))
    return Ranked(
        rows[best],
        np.take_along_axis(scores, best, 1),
        rows[worst],
        np.take_along_axis(scores, worst, 1),
        {},
    )


def make(path, x, settings=FLAT, fingerprint=MADE, check=None):
    return build.build(path, x.__getitem__, x.shape, settings, fingerprint, check)


@pytest.fixture(scope="module")
def corpus():
    return clustered(2500)


@pytest.fixture(scope="module")
def flat(corpus, tmp_path_factory):
    """An index of three parts."""
    return make(tmp_path_factory.mktemp("flat") / "index", corpus[0])


@pytest.fixture(scope="module")
def tree(corpus, tmp_path_factory):
    return make(tmp_path_factory.mktemp("tree") / "index", corpus[0], TREE)


def assert_equal(found, wanted, atol=1e-6):
    np.testing.assert_array_equal(found.proponents, wanted.proponents)
    np.testing.assert_array_equal(found.opponents, wanted.opponents)
    np.testing.assert_allclose(found.proponent_scores, wanted.proponent_scores, atol=atol)
    np.testing.assert_allclose(found.opponent_scores, wanted.opponent_scores, atol=atol)


@pytest.mark.parametrize("settings", [FLAT, TREE], ids=["flat", "tree"])
def test_recall_against_exact_search(tmp_path, settings, capsys):
    x, queries = clustered(5000)
    index = make(tmp_path / "i", x, settings, check=lambda: (queries, exact(queries, x)))
    assert index.recall["k"] == 10 and index.recall["queries"] == 40
    assert index.recall["proponents"] >= 0.95
    assert index.recall["opponents"] >= 0.95
    # It is what a search finds, it is printed, and whoever opens the index sees it.
    found, wanted = index.search(queries), exact(queries, x)
    pairs = zip(found.proponents, wanted.proponents, strict=True)
    shared = np.mean([len(set(a) & set(b)) / 10 for a, b in pairs])
    assert index.recall["proponents"] == pytest.approx(shared)
    assert f"proponents {index.recall['proponents']:.3f}" in capsys.readouterr().out
    assert build.Index.open(tmp_path / "i").recall == index.recall


def test_recall_counts_what_is_missed(flat, corpus):
    """Mistakes: the score's sign ignored by recall; proponents and opponents swapped."""
    wanted = exact(corpus[1], corpus[0])
    far = (wanted.proponents + 1) % 2500
    assert build.recall(flat, corpus[1], wanted)["proponents"] >= 0.95
    moved = Ranked(far, wanted.proponent_scores, wanted.opponents, wanted.opponent_scores, {})
    assert build.recall(flat, corpus[1], moved)["proponents"] < 0.2
    assert build.recall(flat, corpus[1], moved)["opponents"] >= 0.95
    swapped = Ranked(wanted.opponents, None, wanted.proponents, None, {})
    found = build.recall(flat, corpus[1], swapped)
    assert found["proponents"] == found["opponents"] == 0
    assert build.recall(flat, corpus[1], wanted, k=3)["k"] == 3


def test_parts_searched_throughout_equal_brute_force(tree, corpus):
    x, queries = corpus
    for k in (1, 10, 400):
        found = tree.search(queries, k, leaves_to_search=20, reorder=1000)
        assert_equal(found, exact(queries, x, k))
    assert found.first_ranks == {}
    assert found.proponents.dtype == np.int64 and found.proponent_scores.dtype == np.float32


def test_equal_scores_come_in_the_order_of_rows(tmp_path):
    x, queries = clustered(3000)
    x[2000:] = x[:1000]
    settings = build.Settings(part_rows=1000, dims_per_block=0)
    found = make(tmp_path / "i", x, settings).search(queries, 20)
    assert_equal(found, exact(queries, x, 20))
    equal = found.proponent_scores[:, :-1] == found.proponent_scores[:, 1:]
    assert equal.mean() > 0.1
    assert (np.diff(found.proponents, axis=1)[equal] > 0).all()


@pytest.mark.parametrize(
    "changes",
    [
        dict(reorder_dtype="float32"),
        dict(reorder_dtype="int8"),
        dict(reorder=0),
        dict(threshold=0),
        dict(dims_per_block=3),
        dict(dims_per_block=0),
        dict(leaves=10, leaves_to_search=10, residual=True),
        dict(leaves=10, leaves_to_search=5, soar=1.5),
        dict(leaves=10, leaves_to_search=8, dims_per_block=0),
    ],
    ids=str,
)
def test_every_setting_finds_proponents_and_opponents(tmp_path, changes):
    x, queries = clustered(1500)
    settings = build.Settings(
        **(dict(part_rows=800, dims_per_block=2, training_rows=800) | changes)
    )
    index = make(tmp_path / "i", x, settings)
    wanted = exact(queries, x)
    found = build.recall(build.Index.open(tmp_path / "i"), queries, wanted)
    least = 0.6 if settings.reorder == 0 else 0.9
    assert min(found["proponents"], found["opponents"]) >= least, found
    # Beside the rows themselves there are their numbers, codebooks and centres.
    size = sum(len(data) for data in contents(tmp_path / "i").values())
    assert 0 <= size - 1500 * settings.row_bytes(64) < 1500 * 8 + 2 * 20_000
    # Scores are inner products, whatever representation they are of.
    ranked = index.search(queries)
    of_rows = np.einsum("qe,qke->qk", queries, x[ranked.opponents])
    atol = 0.2 if settings.reorder == 0 else 0.01
    np.testing.assert_allclose(ranked.opponent_scores, of_rows, atol=atol)
    assert np.all(np.diff(ranked.proponent_scores) <= 0)
    assert np.all(np.diff(ranked.opponent_scores) >= 0)


def test_invalid_rows_are_never_returned(tmp_path):
    """A part with a few valid rows, one with none, and all rows asked for."""
    x, queries = clustered(2500)
    x[::7] = np.inf
    x[840:1600] = np.inf
    x[1600:] = np.inf
    x[2400] = queries[0]
    index = make(tmp_path / "i", x)
    valid = int(np.isfinite(x[:, 0]).sum())
    assert index.valid_rows == valid
    found = index.search(queries, 2500)
    assert found.proponents.shape == found.opponents.shape == (40, valid)
    assert np.isfinite(x[found.proponents, 0]).all() and np.isfinite(x[found.opponents, 0]).all()
    for rows in (found.proponents, found.opponents):
        assert all(len(set(r)) == valid for r in rows)
    assert found.proponents[0, 0] == 2400


def test_withdrawn_rows_are_never_returned(tree, corpus):
    x, queries = corpus
    wanted = exact(queries, x, 30)
    gone = np.unique(np.concatenate([wanted.proponents[:, :25], wanted.opponents[:, :25]], None))
    found = tree.search(queries, 10, gone, leaves_to_search=20, reorder=1000)
    assert_equal(found, exact(queries, x, 10, gone))
    # All but a few rows, of which each query still gets as many as there are.
    left = np.array([3, 900, 1700, 2499])
    few = tree.search(queries, 10, np.setdiff1d(np.arange(2500), left))
    assert few.proponents.shape == (40, 4)
    np.testing.assert_array_equal(np.sort(few.proponents, 1), np.tile(left, (40, 1)))
    none = tree.search(queries, 10, np.arange(2500))
    assert none.proponents.shape == none.opponents.shape == (40, 0)


def test_more_rows_than_the_searched_leaves_hold(tree, corpus):
    found = tree.search(corpus[1], 700, leaves_to_search=1)
    assert found.proponents.shape == (40, 700)
    assert all(len(set(rows)) == 700 for rows in found.proponents)
    assert tree.search(corpus[1], 9999).proponents.shape == (40, 2500)


def test_one_query_none_and_proponents_alone(flat, corpus):
    queries = corpus[1]
    whole = flat.search(queries)
    np.testing.assert_array_equal(flat.search(queries[3:4]).proponents, whole.proponents[3:4])
    assert flat.search(queries[:0]).opponents.shape == (0, 0)
    alone = flat.search(queries, opponents=False)
    np.testing.assert_array_equal(alone.proponents, whole.proponents)
    assert alone.opponents.shape == alone.opponent_scores.shape == (40, 0)


def test_candidates_are_scored_again_by_their_encodings(tmp_path):
    """Codes alone, of three parts, find among 400 candidates what exact search finds."""
    x, queries = clustered(2500)
    settings = build.Settings(part_rows=900, dims_per_block=4, reorder=0, training_rows=900)
    wanted, counts = exact(queries, x), []

    def read(rows):
        assert (np.diff(rows) > 0).all()
        counts.append(len(rows))
        return x[rows]

    index = build.build(tmp_path / "i", read, x.shape, settings, {}, lambda: (queries, wanted))
    # The parts' rows once each, then 400 candidates of every query and of its opposite.
    assert sum(counts[:3]) == 2500 and counts[3:] == [400] * 80
    assert min(index.recall["proponents"], index.recall["opponents"]) >= 0.95
    assert build.recall(index, queries, wanted)["proponents"] < 0.8
    assert_equal(index.search(queries, read=read, candidates=2500), wanted)
    gone = wanted.proponents[0, 2]
    y = x.copy()
    y[gone] = np.inf
    with pytest.raises(build.ScannError, match=f"row {gone} is invalid now: give `without`"):
        index.search(queries, read=y.__getitem__)
    found = index.search(queries, 10, [gone], read=y.__getitem__, candidates=2499)
    assert_equal(found, exact(queries, y))


def test_a_moved_index_is_opened_and_searched(tmp_path, corpus):
    x, queries = corpus
    before = make(tmp_path / "here", x).search(queries)
    os.makedirs(tmp_path / "else")
    shutil.move(tmp_path / "here", tmp_path / "else" / "there")
    index = build.Index.open(tmp_path / "else" / "there")
    assert_equal(index.search(queries), before)
    assert [name for name, data in contents(index.path).items() if b"/here/" in data] == []


def test_parts_that_do_not_stay_in_memory(flat, corpus):
    index = build.Index.open(flat.path, memory_bytes=0)
    assert_equal(index.search(corpus[1]), flat.search(corpus[1]))
    assert index._loaded == {} and len(flat._loaded) == 3


def contents(path):
    return {
        str(p.relative_to(path)): p.read_bytes()
        for p in pathlib.Path(path).rglob("*")
        if p.is_file() and not p.name.endswith(".part")
    }


def test_the_same_rows_give_the_same_bytes(tmp_path, corpus, tree, monkeypatch):
    """However many rows are read at a time."""
    x, _ = corpus
    monkeypatch.setattr(build, "_STEP_BYTES", 97 * 4 * 64)
    make(tmp_path / "i", x, TREE)
    one, other = contents(tmp_path / "i"), contents(tree.path)
    assert sorted(one) == sorted(other)
    assert [name for name in one if one[name] != other[name]] == []


BUILD = """
import sys, time, numpy as np
from tda.retrieval.ranked import Ranked
from tda.retrieval.scann import build, settings as scann_settings
x = np.load(sys.argv[1])
settings = scann_settings.Settings(
    part_rows=300, dims_per_block=2, reorder=50, training_rows=300, leaves=8, leaves_to_search=4
)
build._STEP_BYTES = 150 * 4 * 64
begun = []
def read(rows):
    if not begun:
        begun.append(print("from", rows[0], flush=True))
    time.sleep(0.02)
    return x[rows]
q = x[:20]
def check():
    scores = q @ x.T
    best, worst = np.argsort(-scores)[:, :5], np.argsort(scores)[:, :5]
    return q, Ranked(best, None, worst, None, {})
build.build(sys.argv[2], read, x.shape, settings, {}, check)
print("end", flush=True)
"""


def start(*arguments):
    return subprocess.Popen(
        [sys.executable, "-c", BUILD, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.getcwd()},
    )


@pytest.mark.parametrize("kills", [3, pytest.param(30, marks=pytest.mark.slow)])
def test_killed_at_random_moments_and_started_again(tmp_path, kills):
    """Guards: a killed run that must start again from nothing; rows twice, rows never."""
    np.save(tmp_path / "x.npy", clustered(8700)[0])
    whole = start(tmp_path / "x.npy", tmp_path / "whole")
    assert whole.stdout.readline() == "from 0\n", whole.stderr.read()[-2000:]
    began = time.monotonic()
    assert whole.wait() == 0, whole.stderr.read()[-2000:]
    length = time.monotonic() - began
    rng, ended, froms, killed = random.Random(kills), False, [], 0
    while not ended:
        run = start(tmp_path / "x.npy", tmp_path / "killed")
        line = run.stdout.readline()
        froms += [int(line.split()[1])] if line.startswith("from") else []
        if killed < kills:
            time.sleep(rng.uniform(0, length * max(0.12, 1 / kills)))
            run.send_signal(signal.SIGKILL)
            killed += 1
        _, errors = run.communicate()
        ended = run.returncode == 0
        assert ended or run.returncode == -signal.SIGKILL, errors[-2000:]
    assert killed > kills // 3
    # It went on; no part was begun before the ones that were there.
    assert froms == sorted(froms) and (froms[-1] > 0)
    one, other = contents(tmp_path / "whole"), contents(tmp_path / "killed")
    assert sorted(one) == sorted(other)
    assert [name for name in one if one[name] != other[name]] == []


@pytest.fixture
def copy(flat, tmp_path):
    shutil.copytree(flat.path, tmp_path / "copy")
    return tmp_path / "copy"


def test_a_missing_part_is_built_again(copy, flat, corpus):
    whole = contents(copy)
    shutil.rmtree(copy / "00001")
    with pytest.raises(build.ScannError, match="not finished: parts 00001 are missing"):
        build.Index.open(copy)
    rows_read = []

    def read(rows):
        rows_read.extend(rows)
        return corpus[0][rows]

    build.build(copy, read, (2500, 64), FLAT, MADE)
    assert contents(copy) == whole and rows_read == list(range(833, 1666))
    # Where nothing is missing no encodings are asked for; the recall is, where it is not known.
    x, queries = corpus
    assert build.build(copy, None, (2500, 64), FLAT, MADE).recall is None
    index = build.build(copy, None, (2500, 64), FLAT, MADE, lambda: (queries, exact(queries, x)))
    assert index.recall["proponents"] >= 0.95
    assert build.build(copy, None, (2500, 64), FLAT, MADE, None).recall == index.recall


@pytest.mark.parametrize("name", ["hashed_dataset.npy", "rows.npy", "scann_config.pb", "part.json"])
def test_damage_is_named(copy, name):
    file = copy / "00002" / name
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(build.ScannError, match=f"00002/{name}.*build the index again"):
        build.Index.open(copy)
    file.unlink()
    with pytest.raises(build.ScannError, match=f"00002/{name}.*build the index again"):
        build.Index.open(copy)


def test_files_of_other_places_are_not_read(copy, corpus):
    file = copy / "00000" / "scann_assets.pbtxt"
    outside = file.read_text().replace('"hashed', f'"{copy}/00001/hashed')
    file.write_text(outside)
    about = json.loads((copy / "00000" / "part.json").read_text())
    about["files"][file.name] = len(outside)
    (copy / "00000" / "part.json").write_text(json.dumps(about))
    with pytest.raises(build.ScannError, match="names a file elsewhere"):
        build.Index.open(copy).search(corpus[1])


class Harm:
    def __reduce__(self):
        return os.mkdir, ("harm",)


@pytest.mark.parametrize("name", ["scann_docids.pkl", "00000/scann_docids.pkl", "00000/a.pickle"])
def test_pickles_are_not_run(copy, name, corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (copy / name).write_bytes(pickle.dumps(Harm()))
    assert build.Index.open(copy).search(corpus[1]).proponents.shape == (40, 10)
    assert not os.path.exists("harm")


def test_scanns_own_loader_would_run_a_pickle(copy, tmp_path, monkeypatch):
    """Why an index is loaded without it; once this fails, `load_part` can be a call of it."""
    monkeypatch.chdir(tmp_path)
    (copy / "00000" / "scann_docids.pkl").write_bytes(pickle.dumps(Harm()))
    part.import_scann().load_searcher(str(copy / "00000"))
    assert os.path.exists("harm")


def test_no_pickle_is_written(tree):
    names = {p.name for p in tree.path.rglob("*")}
    assert not [n for n in names if n.endswith(("pkl", "pickle"))]
    for file in tree.path.rglob("*.npy"):
        np.lib.format.open_memmap(file, "r")


def test_an_index_of_something_else_is_refused(copy, corpus):
    with pytest.raises(build.ScannError, match="fingerprint.encodings: of a test in the index, of"):
        make(copy, corpus[0], fingerprint=MADE | {"encodings": "of another"})
    with pytest.raises(build.ScannError, match="fingerprint.more: None in the index, 1 wanted"):
        make(copy, corpus[0], fingerprint=MADE | {"more": 1})
    with pytest.raises(build.ScannError, match="settings.dims_per_block: 2 in the index, 4 wanted"):
        make(copy, corpus[0], build.Settings(part_rows=1000, dims_per_block=4))
    with pytest.raises(build.ScannError, match="rows: 2500 in the index, 2400 wanted"):
        make(copy, corpus[0][:2400])
    with pytest.raises(build.ScannError, match="no index at"):
        build.Index.open(copy / "00000")
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps(manifest | {"format": 0}))
    with pytest.raises(build.ScannError, match="has format 0"):
        build.Index.open(copy)


def test_queries_that_are_not_finite_are_refused(flat, corpus):
    queries = corpus[1].copy()
    queries[7, 3] = np.nan
    with pytest.raises(build.ScannError, match="query 7 has a number that is not finite"):
        flat.search(queries)


def test_encodings_that_do_not_fit_are_refused(tmp_path):
    x, _ = clustered(300)

    def refused(read, match):
        with pytest.raises(build.ScannError, match=match):
            build.build(tmp_path / "i", read, (300, 64), FLAT, {})
        shutil.rmtree(tmp_path / "i", ignore_errors=True)

    refused(np.full_like(x, np.inf).__getitem__, "none of the 300 rows")
    half = x.copy()
    half[123, 5] = np.nan
    refused(half.__getitem__, "the encoding of row 123 has a number that is not finite")


def test_without_scann_the_extra_is_named(monkeypatch, tmp_path, flat, corpus):
    for name in [n for n in sys.modules if n.split(".")[0] == "scann"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "scann", None)
    for call in (
        lambda: make(tmp_path / "i", corpus[0]),
        lambda: build.Index.open(flat.path).search(corpus[1]),
        part.version,
    ):
        with pytest.raises(build.ScannError, match=r"pip install 'tda\[scann\]'"):
            call()


def test_settings_that_do_not_go_together_are_refused():
    for match, wrong in {
        "part_rows is 0": dict(part_rows=0),
        "dims_per_block is -1": dict(dims_per_block=-1),
        "threshold is 1": dict(threshold=1),
        "use float32, bfloat16, int8": dict(reorder_dtype="float16"),
        "leaves_to_search is 5 of 4 leaves": dict(leaves=4, leaves_to_search=5),
        "leaves_to_search is 0 of 4 leaves": dict(leaves=4),
        "soar and residual need leaves": dict(soar=1.5),
    }.items():
        with pytest.raises(ValueError, match=match):
            build.Settings(**(dict(part_rows=10) | wrong))


@pytest.mark.parametrize("width", [4_096, 65_536])
@pytest.mark.parametrize("rows", [1_000, 100_000, 1_000_000, 365_000_000])
def test_the_rule_of_sizes(rows, width):
    memory = 32 << 30
    settings = build.settings_for(rows, width, memory_bytes=memory)
    if rows == 1_000:
        assert settings is None
        return
    # A part can be built in the memory, and is large enough to learn codes from.
    assert 4 * width * (3 * settings.part_rows + 2 * settings.training_rows) <= memory
    assert 1_000 <= settings.part_rows <= rows and settings.training_rows <= settings.part_rows
    assert 1_024 <= -(-width // settings.dims_per_block) <= 2_048
    if settings.reorder:
        assert rows * settings.row_bytes(width) <= memory
        assert settings.reorder * -(-rows // settings.part_rows) >= 400
    else:
        assert rows * width > memory
    # Of the paper's corpus there are codes alone: a hundredth of the encodings.
    if rows == 365_000_000:
        assert settings.reorder == 0
        assert settings.row_bytes(width) * 100 <= 4 * width * 7


def test_the_rule_can_be_overridden_key_by_key():
    chosen = build.settings_for(100_000, 11_008)
    changed = build.settings_for(100_000, 11_008, dims_per_block=4, part_rows=3_000, reorder=77)
    assert changed == dataclasses.replace(chosen, dims_per_block=4, part_rows=3_000, reorder=77)
    large = build.settings_for(10_000_000, 11_008, reorder=50)
    assert large == dataclasses.replace(build.settings_for(10_000_000, 11_008), reorder=50)
    assert build.settings_for(100_000, 11_008, k=100).reorder > chosen.reorder
    with pytest.raises(TypeError, match="colour"):
        build.settings_for(100_000, 11_008, colour=1)
    with pytest.raises(ValueError, match="0.5 GiB hold too few rows of 65536 numbers .* 1.0 GiB"):
        build.settings_for(100_000, 65_536, memory_bytes=1 << 29)
    assert build.settings_for(100_000, 65_536, memory_bytes=1 << 30).part_rows >= 1_000
