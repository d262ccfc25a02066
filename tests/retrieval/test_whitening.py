"""R of a run's methods: what is taken out of it, what is drawn from it, what is kept of it."""

import numpy as np
import pytest

from tda import hessian
from tda.methods import METHODS
from tda.retrieval import exact
from tda.retrieval.hessian_settings import HessianSettings
from tda.retrieval.sources import InMemory
from tda.retrieval.whitening import Whitening, describe_regularisation
from tda.runtime import atomic_file

SLICES = [slice(0, 3), slice(3, 8)]


@pytest.fixture
def data():
    rng = np.random.default_rng(0)
    queries = rng.normal(size=(9, 8)) + 1.0
    passages = rng.normal(size=(60, 8)) * np.linspace(1, 3, 8)
    return passages.astype(np.float32), queries.astype(np.float32)


def whitening(data, **changes):
    passages, queries = data
    settings = HessianSettings(**{"damping": 1e-3} | changes)
    return Whitening(settings, InMemory(passages, SLICES), queries)


def scores(data, part, name):
    passages, queries = data
    scorer = {name: part.scorers[name]}
    found = exact.search(queries[part.queries], InMemory(passages, SLICES), scorer, 60)[name]
    out = np.zeros((len(part.queries), 60))
    np.put_along_axis(out, found.proponents, found.proponent_scores.astype(np.float64), 1)
    return out


def cosines(passages, g, R):
    """Cosines under R⁻¹ of blocks, float64."""
    inverse = [np.linalg.inv(b) for b in R]

    def product(a, b):
        return sum(a[:, s] @ M @ b[:, s].T for s, M in zip(SLICES, inverse, strict=True))

    p, g = passages.astype(np.float64), g[None].astype(np.float64)
    return product(p, g)[:, 0] / np.sqrt(np.diag(product(p, p)) * product(g, g)[0, 0])


@pytest.mark.parametrize("damping", [0.05, -1.0])
def test_leave_one_out_is_exact_damped_or_shrunk(data, damping):
    """Guards: few queries, all there are, whose noise shrinks the mixture."""
    passages, queries = data
    made = whitening(data, damping=damping, weight=0.6)
    (part,) = made.parts({"m": METHODS["trackstar_leave_one_out"]})
    got = scores(data, part, "m")
    train = hessian.autocorrelation_of_source(InMemory(passages, SLICES))
    note = made.note(METHODS["trackstar_leave_one_out"])
    assert note["lambda"] == 0.6
    R_train = train.blocks
    if damping < 0:
        shares = hessian.shrinkage(train.blocks, train.noise)
        R_train = list(hessian.shrink(train.blocks, shares))
        assert (shares > 0.02).all() and note["shrinkage"] == pytest.approx(np.median(shares))
    else:
        assert note["damping"] == damping
    for q in range(9):
        R = []
        for t, s in zip(R_train, SLICES, strict=True):
            of_all, own = (0.6 / 8 * x[:, s].T @ x[:, s] for x in (queries, queries[q : q + 1]))
            # The damping is in mean eigenvalues of the mixture with the query's own part.
            whole = of_all + 0.4 * t
            mean = np.trace(whole) / len(whole) * np.eye(len(whole))
            R.append(whole - own + (damping if damping > 0 else 1e-6) * mean)
        np.testing.assert_allclose(got[q], cosines(passages, queries[q], R), atol=2e-4)


def test_disjoint_halves_never_see_their_own_queries(data):
    passages, queries = data
    made = whitening(data, weight=0.6)
    parts = made.parts({"m": METHODS["trackstar_disjoint"]})
    assert sorted(np.concatenate([p.queries for p in parts])) == list(range(9))
    train = hessian.autocorrelation_of_source(InMemory(passages, SLICES)).blocks
    for part in parts:
        others = np.setdiff1d(np.arange(9), part.queries)
        evaluation = hessian.autocorrelation_of_source(InMemory(queries[others], SLICES)).blocks
        R = [0.6 * e + 0.4 * t for e, t in zip(evaluation, train, strict=True)]
        R = [b + 1e-3 * np.trace(b) / len(b) * np.eye(len(b)) for b in R]
        got = scores(data, part, "m")
        for row, q in enumerate(part.queries):
            np.testing.assert_allclose(got[row], cosines(passages, queries[q], R), atol=5e-4)
    # Changing a query changes its own scores by its gradient alone, not by R.
    other = queries.copy()
    q = parts[0].queries[0]
    other[q] *= 3
    again = whitening((passages, other), weight=0.6).parts({"m": METHODS["trackstar_disjoint"]})
    before, after = scores(data, parts[0], "m"), scores((passages, other), again[0], "m")
    np.testing.assert_allclose(after[0], before[0], atol=1e-4)


