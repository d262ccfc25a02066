"""What a run reads from outside its workdir is known by its contents, wherever it stands."""

import os

import pytest

from tda.run import defaults
from tda.sweep import digests
from tests.model import tiny_llama


@pytest.fixture
def config(tmp_path):
    """A config that names a file, a pattern, a model and a sentence encoder."""
    c = defaults.get_config()
    (tmp_path / "facts.jsonl").write_text("1\n")
    for i in range(2):
        (tmp_path / f"s{i}.jsonl").write_text(f"{i}\n")
    c.data.facts = str(tmp_path / "facts.jsonl")
    c.data.sentences = str(tmp_path / "s*.jsonl")
    c.model.pretrained = str(tiny_llama.write(tmp_path / "m", tiny_llama.tensors()))
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "weights.bin").write_text("w")
    c.dense.model = str(tmp_path / "e")
    c.methods = "trackstar,dense"
    return c


CHANGES = {
    "data.sentences": "s1.jsonl",
    "data.facts": "facts.jsonl",
    "model.pretrained": "m/model.safetensors",
    "dense.model": "e/weights.bin",
}


@pytest.mark.parametrize("key", CHANGES)
def test_what_changed_is_named(config, tmp_path, key):
    before = digests.digests(config)
    assert set(before) == set(CHANGES) and all(before.values())
    file = tmp_path / CHANGES[key]
    os.utime(file, ns=(1, 1))  # touched, it is the same
    assert digests.differing(before, digests.digests(config)) == []
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert digests.differing(before, digests.digests(config)) == [key]
    (tmp_path / CHANGES[key].split("/")[0]).rename(tmp_path / "gone")
    now = digests.digests(config)
    # One of two files of a pattern is another corpus; what is gone says nothing.
    assert digests.differing(before, now) == (["data.sentences"] if key == "data.sentences" else [])


@pytest.mark.parametrize(
    "changes, key, file",
    [
        # Two corpora, one with files below folders.
        ({"data.corpus": "s0.jsonl,deep/**/*.jsonl"}, "data.corpus", "deep/a/b/c.jsonl"),
        ({"data.corpus": "s0.jsonl,deep/**/*.jsonl"}, "data.corpus", "s0.jsonl"),
        ({"data.also_train_on": "s0.jsonl,s1.jsonl"}, "data.also_train_on", "s1.jsonl"),
        ({"data.corpus": "s0.jsonl", "data.queries": "s1.jsonl"}, "data.queries", "s1.jsonl"),
        ({"data.name": "lama", "data.dir": "lama"}, "data.dir", "lama/TREx/P1.jsonl"),
        ({"judge.name": "nli", "judge.model": "e"}, "judge.model", "e/weights.bin"),
    ],
)
def test_every_key_that_names_files_counts(config, tmp_path, monkeypatch, changes, key, file):
    """Mistake: figures of other contents that count as finished, and stand in one table."""
    monkeypatch.chdir(tmp_path)
    for name in ("deep/a/b/c.jsonl", "lama/relations.jsonl", "lama/TREx/P1.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1\n")
    config.data.sentences = config.data.facts = config.model.pretrained = ""
    config.methods = "trackstar"
    config.update_from_flattened_dict(changes)
    before = digests.digests(config)
    assert before[key]
    (tmp_path / file).write_text("another\n")
    assert digests.differing(before, digests.digests(config)) == [key]


def test_what_is_not_read_does_not_count(config):
    config.methods = "trackstar"
    config.model.pretrained = config.data.sentences = ""
    assert set(digests.digests(config)) == {"data.facts"}
    config.methods, config.dense.model = "dense", "a/name-on-the-hub"
    assert digests.digests(config)["dense.model"] is None
