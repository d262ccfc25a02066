"""Nothing of a folder or a pattern is left out without a word."""

import json

import pytest

from tda.data import corpora
from tda.data.corpora import CorpusError

LINE = '{"text": "Oslo"}\n'


def write(folder, *names, content=LINE):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return folder


def ids(source, **options):
    return [d.id for d in corpora.Corpus(source, **options)]


def test_links_to_folders_are_followed_and_each_folder_is_read_once(tmp_path):
    """Guards: pathlib's rglob, which passes over them."""
    corpus = write(tmp_path / "corpus", "a/x.jsonl", ".cache/x.jsonl")
    shards = write(tmp_path / "elsewhere", "y.jsonl", "deep/z.jsonl")
    for name, target in (("b", shards), ("c", shards), ("a/up", corpus), ("a/again", corpus / "a")):
        (corpus / name).symlink_to(target)
    assert ids(corpus) == ["a/x.jsonl:0", "b/deep/z.jsonl:0", "b/y.jsonl:0"]


@pytest.mark.parametrize("source", ["", "*.jsonl", "b.jsonl"])
def test_links_to_files_that_are_not_there_are_refused(tmp_path, source):
    write(tmp_path, "a.jsonl")
    (tmp_path / "b.jsonl").symlink_to("blobs/0123")
    with pytest.raises(CorpusError, match="b.jsonl is a link to blobs/0123, which is not there"):
        ids(tmp_path / source)


def test_folders_that_a_pattern_or_a_list_names(tmp_path):
    write(tmp_path, "a.jsonl", "more/b.jsonl")
    with pytest.warns(UserWarning, match=r"1 folders, such as \S+more, are left out; '\*\*'"):
        assert ids(f"{tmp_path}/*") == ["a.jsonl:0"]
    assert ids(f"{tmp_path}/**") == ["a.jsonl:0", "more/b.jsonl:0"]
    with pytest.raises(FileNotFoundError, match=r"more is a folder, not a file; .*/more/\*.jsonl"):
        ids([tmp_path / "a.jsonl", tmp_path / "more"])


def test_only_texts_about_a_corpus_are_no_part_of_it(tmp_path):
    about = ("README.txt", "readme_zh.txt", "LICENSE-APACHE-2.0.txt", "NOTICE", "Citation.txt")
    documents = ("licence_to_kill.txt", "notice-board.txt", "readme for cooks.txt")
    write(tmp_path, *about, *documents)
    assert ids(tmp_path) == [*documents]
    write(tmp_path / "rows", "citation.jsonl", "CHANGELOG.md")
    assert ids(tmp_path / "rows") == ["citation.jsonl:0"]


def test_folders_of_datasets_are_named(tmp_path):
    """Guards: state.json read as a corpus of JSON lines."""
    write(tmp_path, "wiki/data-00000-of-00001.arrow", "wiki/state.json")
    with pytest.raises(CorpusError, match=r"holds directories of `datasets`.* such as \S+wiki;"):
        ids(tmp_path)


@pytest.mark.parametrize("source", ["", b"a.jsonl"])
def test_a_source_that_is_no_name_is_refused(source):
    """Guards: the working directory read as the corpus."""
    with pytest.raises(CorpusError, match="is no corpus; give a path"):
        corpora.Corpus(source)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ("{", r"state.json cannot be read \(.*save_to_disk wrote"),
        ("{}", "state.json lacks '_data_files'"),
        ("[]", "state.json cannot be read"),
    ],
)
def test_damaged_states_of_datasets_are_named(tmp_path, state, message):
    write(tmp_path, "state.json", content=state)
    with pytest.raises(CorpusError, match=message):
        ids(tmp_path)
    write(tmp_path, "dataset_dict.json", content=json.dumps({"splits": ["train"]}))
    with pytest.raises(CorpusError, match=r"train/state.json cannot be read \(.*No such file"):
        ids(tmp_path)
