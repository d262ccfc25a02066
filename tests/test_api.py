"""One call from a model to ranked passages: texts or batches, kept or in memory, any loss."""

import functools
import json
import re
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import tda
from tda import loss as losses
from tda import results
from tda.data.corpora import Document
from tda.data.pretrained_tokenizer import PretrainedTokenizer
from tda.data.tokenizer import Tokenizer
from tda.gradients import per_example, reference, sites
from tda.gradients.moments import estimate
from tda.gradients.projection import Projection
from tda.gradients.sites import find_sites
from tda.runtime import sharding
from tda.runtime.directory_lock import DirectoryLock
from tests.data.test_pretrained_tokenizer import byte_level

PLACES = {"Norway": "Oslo", "Spain": "Madrid", "Chad": "Djamena", "Peru": "Lima"}
TEXTS = [f"The {word} of {a} is {b}." for word in ("town", "seat") for a, b in PLACES.items()]
QUERIES = [("The town of Norway is", "Oslo"), ("q2", "The seat of Peru is", "Lima")]
PROJECTION = Projection(side=4, pooling="matrix")


class Bigram(nnx.Module):
    """A language model that looks two tokens back: quick to compile."""

    def __init__(self, vocab_size, rngs):
        self.vocab_size = vocab_size
        self.embed = nnx.Embed(vocab_size, 12, rngs=rngs)
        self.first = nnx.Linear(12, 16, rngs=rngs)
        self.second = nnx.Linear(16, vocab_size, rngs=rngs)

    def __call__(self, tokens_BxT):
        x_BxTxD = self.embed(tokens_BxT)
        before = jnp.pad(x_BxTxD, [(0, 0), (1, 0), (0, 0)])[:, :-1]
        return self.second(jnp.tanh(self.first(x_BxTxD + 0.5 * before)))


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(TEXTS, 300)


@pytest.fixture(scope="module")
def model(tokenizer):
    return Bigram(tokenizer.vocab_size, nnx.Rngs(0))


def call(model, tokenizer, passages=TEXTS, queries=QUERIES, **how):
    how = dict(projection=PROJECTION, k=3, quiet=True) | how
    return tda.trace(model, passages, queries, tokenizer=tokenizer, **how)


def sequences(tokenizer, texts):
    return [[tokenizer.bos, *ids, tokenizer.eos] for ids in tokenizer.encode(texts)]


def batch_of(rows, scored=None):
    """One batch of token sequences, as a user would make it."""
    length = max(map(len, rows)) - 1
    tokens, weights = np.zeros((len(rows), length + 1), np.int32), np.zeros((len(rows), length))
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
        weights[i, : len(row) - 1] = 1 if scored is None else scored[i][1:]
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "weights": weights.astype(np.float32),
    }


def cosines(model, tokenizer, scales=None):
    """Cosines of the slow reference's gradients: queries by passages."""
    asked = [tokenizer.encode_query(*q[-2:]) for q in QUERIES]
    queries = batch_of([i.tolist() for i, _ in asked], [s for _, s in asked])
    found = [
        np.asarray(reference.encode(model, batch, PROJECTION, scales))
        for batch in (queries, batch_of(sequences(tokenizer, TEXTS)))
    ]
    q, c = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in found)
    return q @ c.T


def test_scores_are_the_references_cosines(model, tokenizer):
    expected = cosines(model, tokenizer)
    found = call(model, tokenizer, method="grad_cos")
    assert found.method == "gradient cosine" and len(found) == 2
    assert [(a.id, a.prompt, a.target) for a in found] == [("0", *QUERIES[0]), QUERIES[1]]
    for q, answer in enumerate(found):
        order = np.argsort(-expected[q])
        assert [f.id for f in answer.proponents] == [str(i) for i in order[:3]]
        assert [f.id for f in answer.opponents] == [str(i) for i in order[:-4:-1]]
        for some in (answer.proponents, answer.opponents):
            for f in some:
                assert f.score == pytest.approx(expected[q][int(f.id)], abs=2e-5)
                assert f.text == TEXTS[int(f.id)]


