"""`experiments.trace` and `experiments.ask` from a pretrained model on."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

from experiments import ask, launch
from tda import results
from tda.data.rows import Question
from tda.live import finished_run
from tda.model import functional, generation, pretrained
from tda.run import corpus, stages, train
from tda.run.workdir import Workdir
from tda.training import checkpoint
from tests.data.test_pretrained_tokenizer import NAMES, byte_level
from tests.data.test_pretrained_tokenizer import write as write_tokenizer
from tests.experiments.test_trace import make_config
from tests.model import tiny_llama


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    found = tiny_llama.tensors(vocab_size=320)
    path = tiny_llama.write(tmp_path_factory.mktemp("model"), found, vocab_size=320)
    return write_tokenizer(path, byte_level(template=True), **NAMES)


def config_of(tmp_path, directory, **changes):
    c = make_config(tmp_path)
    c.model.pretrained = str(directory)
    c.methods = "grad_cos"
    c.eval.tail_patch_queries = 0
    c.train.update(changes)
    return c


def arrays(model):
    return functional.flat_parameters(functional.split(model)[1])


def test_a_pretrained_model_is_the_checkpoint_of_step_0(tmp_path, directory):
    config = config_of(tmp_path, directory, epochs=0.0)
    workdir = Workdir(tmp_path / "w")
    data = corpus.load(config, workdir)
    assert data.tokenizer.begin == (0,) and data.passages.tokens[0] == 0
    trained = train.train(config, data, workdir)
    assert trained.step == 0 and not checkpoint.has_optimizer(trained.root, 0)
    expected = arrays(pretrained.load(directory, quiet=True))
    for name, x in arrays(trained.model).items():
        np.testing.assert_array_equal(np.asarray(x), expected[name])
    with pytest.raises(ValueError, match=r"no optimizer state.*eval.tail_patch_queries=0"):
        train.restore_state(trained)
    # The same run is found finished; another model's files are another run.
    train.train(config, data, workdir)
    other = json.loads((directory / "config.json").read_text()) | {"pad_token_id": 12345}
    (directory / "config.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match="holds another run; its train differs in"):
        train.train(config, data, workdir)


def check_live(workdir, names):
    """Holds live answers to one of the run's queries against the run's own."""
    answers = finished_run.open_workdir(workdir)
    expected = {n: list(results.read(workdir / "results" / f"{n}.jsonl"))[1] for n in names}
    record = expected[names[0]]
    question = Question("", record["inputs_plaintext"], record["targets_plaintext"])
    found = answers.trace(lambda *told: None, question, names, 10)["methods"]
    for name, got in ((m["name"], m["record"]) for m in found):
        scores = expected[name]["proponent_scores"]
        scale = max(map(abs, scores))
        # The model is not trained: its gradients are alike, and R⁻¹ makes rounding larger.
        np.testing.assert_allclose(
            got["proponent_scores"], scores, rtol=2e-3, atol=1e-3 * scale, err_msg=name
        )
        assert got["proponent_ids"][0] == expected[name]["proponent_ids"][0]
    assert answers.complete(lambda *told: None, question.prompt, 2)["steps"]


@pytest.mark.slow
@pytest.mark.parametrize("epochs", [0.0, 6.0])
def test_the_whole_way(tmp_path, directory, epochs):
    config = config_of(tmp_path, directory, epochs=epochs)
    names = ["trackstar", "exp5", "grad_cos", "bm25", "hidden_last"]
    config.methods = ",".join(names)
    config.eval.tail_patch_queries = 2 if epochs else 0
    metrics = stages.trace(config, Workdir(tmp_path / "w"))[0]
    assert metrics.keys() == set(names)
    assert all(0 < m["mrr"] <= 1 for m in metrics.values())
    lines = (tmp_path / "w" / "results" / "trackstar.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert len(records) == 4 and all(len(r["proponents"]) == 10 for r in records)
    check_live(tmp_path / "w", names)
    if epochs:
        log = (tmp_path / "w" / "train.jsonl").read_text().splitlines()
        assert json.loads(log[-1])["loss"] < json.loads(log[0])["loss"]


def test_greedy_continuation_is_the_largest_logit_each_time(directory):
    model = pretrained.load(directory, quiet=True)
    ids = [0, 7, 40]
    found = generation.greedy(model, ids, 4)
    for i, token in enumerate(found):
        logits = model(np.asarray([ids + found[:i]], np.int32))
        assert token == int(np.argmax(logits[0, -1]))
    assert generation.greedy(model, ids, 4, stop=found[2]) == found[: found.index(found[2])]
    with pytest.raises(ValueError, match="there is no token to continue: give a prompt"):
        generation.greedy(model, [], 4)


class Says:
    """A tokenizer of characters, for a model that says one thing."""

    begin, end, eos, pad, vocab_size = (), (), 0, 0, 128

    def encode(self, texts):
        return [[ord(c) for c in t] for t in texts]

    def decode(self, ids):
        return "".join(map(chr, ids))


@pytest.mark.parametrize(
    ("said", "phrase"),
    [(" Bonn, in", "Bonn"), (" the end", "the end"), ("\n\nBonn.", "Bonn"), (" . . .", ". ")],
)
def test_what_the_model_says_is_a_phrase(monkeypatch, said, phrase):
    monkeypatch.setattr(generation, "greedy", lambda *_: [ord(c) for c in said])
    query = generation.continuation(None, Says(), "He was born in")
    assert query.target == phrase.strip()
    # The ids that the model produced, white space before the phrase with the prompt.
    prompt, target = query.tokens
    assert "".join(map(chr, target)).strip() == phrase.strip() and not chr(target[-1]).isspace()
    assert "".join(map(chr, prompt + target)) == ("He was born in" + said)[: len(prompt + target)]


def test_the_tokens_that_the_model_produced_are_traced(monkeypatch):
    """Guards: a continuation whose text has other tokens when it is encoded anew."""
    monkeypatch.setattr(generation, "greedy", lambda *_: [ord(c) for c in " Bonn, in"])
    queries = ask.as_queries(None, Says(), ["He was born in", "He died in"], [])
    assert [(q.id, q.prompt, q.target) for q in queries] == [
        ("0", "He was born in", "Bonn"),
        ("1", "He died in", "Bonn"),
    ]
    assert [bytes(q.tokens[1]) for q in queries] == [b"Bonn"] * 2
    assert bytes(queries[1].tokens[0]) == b"He died in "


def test_what_a_draw_must_hold_needs_a_draw(tmp_path):
    flags.FLAGS.mark_as_parsed()
    with flagsaver.flagsaver(keep="Bonn"), pytest.raises(ValueError, match="give --sample too"):
        ask.run(tmp_path / "w")
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(keep="(", sample=3), r"--keep='\(' is not a regular expression \(missing \)"),
        (dict(method="trackstar,exp3"), "--method=trackstar,exp3|unknown method"),
        (dict(method="bm25"), "--method=bm25 is not one of"),
        (dict(method="trackstar"), "R of 1 queries contains little"),
        (dict(correction="adams"), "unknown correction 'adams'"),
        (dict(correction="none"), "correction 'none' is not made from second moments"),
        (dict(method="grad_cos", moments=4), "--moments=4 has no effect with --method=grad_cos"),
        (dict(context=80), "--context=80 is beyond .* 64 positions; give --context=64"),
    ],
)
def test_what_needs_no_model_is_refused_before_it_is_loaded(
    tmp_path, monkeypatch, changes, message
):
    flags.FLAGS.mark_as_parsed()
    monkeypatch.setattr(ask.api, "load", None)
    described = SimpleNamespace(arguments={"max_positions": 64})
    monkeypatch.setattr(ask.pretrained, "inspect", lambda path: described)
    (tmp_path / "a.jsonl").write_text('{"text": "a"}')
    question = dict(model="absent", corpus=str(tmp_path / "a.jsonl"), prompt=["He was born in"])
    question["workdir"] = str(tmp_path / "w")
    with flagsaver.flagsaver(**question | changes), pytest.raises(ValueError, match=message):
        ask.main([])
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize("name", ["top_k", "side", "context", "tokens_per_batch", "moments"])
def test_a_count_of_nothing_is_refused_with_its_flag(name):
    flags.FLAGS.mark_as_parsed()
    with pytest.raises(flags.IllegalFlagValueError, match=name), flagsaver.flagsaver(**{name: 0}):
        pass


@pytest.mark.parametrize("start", [launch.start, launch.launch])
@pytest.mark.parametrize("place", ["file", "file/w"])
def test_every_main_refuses_a_file_as_its_workdir(tmp_path, monkeypatch, capsys, start, place):
    flags.FLAGS.mark_as_parsed()
    (tmp_path / "file").touch()
    monkeypatch.setattr(launch, "_start", lambda run, takes_config: run(["main"]))
    monkeypatch.setattr(launch.flags, "mark_flags_as_required", lambda _: None)
    monkeypatch.setattr(launch.preemption, "watch", lambda: None)
    with flagsaver.flagsaver(workdir=str(tmp_path / place)):
        with pytest.raises(SystemExit) as end:
            start(None)
    message = capsys.readouterr().err or end.value.code
    assert message.strip().endswith(f"{tmp_path}/file is a file; give a directory")
    assert message.startswith(f"error: --workdir={tmp_path}/{place} ")


def test_a_full_disk_is_told_with_what_to_do(tmp_path, monkeypatch):
    def fill_disk(_):
        raise OSError(28, "No space left on device")

    flags.FLAGS.mark_as_parsed()
    monkeypatch.setattr(launch, "_start", lambda run, takes_config: run(["ask"]))
    monkeypatch.setattr(launch.compilation_cache, "use", lambda _: None)
    with (
        flagsaver.flagsaver(workdir=str(tmp_path)),
        pytest.raises(SystemExit, match=r"is full: free some space and run the same command again"),
    ):
        launch.start(fill_disk)


def test_saying_nothing_is_told(monkeypatch):
    monkeypatch.setattr(generation, "greedy", lambda *_: [32, 10])
    with pytest.raises(ValueError, match="give a --target"):
        generation.continuation(None, Says(), "He was born in")
    with pytest.raises(ValueError, match="--target is given 1 times, --prompt 2 times"):
        ask.check_targets(["a", "b"], ["c"])
