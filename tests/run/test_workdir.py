"""A workdir belongs to one run: another run is told which key of its config differs."""

import pytest

from tda.run import defaults, stages
from tda.run.workdir import Workdir, WorkdirError
from tda.runtime.directory_lock import HeldError

MADE_FROM = {"text": "3f", "model": {"width": 128, "layers": 4, "heads": 4}, "steps": 7}


@pytest.fixture
def claimed(tmp_path):
    workdir = Workdir(tmp_path)
    workdir.claim("train", MADE_FROM, defaults.get_config())
    return workdir


def message_of(workdir, made_from, **changes):
    config = defaults.get_config()
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    with pytest.raises(WorkdirError) as refused:
        workdir.claim("train", MADE_FROM | made_from, config)
    first, *lines, last = str(refused.value).splitlines()
    assert first == f"{workdir.path} holds another run; its train differs in"
    assert last == "use another --workdir for this config, or remove that directory to start anew"
    return lines


def test_a_changed_key_is_named_and_not_what_follows_from_it(claimed):
    larger = {"model": {"width": 192, "layers": 6, "heads": 3}, "steps": 9}
    assert message_of(claimed, larger, model__size="mini") == ["  model.size: tiny → mini"]
    # Keys of other sections train no other model.
    lines = message_of(claimed, {"text": "9b"}, data__n_sentences=5, eval__queries=3)
    assert lines == ["  data.n_sentences: 0 → 5"]


def test_files_with_other_contents_are_named(claimed):
    assert message_of(claimed, {"text": "9b", "steps": 8}) == [
        "  the contents of data.sentences, data.facts or data.corpus"
    ]


def test_another_version_of_the_code_is_named_by_its_values(claimed):
    wider = {"model": MADE_FROM["model"] | {"width": 256, "window": 8}}
    assert message_of(claimed, wider) == ["  model.width: 128 → 256", "  model.window: absent → 8"]


def test_the_same_run_resumes_and_finishes(claimed):
    assert not claimed.is_finished("train", MADE_FROM)
    claimed.claim("train", MADE_FROM, defaults.get_config())
    claimed.finish("train")
    assert claimed.is_finished("train", MADE_FROM)
    assert not claimed.is_finished("train", MADE_FROM | {"steps": 8})


def test_a_second_job_is_refused_and_readers_are_not(tmp_path):
    """Guards: two jobs that race for the same files, of which one dies of a missing one."""
    config = defaults.get_config()
    config.data.sentences = config.data.facts = str(tmp_path / "none.jsonl")
    (tmp_path / "none.jsonl").touch()
    workdir = Workdir(tmp_path)
    with workdir.hold():
        with pytest.raises(HeldError, match=f"--workdir={tmp_path} is in use by process"):
            stages.trace(config, Workdir(tmp_path))
        assert not Workdir(tmp_path).is_finished("train", MADE_FROM)
    with workdir.hold():
        pass


def test_object_storage_is_refused_as_a_workdir_and_taken_for_stores(tmp_path, monkeypatch):
    """Guards: a local directory named gs: that is found out hours later."""
    monkeypatch.chdir(tmp_path)
    for address in ("gs://bucket/run", "s3://bucket/run", "file:///run"):
        with pytest.raises(WorkdirError, match=f"--config.store.root={address}$"):
            Workdir(address)
    config = defaults.get_config()
    (tmp_path / "file").touch()
    refused = {"ftp://host/run": "use a local path, gs://BUCKET", "file/run": "cannot write"}
    for root, message in refused.items():
        config.store.root = root
        with pytest.raises(ValueError, match=message):
            stages.prepare(config, Workdir(tmp_path / "w"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "w"]
