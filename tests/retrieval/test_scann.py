"""The approximate index against a direct computation; kills, refusals, and the rule of sizes."""

import copy
import dataclasses
import json
import os
import pathlib
import pickle
import random
import shutil
import signal
import sys
import time

import numpy as np
import pytest

from tda.retrieval.ranked import Ranked
from tda.retrieval.scann import index as scann_index
from tda.retrieval.scann import part
from tda.retrieval.scann.part import ScannError
from tda.retrieval.scann.settings import Settings, settings_for
from tda.runtime.array_tasks import ArrayTask, Unfinished
from tda.runtime.groups import Groups
from tests.store.test_kills import start

pytest.importorskip("scann", reason="ScaNN is not installed: pip install 'tda-jax[scann]'")

FINGERPRINT = {"encodings": "of a test", "widths": (32, 32)}
FLAT = Settings(part_rows=1000, dims_per_block=2, reorder=100, training_rows=1000)
TREE = Settings(
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


def encodings(x, read=None, fingerprint=FINGERPRINT):
    return scann_index.Encodings(read or x.__getitem__, *x.shape, fingerprint)


def make(path, x, settings=FLAT, check=None):
    return scann_index.build(path, encodings(x), settings, check)


def with_settings(index, **changes):
    """The same index, searched by other settings."""
    changed = copy.copy(index)
    changed.settings = dataclasses.replace(index.settings, **changes)
    return changed


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


def assert_equal(ranking, expected, atol=1e-6):
    np.testing.assert_array_equal(ranking.proponents, expected.proponents)
    np.testing.assert_array_equal(ranking.opponents, expected.opponents)
    np.testing.assert_allclose(ranking.proponent_scores, expected.proponent_scores, atol=atol)
    np.testing.assert_allclose(ranking.opponent_scores, expected.opponent_scores, atol=atol)


@pytest.mark.parametrize("settings", [FLAT, TREE], ids=["flat", "tree"])
def test_recall_is_measured_printed_and_kept(tmp_path, settings, capsys):
    x, queries = clustered(5000)
    index = make(tmp_path / "i", x, settings, check=lambda: (queries, exact(queries, x)))
    assert index.recall["k"] == 10 and index.recall["queries"] == 40
    assert index.recall["proponents"] >= 0.95
    assert index.recall["opponents"] >= 0.95
    # It is what a search finds, it is printed, and whoever opens the index sees it.
    pairs = zip(index.search(queries).proponents, exact(queries, x).proponents, strict=True)
    shared = np.mean([len(set(a) & set(b)) / 10 for a, b in pairs])
    assert index.recall["proponents"] == pytest.approx(shared)
    assert f"proponents {index.recall['proponents']:.3f}" in capsys.readouterr().out
    assert make(tmp_path / "i", x, settings).recall == index.recall


def test_recall_counts_missed_rows_on_each_side(flat, corpus):
    """Mistakes: the score's sign ignored by recall; proponents and opponents swapped."""
    queries, expected = corpus[1], exact(corpus[1], corpus[0])
    assert scann_index.measure_recall(flat, queries, expected)["proponents"] >= 0.95
    moved = dataclasses.replace(expected, proponents=(expected.proponents + 1) % 2500)
    recall = scann_index.measure_recall(flat, queries, moved)
    assert recall["proponents"] < 0.2 and recall["opponents"] >= 0.95
    swapped = Ranked(expected.opponents, None, expected.proponents, None, {})
    recall = scann_index.measure_recall(flat, queries, swapped)
    assert recall["proponents"] == recall["opponents"] == 0


def test_parts_searched_throughout_equal_brute_force(tree, corpus):
    x, queries = corpus
    for k in (1, 10, 400):
        ranking = with_settings(tree, leaves_to_search=20, reorder=1000).search(queries, k)
        assert_equal(ranking, exact(queries, x, k))
    assert ranking.first_ranks == {}
    assert ranking.proponents.dtype == np.int64 and ranking.proponent_scores.dtype == np.float32


def test_equal_scores_come_in_the_order_of_rows(tmp_path):
    x, queries = clustered(3000)
    x[2000:] = x[:1000]
    settings = Settings(part_rows=1000, dims_per_block=0)
    ranking = make(tmp_path / "i", x, settings).search(queries, 20)
    assert_equal(ranking, exact(queries, x, 20))
    equal = ranking.proponent_scores[:, :-1] == ranking.proponent_scores[:, 1:]
    assert equal.mean() > 0.1
    assert (np.diff(ranking.proponents, axis=1)[equal] > 0).all()


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
    settings = Settings(**(dict(part_rows=800, dims_per_block=2, training_rows=800) | changes))
    index = make(tmp_path / "i", x, settings)
    recall = scann_index.measure_recall(index, queries, exact(queries, x))
    assert min(recall["proponents"], recall["opponents"]) >= 0.9, recall
    # Beside the rows themselves there are their numbers, codebooks and centres.
    size = sum(len(data) for data in contents(tmp_path / "i").values())
    assert 0 <= size - 1500 * settings.row_bytes(64) < 1500 * 8 + 2 * 20_000
    # Scores are inner products, whatever representation they are of.
    ranking = index.search(queries)
    products = np.einsum("qe,qke->qk", queries, x[ranking.opponents])
    np.testing.assert_allclose(ranking.opponent_scores, products, atol=0.01)
    assert np.all(np.diff(ranking.proponent_scores) <= 0)
    assert np.all(np.diff(ranking.opponent_scores) >= 0)


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
    ranking = index.search(queries, 2500)
    for rows in (ranking.proponents, ranking.opponents):
        assert rows.shape == (40, valid) and np.isfinite(x[rows, 0]).all()
        assert all(len(set(r)) == valid for r in rows)
    assert ranking.proponents[0, 0] == 2400


def test_withdrawn_rows_are_never_returned(tree, corpus):
    x, queries = corpus
    best = exact(queries, x, 25)
    withdrawn = np.unique(np.concatenate([best.proponents, best.opponents], None))
    ranking = with_settings(tree, leaves_to_search=20, reorder=1000).search(queries, 10, withdrawn)
    assert_equal(ranking, exact(queries, x, 10, withdrawn))
    # All but a few rows, of which each query still gets as many as there are.
    left = np.array([3, 900, 1700, 2499])
    few = tree.search(queries, 10, np.setdiff1d(np.arange(2500), left))
    assert few.proponents.shape == (40, 4)
    np.testing.assert_array_equal(np.sort(few.proponents, 1), np.tile(left, (40, 1)))
    none = tree.search(queries, 10, np.arange(2500))
    assert none.proponents.shape == none.opponents.shape == (40, 0)


def test_rows_beyond_the_searched_leaves_fill_up_a_ranking(tree, corpus):
    rows = with_settings(tree, leaves_to_search=1).search(corpus[1], 700).proponents
    assert rows.shape == (40, 700) and all(len(set(r)) == 700 for r in rows)
    assert tree.search(corpus[1], 9999).proponents.shape == (40, 2500)


def test_a_ranking_depends_on_neither_other_queries_nor_opponents(flat, corpus):
    queries = corpus[1]
    ranking = flat.search(queries)
    np.testing.assert_array_equal(flat.search(queries[3:4]).proponents, ranking.proponents[3:4])
    assert flat.search(queries[:0]).opponents.shape == (0, 0)
    alone = flat.search(queries, opponents=False)
    np.testing.assert_array_equal(alone.proponents, ranking.proponents)
    assert alone.opponents.shape == alone.opponent_scores.shape == (40, 0)


def test_candidates_are_scored_again_by_their_encodings(tmp_path):
    """Codes alone, of three parts, find among 400 candidates what exact search finds."""
    x, queries = clustered(2500)
    settings = Settings(part_rows=900, dims_per_block=4, reorder=0, training_rows=900)
    expected, counts = exact(queries, x), []

    def read(rows):
        assert (np.diff(rows) > 0).all()
        counts.append(len(rows))
        return x[rows]

    check = lambda: (queries, expected)  # noqa: E731
    index = scann_index.build(tmp_path / "i", encodings(x, read), settings, check)
    # The parts' rows once each, then 400 candidates of every query and of its opposite.
    assert sum(counts[:3]) == 2500 and counts[3:] == [400] * 80
    assert min(index.recall["proponents"], index.recall["opponents"]) >= 0.95
    # Codes alone choose the ten.
    few = index.search(queries, candidates=10).proponents
    assert np.mean([np.isin(a, b) for a, b in zip(expected.proponents, few, strict=True)]) < 0.8
    assert_equal(index.search(queries, candidates=2500), expected)
    withdrawn = expected.proponents[0, 2]
    x[withdrawn] = np.inf
    with pytest.raises(ScannError, match=f"row {withdrawn} is invalid now: give `without`"):
        index.search(queries)
    ranking = index.search(queries, 10, [withdrawn], candidates=2499)
    assert_equal(ranking, exact(queries, x))


def test_a_moved_index_is_opened_and_searched(tmp_path, corpus):
    x, queries = corpus
    before = make(tmp_path / "here", x).search(queries)
    os.makedirs(tmp_path / "else")
    shutil.move(tmp_path / "here", tmp_path / "else" / "there")
    index = reopen(tmp_path / "else" / "there", x)
    assert_equal(index.search(queries), before)
    assert [name for name, data in contents(index.path).items() if b"/here/" in data] == []


def test_parts_that_do_not_stay_in_memory_are_loaded_again(flat, corpus, monkeypatch):
    ranking = flat.search(corpus[1])
    monkeypatch.setattr(scann_index, "_RESIDENT_BYTES", 0)
    index = reopen(flat.path, corpus[0])
    assert_equal(index.search(corpus[1]), ranking)
    assert [sum("_loaded" in vars(p) for p in i.parts) for i in (index, flat)] == [0, 3]


def reopen(path, x):
    """Opens a finished index; reads no encodings."""
    return scann_index.build(path, encodings(x, read=no_reading), FLAT)


def no_reading(rows):
    raise AssertionError("encodings were read")


def contents(path):
    return {
        str(p.relative_to(path)): p.read_bytes()
        for p in pathlib.Path(path).rglob("*")
        if p.is_file() and not p.name.endswith(".part")
    }


def test_the_same_rows_give_the_same_bytes(tmp_path, corpus, tree, monkeypatch):
    """However many rows are read at a time."""
    x, _ = corpus
    monkeypatch.setattr(scann_index, "_STEP_BYTES", 97 * 4 * 64)
    make(tmp_path / "i", x, TREE)
    assert_same_files(tmp_path / "i", tree.path)


def test_the_tasks_of_an_array_build_and_search_parts_of_their_own(tmp_path, corpus, tree):
    x, queries = corpus
    written, path = [], tmp_path / "index"

    def build(task):
        engine = ArrayTask(task, 2, tmp_path, "an array", patience=0.0)
        read = lambda rows: written.append(task) or x[rows]  # noqa: E731
        groups = Groups(tmp_path / "groups", engine=engine)
        return scann_index.build(path, encodings(x, read), TREE, groups=groups)

    with pytest.raises(Unfinished, match="1 of its groups is missing, those of task 1"):
        build(0)
    indices = [build(1), build(0)]
    assert written == [0, 0, 1]
    assert_same_files(path, tree.path)
    with pytest.raises(Unfinished, match="2 of its groups are missing, those of task 0"):
        indices[0].search(queries)
    for index in reversed(indices):
        assert_equal(index.search(queries), tree.search(queries), atol=0)
    # Other queries are other work, whose parts are not searched yet.
    with pytest.raises(Unfinished):
        indices[0].search(queries[1:])


def assert_same_files(a, b):
    one, other = contents(a), contents(b)
    assert sorted(one) == sorted(other)
    assert [name for name in one if one[name] != other[name]] == []


BUILD = """
import sys, time, numpy as np
from tda.retrieval.ranked import Ranked
from tda.retrieval.scann import index
from tda.retrieval.scann.settings import Settings
x = np.load(sys.argv[1])
settings = Settings(
    part_rows=300, dims_per_block=2, reorder=50, training_rows=300, leaves=8, leaves_to_search=4
)
index._STEP_BYTES = 150 * 4 * 64
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
index.build(sys.argv[2], index.Encodings(read, *x.shape, {}), settings, check)
print("end", flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kills", [3, 30])
def test_a_build_killed_at_random_moments_ends_in_the_same_bytes(tmp_path, kills):
    """Guards: a killed run that must start again from nothing; rows twice, rows never."""
    np.save(tmp_path / "x.npy", clustered(8700)[0])
    run = start(BUILD, [tmp_path / "x.npy", tmp_path / "uninterrupted"])
    assert run.stdout.readline() == "from 0\n", run.stderr.read()[-2000:]
    began = time.monotonic()
    assert run.wait() == 0, run.stderr.read()[-2000:]
    length = time.monotonic() - began
    rng, ended, froms, killed = random.Random(kills), False, [], 0
    while not ended:
        run = start(BUILD, [tmp_path / "x.npy", tmp_path / "killed"])
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
    # It resumed; no part was begun before the ones that existed.
    assert froms == sorted(froms) and (froms[-1] > 0)
    assert_same_files(tmp_path / "uninterrupted", tmp_path / "killed")


@pytest.fixture
def duplicate(flat, tmp_path):
    """A copy of an index of three parts."""
    shutil.copytree(flat.path, tmp_path / "duplicate")
    return tmp_path / "duplicate"


def test_a_missing_part_is_built_again(duplicate, corpus):
    before, (x, queries) = contents(duplicate), corpus
    shutil.rmtree(duplicate / "00001")
    rows_read = []

    def read(rows):
        rows_read.extend(rows)
        return x[rows]

    assert scann_index.build(duplicate, encodings(x, read), FLAT).recall is None
    assert contents(duplicate) == before and rows_read == list(range(833, 1666))
    # Where nothing is missing no encodings are read; the recall is measured once.
    check = lambda: (queries, exact(queries, x))  # noqa: E731
    index = scann_index.build(duplicate, encodings(x, no_reading), FLAT, check)
    assert index.recall["proponents"] >= 0.95
    assert reopen(duplicate, x).recall == index.recall


@pytest.mark.parametrize("name", ["hashed_dataset.npy", "rows.npy", "scann_config.pb", "part.json"])
def test_damaged_files_are_named(duplicate, name, corpus):
    file = duplicate / "00002" / name
    file.write_bytes(file.read_bytes()[:-3])
    for _ in range(2):
        with pytest.raises(ScannError, match=f"00002/{name}.*build the index again"):
            reopen(duplicate, corpus[0])
        file.unlink(missing_ok=True)


def test_files_outside_an_index_are_not_read(duplicate, corpus):
    file = duplicate / "00000" / "scann_assets.pbtxt"
    outside = file.read_text().replace('"hashed', f'"{duplicate}/00001/hashed')
    file.write_text(outside)
    about = json.loads((duplicate / "00000" / "part.json").read_text())
    about["files"][file.name] = len(outside)
    (duplicate / "00000" / "part.json").write_text(json.dumps(about))
    with pytest.raises(ScannError, match="names a file elsewhere"):
        reopen(duplicate, corpus[0]).search(corpus[1])


class Harm:
    def __reduce__(self):
        return os.mkdir, ("harm",)


@pytest.mark.parametrize("name", ["scann_docids.pkl", "00000/scann_docids.pkl", "00000/a.pickle"])
def test_pickles_are_not_run(duplicate, name, corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (duplicate / name).write_bytes(pickle.dumps(Harm()))
    assert reopen(duplicate, corpus[0]).search(corpus[1]).proponents.shape == (40, 10)
    assert not os.path.exists("harm")


def test_scanns_own_loader_would_run_a_pickle(duplicate, tmp_path, monkeypatch):
    """Why an index is loaded without it; once this fails, a part can be loaded by it."""
    monkeypatch.chdir(tmp_path)
    (duplicate / "00000" / "scann_docids.pkl").write_bytes(pickle.dumps(Harm()))
    part.import_scann().load_searcher(str(duplicate / "00000"))
    assert os.path.exists("harm")


def test_no_pickle_is_written(tree):
    names = {p.name for p in tree.path.rglob("*")}
    assert not [n for n in names if n.endswith(("pkl", "pickle"))]
    for file in tree.path.rglob("*.npy"):
        np.lib.format.open_memmap(file, "r")


@pytest.mark.parametrize(
    "message, rows, settings, fingerprint",
    [
        ("fingerprint.encodings: of a test → of", 2500, FLAT, {"encodings": "of more"}),
        ("fingerprint.more: absent → 1", 2500, FLAT, {"more": 1}),
        ("rows: 2500 → 2400", 2400, FLAT, {}),
        ("settings.dims_per_block: 2 → 4", 2500, dataclasses.replace(FLAT, dims_per_block=4), {}),
    ],
)
def test_an_index_of_other_encodings_or_settings_is_refused(
    flat, corpus, message, rows, settings, fingerprint
):
    of_rows = encodings(corpus[0][:rows], no_reading, FINGERPRINT | fingerprint)
    with pytest.raises(ScannError, match=message):
        scann_index.build(flat.path, of_rows, settings)


def test_queries_that_are_not_finite_are_refused(flat, corpus):
    queries = corpus[1].copy()
    queries[7, 3] = np.nan
    with pytest.raises(ScannError, match="query 7 has a number that is not finite"):
        flat.search(queries)


def test_encodings_that_do_not_fit_are_refused(tmp_path):
    x, _ = clustered(300)

    def refused(x, match):
        with pytest.raises(ScannError, match=match):
            make(tmp_path / match, x)

    refused(np.full_like(x, np.inf), "none of the 300 rows")
    x[123, 5] = np.nan
    refused(x, "the encoding of row 123 has a number that is not finite")


def test_without_scann_the_extra_is_named(monkeypatch, tmp_path, corpus):
    for name in [n for n in sys.modules if n.split(".")[0] == "scann"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "scann", None)
    with pytest.raises(ScannError, match=r"pip install 'tda-jax\[scann\]'"):
        make(tmp_path / "i", corpus[0])
    assert not (tmp_path / "i").exists()


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
            Settings(**(dict(part_rows=10) | wrong))


@pytest.mark.parametrize("width", [4_096, 65_536])
@pytest.mark.parametrize("rows", [1_000, 100_000, 1_000_000, 365_000_000])
def test_the_rule_of_sizes(rows, width):
    memory = 32 << 30
    settings = settings_for(rows, width, memory_bytes=memory)
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
    chosen = settings_for(100_000, 11_008)
    changed = settings_for(100_000, 11_008, dims_per_block=4, part_rows=3_000, reorder=77)
    assert changed == dataclasses.replace(chosen, dims_per_block=4, part_rows=3_000, reorder=77)
    large = settings_for(10_000_000, 11_008, reorder=50)
    assert large == dataclasses.replace(settings_for(10_000_000, 11_008), reorder=50)
    assert settings_for(100_000, 11_008, k=100).reorder > chosen.reorder
    with pytest.raises(TypeError, match="colour"):
        settings_for(100_000, 11_008, colour=1)
    with pytest.raises(ValueError, match="0.5 GiB hold too few rows of 65536 numbers .* 0.98 GiB"):
        settings_for(100_000, 65_536, memory_bytes=1 << 29)
    assert settings_for(100_000, 65_536, memory_bytes=1 << 30).part_rows >= 1_000
