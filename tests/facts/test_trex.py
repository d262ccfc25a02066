"""The builder of the release: which files it fetches, and local files in their place."""

import pytest

from tda.data.jsonl import RecordError
from tda.facts.features import load_tfds, read_prepared
from tda.facts.trex.builder import Builder
from tests.facts.trex_files import FACTS, SENTENCES, write

RELEASE = "https://storage.googleapis.com/tda-resources/2410.17413/public/"


class FakeDownloads:
    """Stands in for the download manager: remembers the addresses, answers with local files."""

    downloaded_size = 0

    def __init__(self, paths):
        self._paths = paths
        self.urls = None

    def download(self, urls):
        """Returns local paths in place of the addresses."""
        self.urls = urls
        return self._paths


@pytest.mark.parametrize(
    ("config", "facts_file"), [("sample", "trex_facts_sample.jsonl"), ("full", "trex_facts.jsonl")]
)
def test_release_is_fetched_from_its_public_addresses(tmp_path, monkeypatch, config, facts_file):
    downloads = FakeDownloads(write(tmp_path))
    builder = Builder(data_dir=str(tmp_path), config=config, file_format="array_record")
    monkeypatch.setattr(builder, "_make_download_manager", lambda **_: downloads)
    builder.download_and_prepare()
    assert downloads.urls["facts"] == RELEASE + facts_file
    assert len(downloads.urls["sentences"]) == 20
    assert downloads.urls["sentences"][0] == RELEASE + "trex_sentences.jsonl-00000-of-00020"
    assert downloads.urls["sentences"][19] == RELEASE + "trex_sentences.jsonl-00019-of-00020"
    sentences, facts = read_prepared(builder)
    assert (sentences, facts) == (SENTENCES, FACTS)


def test_local_files_of_different_content_do_not_mix(tmp_path):
    paths = write(tmp_path)
    sentences, _ = load_tfds("trex", tmp_path / "out", **paths)
    file = tmp_path / "sentences.jsonl-0"
    file.write_text(file.read_text().replace("France", "Gaul"))
    changed, _ = load_tfds("trex", tmp_path / "out", **paths)
    assert "France" in sentences[0].text
    assert "Gaul" in changed[0].text


def test_a_bad_record_stops_the_build_and_leaves_nothing(tmp_path):
    paths = write(tmp_path)
    (tmp_path / "sentences.jsonl-1").write_text('{"sentence_id": "s"}\n')
    for _ in range(2):
        with pytest.raises(RecordError, match="sentences.jsonl-1, line 1: field 'text' is missing"):
            load_tfds("trex", tmp_path / "out", **paths)


def test_contradictory_arguments_are_refused(tmp_path):
    paths = write(tmp_path)
    with pytest.raises(ValueError, match="both sentences= and facts="):
        Builder(data_dir=str(tmp_path), sentences=paths["sentences"])
    with pytest.raises(ValueError, match="config="):
        Builder(data_dir=str(tmp_path), config="full", **paths)
    with pytest.raises(FileNotFoundError):
        Builder(data_dir=str(tmp_path), sentences="absent.jsonl", facts=paths["facts"])