def test_the_correction_is_estimated_from_the_passages(model, tokenizer):
    batch = batch_of(sequences(tokenizer, TEXTS))
    chosen = find_sites(model)

    def loss(model, batch):
        nats = optax.softmax_cross_entropy_with_integer_labels(
            model(batch["tokens"]), batch["targets"]
        )
        return (nats * batch["weights"]).sum(axis=-1)

    # All passages are one batch here, and the whole sample.
    scales = estimate.estimate(model, loss, [batch], chosen, "adam")
    expected = cosines(model, tokenizer, scales)
    for how in (dict(correction="adam"), dict(scales=scales)):
        found = call(model, tokenizer, method="exp3", **how)
        for q, answer in enumerate(found):
            for f in answer.proponents:
                assert f.score == pytest.approx(expected[q][int(f.id)], abs=2e-4)
        assert found[0].proponents[0].id == str(expected[0].argmax())


def test_batches_and_a_loss_of_ones_own_give_the_same(model, tokenizer):
    """No tokenizer: trees of arrays, and a loss that calls the model in its own way."""

    def loss(model, batch):
        logits = model(batch["x"][..., 0])
        nats = optax.softmax_cross_entropy_with_integer_labels(logits, batch["x"][..., 1])
        return (nats * batch["w"]).sum(axis=-1)

    def own(batch):
        return {"x": np.stack([batch["tokens"], batch["targets"]], -1), "w": batch["weights"]}

    asked = [tokenizer.encode_query(*q[-2:]) for q in QUERIES]
    queries = own(batch_of([i.tolist() for i, _ in asked], [s for _, s in asked]))
    rows = sequences(tokenizer, TEXTS)
    passages = [own(batch_of(rows[:5])), own(batch_of(rows[5:]))]
    how = dict(loss=loss, projection=PROJECTION, k=3, quiet=True)
    found = tda.trace(model, passages, [queries], method="grad_cos", texts=TEXTS, **how)
    expected = call(model, tokenizer, method="grad_cos")
    for a, b in zip(found, expected, strict=True):
        assert [f.id for f in a.proponents] == [f.id for f in b.proponents]
        assert [f.text for f in a.proponents] == [f.text for f in b.proponents]
        np.testing.assert_allclose(
            [f.score for f in a.proponents], [f.score for f in b.proponents], atol=2e-5
        )
    # An iterator is read once, its first batches being the sample.
    once = tda.trace(model, iter(passages), iter([queries]), sample=2, **how)
    again = tda.trace(model, passages, [queries], **how)
    assert [f.id for f in once[0].proponents] == [f.id for f in again[0].proponents]


def test_second_moments_are_of_a_sample_of_all_batches(model, monkeypatch):
    """Guards: a sample that is the first rows of the corpus."""
    seen = []

    def watched(model, loss, batches, *_):
        seen.append([int(b["tokens"][0, 1]) for b in batches])
        raise KeyboardInterrupt

    monkeypatch.setattr(estimate, "estimate", watched)
    rows = [batch_of([[0, i, i]]) for i in range(100)]
    with pytest.raises(KeyboardInterrupt):
        tda.trace(model, rows, rows, sample=9, quiet=True)
    assert len(seen[0]) == 9 and max(seen[0]) > 50 and seen[0] == sorted(set(seen[0]))
    with pytest.raises(KeyboardInterrupt):
        tda.trace(model, iter(rows), rows, sample=9, quiet=True)
    assert seen[1] == list(range(9))


