"""Every method from end to end: rankings against scores made by hand from the stores."""

import dataclasses

import jax
import numpy as np
import pytest

from tda import hessian, methods
from tda import loss as losses
from tda import store as stores
from tda.data import batches
from tda.gradients import adam_steps, kronecker, reference
from tda.gradients.projection import Projection
from tda.gradients.sites import find_sites
from tda.methods import METHODS, GradientKind
from tda.retrieval import by_score, dense, exact
from tda.retrieval.sources import InMemory
from tda.run import checkpoints, encode, retrieve, stages, vectors
from tda.run.gradient_retrievers import Gradients
from tda.run.registry import retriever_of
from tda.run.workdir import Workdir
from tests.experiments.test_trace import make_config

NAMES = (
    "annotated,tracin,hidden_last,hidden_middle,random,length,gradient_norm,"
    "trackstar_all,trackstar_leave_one_out,trackstar_disjoint,exp2,grad_cos"
)
# Each needs encoders of its own, and these are to be compiled.
MORE = "trak,less,ekfac,logra"


@pytest.fixture(scope="module")
def traced(tmp_path_factory, runs_on_one_device):
    """A config with its corpus, its model of several checkpoints, and what every method ranks."""
    path = tmp_path_factory.mktemp("attribution")
    config = make_config(path)
    config.methods = NAMES
    config.train.keep = 0
    config.train.save_every = 1
    config.train.epochs = 3.0
    config.projection.blocks = 1
    config.several.checkpoints = 2
    # The tests compute R^(−1/2) themselves, with a fixed damping.
    config.hessian.damping = 1e-3
    # Scores are held against sums of float32 numbers.
    config.store.dtype = "float32"
    config.eval.top_k = 12
    workdir = Workdir(path / "w")
    run = stages.prepare(config, workdir)
    return run, *retrieve.retrieve(run)


@pytest.fixture(scope="module")
def more(traced):
    """The same run with more methods."""
    run = changed(traced[0], methods=MORE)
    return run, *retrieve.retrieve(run)


def changed(run, **keys):
    """The run with some keys of its config changed."""
    config = run.config.copy_and_resolve_references()
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in keys.items()})
    return dataclasses.replace(run, config=config)


def scores_of(ranked, name):
    """Scores of all passages, float64 [Q, C]: the corpus has no more than were kept."""
    found = ranked[name]
    out = np.full((4, 12), np.nan)
    np.put_along_axis(out, found.proponents, found.proponent_scores.astype(np.float64), axis=1)
    return out


def rows(traced, kind, step=None):
    """Gradients of passages and queries at a checkpoint, float64."""
    run, *_ = traced
    source, queries = encode.encode(run if step is None else run.at_step(step), kind)
    return source.read(np.arange(12)).astype(np.float64), queries.astype(np.float64)


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def whitened(x, slices, damping=1e-3):
    R = hessian.autocorrelation_of_source(InMemory(x.astype(np.float32), slices)).blocks
    roots = hessian.inverse_root(R, damping)
    return lambda y: np.concatenate([y[:, s] @ r for s, r in zip(slices, roots, strict=True)], 1)


def test_checkpoints_are_spread_over_the_training(traced):
    run, *_ = traced
    trained = run.trained
    steps = checkpoints.steps_of(run, METHODS["tracin"])
    assert len(steps) == 2 and steps[-1] == trained.step and steps[0] == trained.step // 2
    assert checkpoints.steps_of(run, METHODS["trackstar"]) == [trained.step]
    models = [run.at_step(s).trained.model for s in steps]
    a, b = (np.asarray(m.embedding.embedding[...]) for m in models[:2])
    assert not np.allclose(a, b)


def test_what_gradients_leave_out_is_told_once(traced, capsys):
    """Mistakes: layers silently left out."""
    run, *_ = traced
    plain, corrected = GradientKind(), GradientKind(corrected=True)
    encode.print_coverage(run, [plain, corrected, plain])
    (line,) = capsys.readouterr().out.splitlines()
    assert "left out: embedding/embedding, final_norm" in line
    run = changed(run, gradients__include=".")
    # EK-FAC has no factors for the look-up and the norms.
    encode.print_coverage(run, [plain, GradientKind(curvature="ekfac")])
    whole, factored = capsys.readouterr().out.splitlines()
    assert "left out: embedding" not in whole and "left out: embedding/embedding" in factored


