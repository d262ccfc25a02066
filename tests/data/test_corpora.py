"""Corpora of every kind give the same documents, and errors name what is wrong."""

import gzip
import json

import pytest
import tensorflow_datasets as tfds

from tda.data import corpora
from tda.data.corpora import CorpusError, Document

DOCUMENTS = [
    Document("a", "Oslo lies in Norway."),
    Document("b", "日本語 and é."),
    Document("c", "Two\n\nparagraphs."),
    Document("d", ""),
]
ROWS = [{"id": d.id, "text": d.text, "url": f"http://{d.id}"} for d in DOCUMENTS]


def arrow():
    return pytest.importorskip("pyarrow", reason="needs the extra `parquet`")


def jsonl(tmp_path, rows=ROWS, name="a.jsonl"):
    opened = gzip.open if name.endswith(".gz") else open
    with opened(tmp_path / name, "wt", encoding="utf-8") as out:
        out.writelines(json.dumps(r) + "\n" for r in rows)
    return tmp_path / name


def parquet(tmp_path, rows=ROWS):
    arrow()
    import pyarrow.parquet

    for i, some in enumerate((rows[:3], rows[3:])):
        table = pyarrow.Table.from_pylist(some)
        pyarrow.parquet.write_table(table, tmp_path / f"{i}.parquet", row_group_size=2)
    return tmp_path


def datasets(tmp_path, rows=ROWS):
    """What `Dataset.save_to_disk` writes: streams of Arrow batches, and a state that lists them."""
    pyarrow = arrow()
    files = []
    for i, some in enumerate((rows[:1], rows[1:])):
        table = pyarrow.Table.from_pylist(some)
        files.append({"filename": f"data-{i:05}-of-00002.arrow"})
        with pyarrow.OSFile(str(tmp_path / files[-1]["filename"]), "wb") as out:
            with pyarrow.ipc.new_stream(out, table.schema) as stream:
                stream.write_table(table, max_chunksize=2)
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": files}))
    (tmp_path / "dataset_info.json").write_text("{}")
    return tmp_path


@pytest.mark.parametrize("make", [jsonl, parquet, datasets])
def test_every_kind_is_known_by_its_files(tmp_path, make):
    assert list(corpora.documents(make(tmp_path))) == DOCUMENTS


def test_gzip_many_files_and_a_folder_of_texts(tmp_path):
    jsonl(tmp_path, ROWS[:2], "c4-0.json.gz")
    jsonl(tmp_path, ROWS[2:], "c4-1.json.gz")
    assert list(corpora.documents(tmp_path / "c4-*.json.gz")) == DOCUMENTS
    folder = tmp_path / "texts"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "b.txt").write_text("日本語", encoding="utf-8")
    (folder / "a.txt").write_text("Oslo\n")
    found = [Document("a.txt", "Oslo\n"), Document("deep/b.txt", "日本語")]
    assert list(corpora.documents(folder)) == found
    (folder / "a.txt").write_bytes(b"\xff")
    with pytest.raises(CorpusError, match=r"a.txt: not UTF-8"):
        list(corpora.documents(folder))


def test_documents_without_an_id_are_named_by_their_place(tmp_path):
    rows = [{"text": d.text, "timestamp": 0} for d in DOCUMENTS]
    found = list(corpora.documents(jsonl(tmp_path, rows)))
    assert [d.id for d in found] == [f"a.jsonl:{i}" for i in range(4)]
    found = list(corpora.documents(jsonl(tmp_path), text_field="url", id_field="text"))
    assert found[1] == Document("日本語 and é.", "http://b")
    numbered = [{"id": 7, "text": "x"}]
    assert list(corpora.documents(jsonl(tmp_path, numbered))) == [Document("7", "x")]