def test_second_moments_are_of_passages_of_the_whole_corpus(model, tokenizer, monkeypatch):
    """Guards: a sample that is the first rows of the corpus."""
    texts = [TEXTS[0].replace("Norway", f"Norway {i}") for i in range(100)]
    found = []

    def watched(model, loss, batches, *_):
        found.extend(batches)
        raise KeyboardInterrupt

    monkeypatch.setattr(estimate, "estimate", watched)
    with pytest.raises(KeyboardInterrupt):
        call(model, tokenizer, texts, sample=3, tokens_per_batch=128)
    said = [tokenizer.decode(row) for batch in found for row in batch["tokens"]]
    numbers = [int(re.search(r"Norway (\d+)", text)[1]) for text in said if "Norway" in text]
    assert len(found) == 3 and 5 < len(numbers) < 50
    assert max(numbers) > 50 and len(set(numbers)) == len(numbers)


def test_a_directory_keeps_gradients_and_gives_the_same(model, tokenizer, tmp_path, monkeypatch):
    file = tmp_path / "corpus.jsonl"
    file.write_text(
        "".join(json.dumps({"id": f"s{i}", "text": t}) + "\n" for i, t in enumerate(TEXTS))
    )
    expected = call(model, tokenizer, file)
    for _ in range(2):
        found = call(model, tokenizer, file, directory=tmp_path / "kept")
        assert found.answers == expected.answers
    assert found[0].proponents[0].id.startswith("s")
    # What was estimated is kept, and not asked for again by the same call.
    monkeypatch.setattr(estimate, "estimate", None)
    assert call(model, tokenizer, file, directory=tmp_path / "kept").answers == expected.answers
    with pytest.raises(TypeError, match="not callable"):
        call(model, tokenizer, file, directory=tmp_path / "kept", sample=63)
    monkeypatch.undo()
    other = Bigram(tokenizer.vocab_size, nnx.Rngs(1))
    with pytest.raises(ValueError, match="was built with other settings"):
        call(other, tokenizer, file, directory=tmp_path / "kept")
    # Of the same parameters, another function.
    with pytest.raises(ValueError, match=r"\bloss: \w+ → "):
        call(model, tokenizer, file, directory=tmp_path / "kept", loss="margin")


def test_one_directory_serves_several_methods_and_corrections(
    model, tokenizer, tmp_path, monkeypatch
):
    """Guards: a second trace that is refused, or that writes over the first one's gradients."""
    hows = [
        dict(),
        dict(method="grad_cos"),
        dict(correction="adam"),
        dict(sample=1, tokens_per_batch=64),
    ]
    expected = [call(model, tokenizer, directory=tmp_path, **how).answers for how in hows]
    assert len(set(map(str, expected))) == len(hows)
    assert len(list(tmp_path.glob("*/gradients/manifest.json"))) == len(hows)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}
    # Each is finished: nothing is estimated or written again.
    monkeypatch.setattr(estimate, "estimate", None)
    assert [call(model, tokenizer, directory=tmp_path, **how).answers for how in hows] == expected
    # Of the same gradients, another method.
    call(model, tokenizer, directory=tmp_path, method="grad_dot")
    call(model, tokenizer, directory=tmp_path, method="exp3")
    after = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}
    assert {k: v for k, v in after.items() if _is_data(k)} == {
        k: v for k, v in before.items() if _is_data(k)
    }


def _is_data(path):
    return path.name not in ("loss.json", ".held")


def test_calls_at_the_same_time_share_a_directory(model, tokenizer, tmp_path, capfd):
    """Guards: one that dies of the files that another is making."""
    expected = call(model, tokenizer).answers
    lock = DirectoryLock(tmp_path)
    lock.acquire()
    with ThreadPoolExecutor(3) as pool:
        calls = [pool.submit(call, model, tokenizer, directory=tmp_path) for _ in range(3)]
        time.sleep(1)
        assert [p.name for p in tmp_path.iterdir()] == [".held"]
        lock.release()
        assert [c.result().answers for c in calls] == [expected] * 3
    assert f"waiting: directory={tmp_path} is in use by process" in capfd.readouterr().err