def retrieve_several_kinds(traced, monkeypatch):
    """Retrieves by kinds of two functions at two checkpoints, into other stores than the run's.

    Returns the run, the rankings, and what was encoded, a description for each pass.
    """
    run, *_ = traced
    own = dataclasses.replace(METHODS["tracin"], title="corrected TracIn", corrected=True)
    monkeypatch.setitem(METHODS, "tracin_corrected", own)
    names = "exp2,exp3,trackstar,tracin,tracin_corrected,gradient_norm,trak"
    run = changed(run, gradients__exclude="mlp", methods=names)
    passes = []
    fill = encode.encoding.fill_stores

    def counted(stores, encoder, table, layout, description, *args, **options):
        if any(store.missing() for store in stores):
            passes.append(description)
        fill(stores, encoder, table, layout, description, *args, **options)

    monkeypatch.setattr(encode.encoding, "fill_stores", counted)
    return run, retrieve.retrieve(run)[0], passes


@pytest.mark.slow
def test_kinds_of_one_function_are_encoded_in_one_pass(traced, monkeypatch):
    """The last checkpoint's and an earlier one's, whichever rows want them; then nothing more."""
    run, _, passes = retrieve_several_kinds(traced, monkeypatch)
    first, last = checkpoints.steps_of(run, METHODS["tracin"])
    corpus_passes = [w for w in passes if w.startswith("encode corpus")]
    assert sorted(corpus_passes) == sorted(
        [f"encode corpus (none and factored, step {s})" for s in (first, last)]
        + [f"encode corpus (none, margin, step {s})" for s in (first, last)]
    )


@pytest.mark.slow  # as the encoder's own tests of several kinds say, with all the rest of a run
def test_rankings_are_those_of_kinds_that_are_encoded_one_by_one(traced, monkeypatch):
    run, together, _ = retrieve_several_kinds(traced, monkeypatch)
    monkeypatch.setattr(encode, "encode_together", lambda *args: None)
    other = Workdir(run.workdir.path.parent / "one by one")
    alone, _ = retrieve.retrieve(dataclasses.replace(run, workdir=other))
    for name, ranked in together.items():
        np.testing.assert_array_equal(ranked.proponents, alone[name].proponents)
        np.testing.assert_allclose(
            ranked.proponent_scores, alone[name].proponent_scores, rtol=1e-4, atol=1e-5
        )


def test_tracin_is_the_weighted_sum_over_checkpoints(traced):
    run, ranked, notes = traced
    steps = notes["tracin"]["checkpoints"]
    counts = checkpoints.weights(run, METHODS["tracin"], steps)
    assert counts.sum() == pytest.approx(1) and len(set(counts)) > 1
    expected = 0.0
    for step, count in zip(steps, counts, strict=True):
        p, q = rows(traced, GradientKind(), step)
        expected = expected + count * q @ p.T
    np.testing.assert_allclose(scores_of(ranked, "tracin"), expected, rtol=2e-3, atol=1e-3)


@pytest.mark.slow
def test_less_is_the_cosine_with_adams_steps(more):
    run, ranked, notes = more
    config, data, trained = run.config, run.corpus, run.trained
    steps = notes["less"]["checkpoints"]
    counts = checkpoints.weights(run, METHODS["less"], steps)
    everyone = np.arange(12)
    batch = batches.materialise(data.passages, everyone, 32, 12, data.tokenizer.pad).arrays()
    expected = 0.0
    for step, count in zip(steps, counts, strict=True):
        then = run.at_step(step)
        _, q = rows(more, GradientKind(), step)
        chosen = find_sites(then.trained.model)
        states = adam_steps.read(trained.root, chosen, step)
        assert float(states[chosen[0].path].count) == step
        whole = reference.per_example_gradients(then.trained.model, batch, _mean_losses)
        made = {s.path: adam_steps.adam_step(states[s.path], whole[s.path]) for s in chosen}
        made = reference.project(chosen, made, Projection(**dict(config.projection)))
        expected = expected + count * unit(q) @ unit(np.asarray(made, np.float64)).T
    np.testing.assert_allclose(scores_of(ranked, "less"), expected, rtol=1e-3, atol=1e-4)