def test_splits_of_a_datasets_directory(tmp_path):
    arrow()
    (tmp_path / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        datasets(tmp_path / split, ROWS if split == "train" else ROWS[2:])
    assert list(corpora.documents(tmp_path)) == DOCUMENTS
    assert list(corpora.documents(tmp_path, split="test")) == DOCUMENTS[2:]
    with pytest.raises(CorpusError, match="no split 'dev'; there are train, test"):
        corpora.documents(tmp_path, split="dev").__next__()
    state = {"_data_files": [], "_indices_files": [{"filename": "indices.arrow"}]}
    (tmp_path / "train" / "state.json").write_text(json.dumps(state))
    with pytest.raises(CorpusError, match="is a selection of another dataset.s rows; write"):
        list(corpora.documents(tmp_path))


class TinyC4(tfds.core.GeneratorBasedBuilder):
    """A dataset with C4's fields, that of a document's id not among them."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        fields = {"text": tfds.features.Text(), "url": tfds.features.Text()}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(fields))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i, row in enumerate(ROWS):
            yield i, {"text": row["text"], "url": row["url"]}


def test_a_tfds_dataset_by_its_name(tmp_path):
    TinyC4(data_dir=str(tmp_path), file_format="array_record").download_and_prepare()
    found = list(corpora.documents("tiny_c4", data_dir=tmp_path))
    assert {d.text for d in found} == {d.text for d in DOCUMENTS}
    assert [d.id for d in found] == [f"tiny_c4/train:{i}" for i in range(4)]
    found = {d.id: d.text for d in corpora.documents("tiny_c4", data_dir=tmp_path, id_field="url")}
    assert found == {f"http://{d.id}": d.text for d in DOCUMENTS}
    with pytest.raises(CorpusError, match=r"no_such_set is no file, no directory and no TFDS"):
        list(corpora.documents("no_such_set", data_dir=tmp_path))
    versioned = list(corpora.documents("tiny_c4:1.0.0", data_dir=tmp_path))
    assert {d.text for d in versioned} == {d.text for d in DOCUMENTS}
    assert versioned[0].id == "tiny_c4:1.0.0/train:0"
    with pytest.raises(CorpusError, match=r"tiny_c4:2.0.0 is no file, no directory and no TFDS"):
        list(corpora.documents("tiny_c4:2.0.0", data_dir=tmp_path))


@pytest.mark.parametrize(
    "name", ["c4", "c4/en", "c4:3.0.1", "c4/en:3.0.1", "c4/en:3.*.*", "wikipedia/20220301.en",
             "wikipedia/20220301.en:1.0.0"],
)  # fmt: skip
def test_all_forms_of_a_tfds_name(monkeypatch, name):
    """Guards: a version, or a config with a dot, taken for a file's ending."""
    asked = []

    def data_source(name, split, data_dir):
        asked.append((name, split, data_dir))
        return [{"text": "x"}]

    monkeypatch.setattr(tfds, "data_source", data_source)
    assert list(corpora.documents(name)) == [Document(f"{name}/train:0", "x")]
    assert asked == [(name, "train", None)]


def test_what_looks_like_a_file_is_no_tfds_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c4").mkdir()
    for name in ("c4/part.csv", "a.csv", "./c4:3.0.1", str(tmp_path / "c4:3.0.1"), "a/b/c.csv"):
        with pytest.raises(FileNotFoundError, match="no such corpus"):
            corpora.documents(name)


@pytest.mark.parametrize(
    ("rows", "how", "message"),
    [
        ([{"content": "x"}], {}, r"a.jsonl, line 1: there is no field 'text'; the fields are con"),
        ([{"text": 5}], {}, "'text' is int, not a text"),
        ([[1]], {}, "a document must be an object, not list"),
        (ROWS, dict(id_field="uid"), "there is no field 'uid'"),
        (
            [*ROWS, {"text": "a \ud83d"}],
            {},
            r"a.jsonl, line 5: field 'text' has half a character, \\ud83d at 2 .*replace it",
        ),
        ([{"id": "\udc00", "text": "x"}], {}, "line 1: field 'id' has half a character"),
        (ROWS, dict(kind="csv"), "unknown kind of corpus 'csv'; use jsonl, parquet"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, rows, how, message):
    with pytest.raises(CorpusError, match=message):
        list(corpora.documents(jsonl(tmp_path, rows), **how))


def test_what_is_not_there_or_not_known(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing.jsonl"):
        list(corpora.documents(tmp_path / "nothing.jsonl"))
    with pytest.raises(FileNotFoundError, match="no such corpus"):
        list(corpora.documents(tmp_path / "nothing"))
    with pytest.raises(CorpusError, match=r"holds no .parquet file, no .txt file"):
        list(corpora.documents(tmp_path))
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(CorpusError, match="unknown kind of corpus; give kind="):
        list(corpora.documents(tmp_path / "a.csv"))
    parquet(tmp_path)
    (tmp_path / "0.parquet").write_bytes(b"PAR1")
    with pytest.raises(CorpusError, match=r"0.parquet is not a Parquet file"):
        list(corpora.documents(tmp_path))
    parquet(tmp_path)
    with pytest.raises(CorpusError, match="no column 'body'; the columns are id, text, url"):
        list(corpora.documents(tmp_path, text_field="body"))


def test_a_sample_is_of_the_whole_corpus_and_keeps_what_matches():
    """Guards: a sample that is the first rows of the corpus."""
    found = [
        Document(f"d{i}", f"text {i}" + (" Bonn" if i % 250 == 7 else "")) for i in range(1000)
    ]
    drawn = corpora.sample(iter(found), 100, keep="Bonn", seed=1)
    assert drawn == [d for d in found if d in drawn] and len(drawn) == 100
    assert {d.id for d in found if "Bonn" in d.text} <= {d.id for d in drawn}
    numbers = [int(d.id[1:]) for d in drawn]
    assert 350 < sum(numbers) / 100 < 650 and max(numbers) > 900
    # An order of documents that is another one draws the same of them.
    assert set(corpora.sample(found[::-1], 100, "Bonn", 1)) == set(drawn)
    assert corpora.sample(found, 100, "Bonn", 2) != drawn
    assert len(corpora.sample(found, 2, keep="Bonn")) == 4
    assert corpora.sample(found[:5], 100) == found[:5]