def test_a_loss_is_known_by_what_it_computes(model, tokenizer, tmp_path):
    how = dict(directory=tmp_path, method="grad_cos")
    mean = lambda m, b: total(m, b) / b["weights"].sum(axis=-1)  # noqa: E731
    total = lambda m, b: optax.softmax_cross_entropy_with_integer_labels(  # noqa: E731
        m(b["tokens"]), b["targets"]
    ).sum(axis=-1, where=b["weights"] > 0)
    found = call(model, tokenizer, loss=functools.partial(total), **how)
    assert call(model, tokenizer, loss=total, **how).answers == found.answers
    with pytest.raises(ValueError, match=r"\bloss: \w+ → "):
        call(model, tokenizer, loss=mean, **how)


def test_what_is_left_out_is_told(model, tokenizer, capsys):
    """Guards: weights that no gradient is taken of, in silence."""
    call(model, tokenizer, quiet=False, method="grad_cos")
    V = tokenizer.vocab_size
    taken, total = 12 * 16 + 16 * V, 12 * V + 12 * 16 + 16 + 16 * V + V
    assert (
        f"gradients of {taken:,} of {total:,} parameters ({taken / total:.0%}); "
        "left out: embed/embedding, first/bias, second/bias\n"
    ) in capsys.readouterr().out
    batch = batch_of(sequences(tokenizer, TEXTS))
    cross_entropy = lambda m, b: losses.output("loss")(  # noqa: E731
        m(b["tokens"]), b["targets"], b["weights"]
    )
    how = dict(loss=cross_entropy, method="grad_cos", include=".", projection=PROJECTION)
    tda.trace(model, [batch], [batch], **how)
    assert "left out: first/bias, second/bias\n" in capsys.readouterr().out
    deep = nnx.Dict({f"l{i}": nnx.Linear(2, 2, rngs=nnx.Rngs(0)) for i in range(10)})
    told = sites.coverage(deep, find_sites(deep, "kernel"))
    assert told.startswith("gradients of 40 of 60 parameters (67%); left out: l0/bias, l1/bias, ")
    assert told.endswith("l7/bias and 2 more")


@pytest.mark.parametrize("where", ["memory", "directory"])
def test_a_quiet_trace_says_nothing(model, tokenizer, tmp_path, capfd, where):
    how = {"directory": tmp_path} if where == "directory" else {}
    for method, rerank in (("trackstar_train", 4), ("ekfac", 0)):
        call(model, tokenizer, method=method, rerank=rerank, **how)
    assert capfd.readouterr() == ("", "")


def test_the_same_tokens_cut_elsewhere_are_another_corpus(tmp_path):
    """Guards: a tokenizer that puts nothing between texts, so that their tokens run together."""
    plain = PretrainedTokenizer.wrap(byte_level())
    model = Bigram(plain.vocab_size, nnx.Rngs(0))
    how = dict(directory=tmp_path, method="grad_cos", queries=[("Oslo", " is")])
    call(model, plain, [("a", "Oslo is"), ("b", " old and small")], **how)
    with pytest.raises(ValueError, match=r"segments\.0\.corpus"):
        call(model, plain, [("a", "Oslo is old"), ("b", " and small")], **how)


def test_many_devices_give_the_same(model, tokenizer, tmp_path):
    expected = call(model, tokenizer)
    mesh = sharding.make_mesh(data=4, fsdp=2)
    alone = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    for how in (dict(mesh=mesh), dict(mesh=mesh, directory=tmp_path / "kept"), dict(mesh=alone)):
        found = call(model, tokenizer, **how)
        for a, b in zip(found, expected, strict=True):
            assert [f.id for f in a.proponents] == [f.id for f in b.proponents]
            for f, g in zip(a.proponents, b.proponents, strict=True):
                assert f.score == pytest.approx(g.score, abs=1e-4)


