"""The TFDS form keeps every record as it is, in order, without TensorFlow."""

import subprocess
import sys

import pytest

from tda.facts.features import load_tfds
from tda.facts.trex.builder import Builder
from tests.facts.trex_files import FACTS, SENTENCES, write


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    paths = write(folder)
    return folder, paths, load_tfds("trex", folder, **paths)


def test_records_survive_with_none_and_falsy_values_apart(prepared):
    _, _, (sentences, facts) = prepared
    assert sentences == SENTENCES
    assert facts == FACTS


def test_order_is_that_of_the_files_not_a_shuffle_by_key(prepared):
    _, _, (sentences, _) = prepared
    ids = [sentence.sentence_id for sentence in SENTENCES]
    assert ids != sorted(ids)
    assert [sentence.sentence_id for sentence in sentences] == ids


def test_a_prepared_dataset_is_read_and_not_written_again(prepared, monkeypatch):
    folder, paths, (sentences, facts) = prepared

    def generate(self, split, files):
        raise AssertionError("generated again")

    monkeypatch.setattr(Builder, "_generate_examples", generate)
    again, facts_again = load_tfds("trex", folder, **paths)
    assert again == sentences
    assert facts_again == facts


def test_an_unknown_dataset_is_refused():
    with pytest.raises(ValueError, match="choose 'world_facts' or 'trex'"):
        load_tfds("c4", "/nowhere")


def test_tensorflow_is_never_imported(tmp_path):
    paths = write(tmp_path)
    # A module of that name on the path: importing it, which TFDS would forgive, leaves a trace.
    fake = tmp_path / "fake"
    fake.mkdir()
    (fake / "tensorflow.py").write_text(
        f"open({str(tmp_path / 'imported')!r}, 'w').close()\nraise ImportError\n"
    )
    code = (
        "import sys\n"
        f"sys.path.insert(0, {str(fake)!r})\n"
        "from tda.facts.features import load_tfds\n"
        f"sentences, facts = load_tfds('trex', {str(tmp_path)!r}, **{paths!r})\n"
        f"assert len(sentences) == {len(SENTENCES)} and 'tensorflow' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert not (tmp_path / "imported").exists()