def test_methods_are_searched_together_where_they_can_be(data):
    made = whitening(data, evaluation="leave_one_out")
    names = ("exp3", "exp5", "trackstar", "trackstar_all", "trackstar_disjoint")
    parts = made.parts({n: METHODS[n] for n in names})
    assert [set(p.scorers) for p in parts] == [set(names[:4]), {names[4]}, {names[4]}]
    scorers = parts[0].scorers
    assert scorers["exp3"].roots is None and scorers["exp5"].query_weights == ()
    assert scorers["trackstar"].query_weights and not scorers["trackstar_all"].query_weights
    assert made.note(METHODS["exp3"]) is None
    assert made.note(METHODS["trackstar"])["evaluation"] == "leave_one_out"


def test_too_few_queries_for_the_rule_are_refused():
    """Mistakes: k beyond the directions of the queries gives λ = 1, and R_train is left out."""
    rng = np.random.default_rng(0)
    slices = [slice(0, 40), slice(40, 80)]
    passages = InMemory(rng.normal(size=(200, 80)).astype(np.float32), slices)

    def parts(count, name="trackstar", **changes):
        queries = (rng.normal(size=(count, 80)) + 1).astype(np.float32)
        made = Whitening(HessianSettings(**changes), passages, queries)
        for part in made.parts({"m": METHODS[name], "other": METHODS["exp5"]}):
            assert part.scorers
        return made

    ways_out = "3 queries.*component 7.*hessian.component.*hessian.weight.*exp5"
    for name in ("trackstar", "trackstar_leave_one_out"):
        with pytest.raises(ValueError, match=ways_out):
            parts(3, name, component=7)
    # Halves have fewer directions.
    with pytest.raises(ValueError, match=ways_out):
        parts(6, "trackstar_disjoint", component=7)
    for count, changes in (
        (3, dict(component=6)),
        (4, dict(component=7)),
        (3, dict(component=7, weight=0.9)),
    ):
        weight = parts(count, **changes).notes["all"]["lambda"]
        assert 0 < weight < 0.999
    assert parts(3, "exp5", component=7).notes.keys() == {"train"}


def test_spectra_of_an_earlier_search_stay(data, tmp_path):
    both, train = whitening(data), whitening(data)
    both.scorer(METHODS["trackstar"], 0)
    name = both.keep_spectra(tmp_path, ("a", "b"), {"x": 1})
    train.scorer(METHODS["exp5"], None)
    assert train.keep_spectra(tmp_path, ("a", "b"), {"x": 1}) == name
    with np.load(tmp_path / name, allow_pickle=False) as kept:
        assert set(kept) == {"blocks", "widths", "train", "evaluation"}
        assert list(kept["blocks"]) == ["a", "b"] and kept["train"].shape == (8,)
    assert whitening(data).keep_spectra(tmp_path, (), {}) is None


def scorer(data, number, folder=None, identity=None, on_progress=None, **changes):
    passages, queries = data
    settings = HessianSettings(weight=0.6, **changes)
    source = InMemory(passages, SLICES)
    roots = Whitening(
        settings, source, queries, folder=folder, identity=identity, on_progress=on_progress
    )
    return roots.scorer(METHODS["trackstar"], number)


@pytest.mark.parametrize("rule", ["all", "leave_one_out", "disjoint"])
def test_another_question_has_r_of_all_queries(data, rule):
    expected, other = scorer(data, None, evaluation="all"), scorer(data, None, evaluation=rule)
    assert other.query_weights == ()
    for a, b in zip(expected.roots, other.roots, strict=True):
        np.testing.assert_array_equal(a, b)


def test_roots_are_read_again_with_the_weights_of_queries(data, tmp_path):
    told: list[list[str]] = [[], [], [], []]
    changes = [{}, {}, {"damping": 0.5}, {}]
    identities = ["a", "a", "a", "b"]
    roots = [
        scorer(
            data, 1, tmp_path / "live", identity, lambda *t, i=i: told[i].append(t[0]),
            evaluation="leave_one_out", **change,
        )
        for i, (change, identity) in enumerate(zip(changes, identities, strict=True))
    ]  # fmt: skip
    assert "decomposing R" in told[0] and told[1] == ["reading R"]
    assert "decomposing R" in told[2] and "decomposing R" in told[3]
    assert roots[0].query_weights == roots[1].query_weights and len(roots[0].query_weights) == 2
    for a, b in zip(roots[0].roots, roots[1].roots, strict=True):
        np.testing.assert_array_equal(a, b)
    assert len(list((tmp_path / "live").glob("inverse-root-leave_one_out-*.npz"))) == 3