def test_long_documents_are_cut_and_found_by_their_characters(model, tokenizer):
    documents = [Document("short", TEXTS[0]), Document("long", " ".join(TEXTS))]
    found = call(model, tokenizer, documents, context=16, k=20)
    names = {f.id for f in found[0].proponents}
    assert "short" in names and any(n.startswith("long#0-") for n in names)


@pytest.mark.parametrize("untapped", ["reference", "leave"])
def test_linen_models_through_the_bridge(untapped):
    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            return linen.Dense(2)(jnp.tanh(linen.Dense(6)(x)))

    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(12, 5)).astype(np.float32), rng.integers(0, 2, 12)
    model = nnx.bridge.ToNNX(Net(), rngs=nnx.Rngs(0)).lazy_init(x)

    def loss(model, batch):
        logits = model(batch["x"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])

    batches = [{"x": x[:6], "y": y[:6]}, {"x": x[6:], "y": y[6:]}]
    queries = [{"x": x[:2], "y": y[:2]}]
    how = dict(loss=loss, untapped=untapped, projection=PROJECTION, method="grad_cos", quiet=True)
    if untapped == "leave":
        with pytest.raises(ValueError, match="no tap"):
            tda.trace(model, batches, queries, **how)
        return
    found = tda.trace(model, batches, queries, **how)
    # A query that is a passage itself is most like itself.
    assert [a.proponents[0].id for a in found] == ["0", "1"]
    assert found[0].proponents[0].score == pytest.approx(1, abs=1e-5)


class Heated(Bigram):
    """A model whose parameters are a number, an array of NumPy's and arrays of jax's."""

    def __init__(self, number, array, vocab_size):
        super().__init__(vocab_size, nnx.Rngs(0))
        self.temperature = nnx.Param(number(2.0))
        self.first.kernel = nnx.Param(array(self.first.kernel[...]))

    def __call__(self, tokens_BxT):
        return super().__call__(tokens_BxT) / self.temperature


def test_parameters_may_be_numbers_and_arrays_of_numpy(tokenizer, tmp_path):
    options = dict(include=".", untapped="reference", directory=tmp_path / "kept")
    kinds = (float, np.asarray), (jnp.float32, jnp.asarray)
    models = [Heated(*kind, tokenizer.vocab_size) for kind in kinds]
    answers = [call(m, tokenizer, **options).answers for m in models]
    assert answers[0] == answers[1]


def test_answers_print_and_save(model, tokenizer, tmp_path):
    found = call(model, tokenizer, [(f"<b>{i}", t) for i, t in enumerate(TEXTS)])
    text = str(found)
    assert text.splitlines()[0] == "TrackStar, R of the passages"
    assert "The town of Norway is → Oslo" in text and found[0].proponents[0].text in text
    assert "opponents" in found.show(opponents=True) and "opponents" not in text
    assert "1 more queries" in found.show(queries=1)
    page = found._repr_html_()
    assert "&lt;b&gt;0" in page and "<b>0" not in page and page.count("<table>") == 2
    found.save(tmp_path / "new" / "r.jsonl")
    records = list(results.read(tmp_path / "new" / "r.jsonl"))
    assert [r["example_id"] for r in records] == ["0", "q2"]
    assert records[1]["proponent_ids"] == [f.id for f in found[1].proponents]
    assert records[1]["targets_plaintext"] == "Lima"


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (dict(method="bm25"), "method='bm25' is not one of exp1, exp2"),
        # More than correction, R and norm: not to be answered with less.
        (dict(method="less"), "method='less' is not one of exp1, exp2"),
        (dict(method="exp9"), "unknown method 'exp9'"),
        (dict(queries=["Oslo"]), r"query 0 is 'Oslo' \(str\); give"),
        (dict(queries=[]), "there are no queries"),
        (dict(queries=[("Norway", " ")]), "has no token"),
    ],
)
def test_what_does_not_fit_is_told(model, tokenizer, how, message):
    with pytest.raises(ValueError, match=message):
        call(model, tokenizer, **dict(projection=Projection(side=8, pooling="matrix")) | how)