def _mean_losses(model, batch):
    logits, weights = model(batch["tokens"]), batch["weights"]
    return losses.cross_entropy(logits, batch["targets"], weights) / weights.sum(axis=1)


@pytest.mark.slow
def test_trak_is_the_papers_formula(more):
    run, ranked, notes = more
    steps, margin = notes["trak"]["checkpoints"], GradientKind(output="margin")
    kernels, doubts = [], []
    for step in steps:
        p, q = rows(more, margin, step)
        slices = hessian.block_slices((16,) * (p.shape[1] // 16))
        white = whitened(p, slices)
        kernels.append(white(q) @ white(p).T)
        then = run.at_step(step)
        doubts.append(1 - vectors.probabilities(then))
    expected = np.mean(kernels, axis=0) * np.mean(doubts, axis=0)
    found = scores_of(ranked, "trak")
    np.testing.assert_allclose(found, expected, rtol=1e-2, atol=2e-3 * np.abs(expected).max())
    # Q matters: no two passages have the same.
    assert np.ptp(np.mean(doubts, axis=0)) > 1e-4


def test_probabilities_are_geometric_means(traced):
    run, *_ = traced
    data, trained = run.corpus, run.trained
    found = vectors.probabilities(run)
    batch = batches.materialise(data.passages, np.array([3]), 32, 1, data.tokenizer.pad)
    logits = np.asarray(trained.model(batch.tokens), np.float64)[0]
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    picked = log_p[np.arange(32), batch.targets[0]]
    mean = (picked * batch.weights[0]).sum() / batch.weights.sum()
    assert found[3] == pytest.approx(np.exp(mean), rel=1e-4)
    assert ((found > 0) & (found < 1)).all() and found.shape == (12,)


@pytest.mark.slow
def test_curvature_is_fitted_once_and_leaves_tables_out(more, monkeypatch):
    run, ranked, _ = more
    monkeypatch.setattr(kronecker, "covariances", None)
    for kind in ("ekfac", "logra"):
        what = METHODS[kind].gradients
        made = run.provenance(what)
        assert not any("embedding" in path for path in made["parameters"])
        p, q = rows(more, what)
        if kind == "ekfac":
            expected = q @ p.T
        else:
            slices = hessian.block_slices((16,) * (p.shape[1] // 16))
            white = whitened(p, slices)
            expected = white(q) @ white(p).T
        tolerance = dict(rtol=1e-2, atol=2e-3 * np.abs(expected).max())
        np.testing.assert_allclose(scores_of(ranked, kind), expected, **tolerance)
        # And not the plain gradients' scores.
        plain_p, plain_q = rows(more, GradientKind())
        rank = np.corrcoef((plain_q @ plain_p.T).ravel(), expected.ravel())[0, 1]
        assert rank < 0.999


def test_what_R_eval_is_made_of_changes_the_scores_but_not_much_else(traced):
    run, ranked, notes = traced
    names = ("trackstar_all", "trackstar_leave_one_out", "trackstar_disjoint")
    scores = [scores_of(ranked, n) for n in names]
    for i, name in enumerate(names):
        assert notes[name]["evaluation"] == name.removeprefix("trackstar_")
        assert 0 < notes[name]["lambda"] < 1 and "λ = " in retrieve.describe(notes[name])
        assert np.abs(scores[i]).max() <= 1 + 1e-5
        for other in scores[:i]:
            assert np.abs(scores[i] - other).max() > 1e-4


def test_a_product_without_the_query_is_searched_query_by_query(traced, capfd):
    names = "trackstar_all,trackstar_leave_one_out"
    keys = dict(hessian__structure="kronecker", hessian__component=1, projection__pooling="matrix")
    run = changed(traced[0], methods=names, **keys)
    retrieve.check_run(run)
    ranked, notes = retrieve.retrieve(run)
    shown = capfd.readouterr().err
    assert "search (trackstar_leave_one_out): 100%" not in shown  # one for each query
    assert "8.00/8.00" in shown.split("search (trackstar_all, trackstar_leave_one_out)")[-1]
    assert notes["trackstar_leave_one_out"]["evaluation"] == "leave_one_out"
    of_all, of_rest = (scores_of(ranked, n) for n in names.split(","))
    assert np.isfinite(of_rest).all() and np.abs(of_all - of_rest).max() > 1e-3


def test_queries_may_be_differentiated_by_another_function(traced, monkeypatch):
    """R_train is of the passages' losses, and R_eval of the queries' logits."""
    exp5 = dataclasses.replace(METHODS["exp5"], query_output="logit")
    monkeypatch.setitem(METHODS, "apart", exp5)
    names = "trackstar_query_logit,apart,exp5"
    run = changed(traced[0], methods=names, hessian__weight=0.5)
    ranked, notes = retrieve.retrieve(run)
    passages, queries_by_loss = rows(traced, GradientKind(corrected=True))
    store = run.store_path("corpus", GradientKind(corrected=True, output="logit"))
    assert not stores.exists(store)  # a store that nothing would read
    queries = rows(traced, GradientKind(corrected=True, output="logit"))[1]
    assert np.abs(queries - queries_by_loss).max() > 0.1 * np.abs(queries).max()

    def score(gradients, weight):
        whitened_pair = [], []
        for block in hessian.block_slices((16,) * (passages.shape[1] // 16)):
            evaluated, trained = gradients[:, block], passages[:, block]
            R = weight * evaluated.T @ evaluated / 4 + (1 - weight) * trained.T @ trained / 12
            values, directions = np.linalg.eigh(R)
            root = directions / np.sqrt(values + 1e-3 * values.mean()) @ directions.T
            for parts, x in zip(whitened_pair, (evaluated, trained), strict=True):
                parts.append(x @ root)
        whitened_queries, whitened_passages = (np.concatenate(x, axis=1) for x in whitened_pair)
        return unit(whitened_queries) @ unit(whitened_passages).T

    for name, gradients, weight in (
        ("trackstar_query_logit", queries, 0.5),
        ("apart", queries, 0.0),
        ("exp5", queries_by_loss, 0.0),
    ):
        np.testing.assert_allclose(
            scores_of(ranked, name), score(gradients, weight), atol=2e-3, err_msg=name
        )
    spectra = {notes[name]["spectra"] for name in names.split(",")}
    assert len(spectra) == 2  # another R_eval


def test_spectra_are_kept_beside_the_rankings(traced):
    run, _, notes = traced
    workdir = run.workdir
    with np.load(workdir / "retrieval" / notes["trackstar_all"]["spectra"]) as kept:
        spectra = dict(kept)
    p, q = rows(traced, GradientKind(corrected=True))
    assert len(spectra["blocks"]) == len(spectra["widths"]) == p.shape[1] // 16
    for name, x in (("train", p), ("evaluation", q)):
        values = spectra[name].reshape(-1, 16)
        assert (np.diff(values, axis=1) <= 1e-6 * values.max()).all()
        first = np.linalg.eigvalsh(x[:, :16].T @ x[:, :16] / len(x))[::-1]
        np.testing.assert_allclose(values[0], first, rtol=1e-3, atol=1e-5 * first.max())
    k = notes["trackstar_all"]["component"]
    weight = hessian.mixing_weight([spectra["train"]], [spectra["evaluation"]], k)
    assert notes["trackstar_all"]["lambda"] == pytest.approx(weight)


def test_controls_look_at_no_query(traced):
    run, ranked, _ = traced
    data = run.corpus
    p, _ = rows(traced, GradientKind())
    lengths = data.lengths
    for name, scores in (("gradient_norm", np.linalg.norm(p, axis=1)), ("length", lengths)):
        found = ranked[name]
        assert (found.proponents == found.proponents[0]).all()
        np.testing.assert_allclose(scores_of(ranked, name)[0], scores, rtol=1e-4)
    assert not (ranked["random"].proponents == ranked["random"].proponents[0]).all()


def test_hidden_states_are_means_over_tokens(traced):
    run, ranked, _ = traced
    data, trained = run.corpus, run.trained
    t, table = data.tokenizer, data.prompts
    for layer, name in (("last", "hidden_last"), ("middle", "hidden_middle")):
        pooler = vectors.make_pooler(run, layer)
        queries = vectors.hidden_states(run, pooler, layer, "queries")
        passages = vectors.hidden_states(run, pooler, layer, "corpus")
        tokens = table.tokens[table.starts[1] : table.starts[2]]
        model = trained.model
        whole = (
            model.hidden(tokens[None])
            if layer == "last"
            else model.residual_stream(tokens[None], model.layer_count // 2)
        )
        counted = ~np.isin(tokens, (t.bos, t.eos, t.pad))
        assert counted[-1] and not counted[0]  # the target's last token too
        expected = np.asarray(whole)[0][counted].mean(axis=0)
        np.testing.assert_allclose(queries[1], expected, rtol=1e-4, atol=1e-5)
        scores = unit(queries) @ unit(passages).T
        np.testing.assert_allclose(scores_of(ranked, name), scores, rtol=1e-3, atol=1e-5)


def test_annotated_sentences_are_the_labels(traced):
    run, ranked, _ = traced
    data = run.corpus
    for q, right in enumerate(data.correct["all"]):
        kept = ranked["annotated"].proponents[q]
        assert sorted(kept[kept >= 0]) == sorted(right)


def test_rows_that_differ_by_title_share_a_ranking(traced):
    run, ranked, _ = traced
    for name in ("proponents", "proponent_scores"):
        one, other = (getattr(ranked[n], name) for n in ("exp2", "grad_cos"))
        np.testing.assert_array_equal(one, other)


def test_two_names_of_one_method_share_a_file(traced):
    run, *_ = traced
    names = ("exp5", "trackstar_train", "exp4")
    files = {n: retrieve._file(run, Gradients(run), METHODS[n]) for n in names}
    assert files["exp5"] == files["trackstar_train"] != files["exp4"]


def test_a_second_run_reads_what_is_there(traced, monkeypatch):
    run, ranked, notes = traced
    for module, name in (
        (encode, "encode"),
        (checkpoints, "combined"),
        (exact.ExactSearch, "rank"),
        (by_score, "rank"),
    ):
        monkeypatch.setattr(module, name, None)
    again, told = retrieve.retrieve(run)
    assert told == notes and again.keys() == ranked.keys()


def test_candidates_spare_a_search_for_the_table(traced, monkeypatch):
    """A run with a second stage scans the store once for both, not once for each."""
    depths, rank = [], exact.ExactSearch.rank

    def counted(self, queries, scorers, k, *args, **kwargs):
        depths.append((sorted(scorers), k))
        return rank(self, queries, scorers, k, *args, **kwargs)

    monkeypatch.setattr(exact.ExactSearch, "rank", counted)
    # A weight of its own, so that no other test's rankings are found on disk.
    keys = dict(eval__top_k=3, rerank__passages=8, hessian__weight=0.31)
    alone = changed(traced[0], methods="trackstar,bm25", **keys)
    expected, notes_alone = retrieve.retrieve(alone)
    for name in expected:
        retriever = retriever_of(METHODS[name])(alone)
        file = retrieve._file(alone, retriever, METHODS[name])
        file.unlink()
        file.with_suffix(".json").unlink(missing_ok=True)
    together = changed(traced[0], methods="trackstar,exp2,rrf,bm25", **keys)
    ranked, notes = retrieve.retrieve(together)
    assert depths == [(["trackstar"], 3), (["trackstar"], 8), (["exp2"], 3)]
    assert notes["trackstar"]["lambda"] == notes_alone["trackstar"]["lambda"] == 0.31
    for name, ranking in expected.items():
        assert ranking.proponents.shape == (4, 3)
        jax.tree.map(np.testing.assert_array_equal, vars(ranked[name]), vars(ranking))
    # What an index finds depends on how many passages it is asked for.
    assert not Gradients(changed(together, search__index="scann")).same_for_every_k


def test_what_the_config_lacks_is_told(traced, monkeypatch):
    run, *_ = traced
    config = run.config
    config = config.copy_and_resolve_references()
    dense_only = methods.parse("dense")
    with pytest.raises(ValueError, match="needs --config.dense.model"):
        retrieve.check(config, dense_only)
    config.dense.model = "somewhere"
    monkeypatch.setattr(dense.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'tda-jax\[dense\]'"):
        retrieve.check(config, dense_only)
    config.hessian.evaluation = "some"
    with pytest.raises(ValueError, match="hessian.evaluation='some'"):
        retrieve.check(config, methods.parse("trackstar"))
    config.train.optimizer = "adafactor"
    with pytest.raises(ValueError, match="LESS steps by Adam.*train.optimizer=adafactor"):
        retrieve.check(config, methods.parse("less"))
    retrieve.check(config, methods.parse("tracin"))