def test_a_search_that_was_killed_reads_R_with_its_note_and_spectra(data, tmp_path):
    """Guards: a resumed run whose table lacks λ, or whose results lack the plot of R."""
    passages, queries = data

    def make(source):
        return Whitening(HessianSettings(), source, queries, folder=tmp_path, identity="x")

    first, second = make(InMemory(passages, SLICES)), make(InMemory(passages, SLICES))
    (part,) = first.parts({"m": METHODS["trackstar"]})
    second._make = None  # nothing is decomposed again
    (again,) = second.parts({"m": METHODS["trackstar"]})
    for a, b in zip(part.scorers["m"].roots, again.scorers["m"].roots, strict=True):
        np.testing.assert_array_equal(a, b)
    assert second.note(METHODS["trackstar"]) == first.note(METHODS["trackstar"])
    assert {"lambda", "shrinkage"} <= first.note(METHODS["trackstar"]).keys()
    assert first.spectra.keys() == second.spectra.keys() == {"train", "evaluation"}
    for name, spectrum in first.spectra.items():
        np.testing.assert_array_equal(spectrum, second.spectra[name])


def test_roots_of_a_read_only_workdir_are_computed(data, tmp_path, monkeypatch):
    def refuse(*args):
        raise PermissionError

    monkeypatch.setattr(atomic_file, "open_atomic", refuse)
    roots = scorer(data, 1, tmp_path, "a").roots
    for a, b in zip(roots, scorer(data, 1).roots, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", ["trackstar_leave_one_out", "trackstar_disjoint"])
def test_a_query_alone_is_scored_as_among_all(data, name):
    roots = whitening(data, weight=0.6)
    for part in roots.parts({"m": METHODS[name]}):
        for q in part.queries:
            alone, among_all = roots.scorer(METHODS[name], int(q)), part.scorers["m"]
            assert alone.query_weights == among_all.query_weights
            for a, b in zip(alone.roots, among_all.roots, strict=True):
                np.testing.assert_array_equal(a, b)


def test_a_cutoff_is_described_where_there_is_one():
    note = {"damping": 1e-3, "cutoff": 0.0}
    assert describe_regularisation(note) == "damping 0.001"
    described = describe_regularisation(note | {"cutoff": 0.5})
    assert described == "damping 0.001; without eigenvalues below 0.5 of a block's mean"


def test_r_of_as_many_passages_as_columns_is_shrunk_by_default():
    """Guards: the noise of few rows, which a small damping magnifies, drowns what matches.

    Passages of a topic share a direction that all passages have little of. R of as many rows as
    columns gives its smallest eigenvalues to noise; R of many rows needs no shrinking.
    """
    rng = np.random.default_rng(0)
    E, topics = 64, 16

    def rows(count):
        topic = np.arange(count) % topics
        common = rng.normal(size=(count, 8)) @ rng.normal(size=(8, E)) * 3
        return np.float32(rng.normal(size=(count, E)) + common), topic

    directions = rng.normal(size=(topics, E))
    queries = np.float32(directions * 0.5 + rng.normal(size=(topics, 8)) @ rng.normal(size=(8, E)))

    def mean_reciprocal_rank(count, **changes):
        noise, topic = rows(count)
        source = InMemory(np.float32(noise + directions[topic] * 0.5), [slice(0, E)])
        whitening = Whitening(HessianSettings(**changes), source)
        scorers = {"m": whitening.scorer(METHODS["trackstar_train"], None)}
        ranked = exact.search(queries, source, scorers, count)["m"]
        hits = topic[ranked.proponents] == np.arange(topics)[:, None]
        return np.mean(1 / (1 + hits.argmax(axis=1))), whitening.note(METHODS["exp5"])

    by_default, note = mean_reciprocal_rank(E)
    damped, _ = mean_reciprocal_rank(E, damping=1e-3)
    assert note["shrinkage"] > 0.02 and by_default > damped + 0.1
    assert mean_reciprocal_rank(64 * E)[1]["shrinkage"] < note["shrinkage"] / 20