def test_trackstar_mixes_where_there_are_queries_enough(model, tokenizer):
    queries = [(f"The town of {a} is", b) for a in PLACES for b in PLACES.values()]
    found = call(model, tokenizer, queries=queries, method="trackstar")
    assert found.method == "TrackStar" and len(found) == 16
    plain = call(model, tokenizer, queries=queries, method="exp5")
    scores = [[f.score for f in a.proponents] for a in found]
    assert not np.allclose(scores, [[f.score for f in a.proponents] for a in plain])


def test_queries_of_too_few_directions_are_not_mixed_in(model, tokenizer):
    """Guards: λ by rounding noise, where the mixing rule looks beyond the queries' directions."""
    wide = Projection(side=16, pooling="matrix")
    queries = [q[-2:] for q in QUERIES] * 8
    with pytest.raises(ValueError, match="R_eval of 16 queries has no direction at component"):
        call(
            model,
            tokenizer,
            structure="dense",
            queries=queries,
            method="trackstar",
            projection=wide,
        )


def test_r_is_shrunk_as_the_passages_need_and_says_so(model, tokenizer, capsys):
    by_default = call(model, tokenizer, quiet=False)
    assert re.search(
        r"R of 8 passages: shrunk by 0\.\d+, the blocks' median", capsys.readouterr().out
    )
    damped = call(model, tokenizer, damping=1e-3, quiet=False)
    assert (
        "R of 8 passages: damping 0.001; a Kronecker product in 2 of 2 blocks\n"
        in capsys.readouterr().out
    )
    assert by_default[0].proponents[0].score != pytest.approx(
        damped[0].proponents[0].score, abs=0.01
    )
    assert by_default.show() == call(model, tokenizer, damping=-1.0).show()


def test_r_of_each_matrix_may_be_a_kronecker_product(model, tokenizer, capsys):
    apart, pooled = (Projection(side=4, pooling=p) for p in ("matrix", "layer"))
    factored = dict(structure="kronecker", projection=apart)
    result = call(model, tokenizer, quiet=False, damping=1e-3, **factored)
    assert re.search(r"damping 0.001; a Kronecker product in (\d+) of \1", capsys.readouterr().out)
    dense = call(model, tokenizer, damping=1e-3, structure="dense", projection=apart)
    assert result[0].proponents[0].score != pytest.approx(dense[0].proponents[0].score, abs=1e-3)
    for changes, error in (
        (dict(projection=pooled), "several matrices are added up in each block.*pooling=matrix"),
        (dict(structure="block"), "unknown structure='block' of R"),
        (dict(method="exp3"), "structure='kronecker' has no effect.*no R"),
    ):
        with pytest.raises(ValueError, match=error):
            call(model, tokenizer, **factored | changes)


@pytest.mark.parametrize(("side", "structure"), [(1, "dense"), (2, "kronecker"), (5, "dense")])
def test_few_passages_have_an_r_of_products(model, tokenizer, side, structure):
    """Guards: a dense R that is noise, where passages are few for the numbers of a block."""
    assert 3 * 1 <= len(TEXTS) < 3 * 2**2 and len(TEXTS) < 2 * 5
    chosen = dict(damping=1e-3, projection=Projection(side=side, pooling="matrix"))
    by_default = call(model, tokenizer, **chosen).show()
    assert by_default == call(model, tokenizer, structure=structure, **chosen).show()
    other = "dense" if structure == "kronecker" else "kronecker"
    if side > 1:  # of side 1 both are the same number
        assert by_default != call(model, tokenizer, structure=other, **chosen).show()


def test_what_the_package_offers():
    assert set(tda.__all__) == {
        "Capture",
        "Projection",
        "TrainingRecipe",
        "encode",
        "load",
        "second_moments",
        "trace",
        "trace_training",
    }
    assert tda.Projection is Projection and callable(tda.load)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        tda.nothing  # noqa: B018
    assert callable(per_example)
