"""Corpora of every kind give the same documents, and errors name what is wrong."""

import csv
import gzip
import json

import pytest
import tensorflow_datasets as tfds

from tda.data import corpora
from tda.data.corpora import CorpusError, Document
from tda.data.pieces import Piece

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
    assert list(corpora.Corpus(make(tmp_path))) == DOCUMENTS


def test_gzip_many_files_and_a_folder_of_texts(tmp_path):
    jsonl(tmp_path, ROWS[:2], "c4-0.json.gz")
    jsonl(tmp_path, ROWS[2:], "c4-1.json.gz")
    assert list(corpora.Corpus(tmp_path / "c4-*.json.gz")) == DOCUMENTS
    folder = tmp_path / "texts"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "b.txt").write_text("日本語", encoding="utf-8")
    (folder / "a.txt").write_text("Oslo\n")
    found = [Document("a.txt", "Oslo\n"), Document("deep/b.txt", "日本語")]
    assert list(corpora.Corpus(folder)) == found
    (folder / "a.txt").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"a.txt, line 1: not UTF-8"):
        list(corpora.Corpus(folder))


def test_documents_without_an_id_are_named_by_their_place(tmp_path):
    rows = [{"text": d.text, "timestamp": 0} for d in DOCUMENTS]
    found = list(corpora.Corpus(jsonl(tmp_path, rows)))
    assert [d.id for d in found] == [f"a.jsonl:{i}" for i in range(4)]
    found = list(corpora.Corpus(jsonl(tmp_path), text_field="url", id_field="text"))
    assert found[1] == Document("日本語 and é.", "http://b")
    numbered = [{"id": 7, "text": "x"}]
    assert list(corpora.Corpus(jsonl(tmp_path, numbered))) == [Document("7", "x")]


def test_splits_of_a_datasets_directory(tmp_path):
    arrow()
    (tmp_path / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        datasets(tmp_path / split, ROWS if split == "train" else ROWS[2:])
    assert list(corpora.Corpus(tmp_path)) == DOCUMENTS
    assert list(corpora.Corpus(tmp_path, split="test")) == DOCUMENTS[2:]
    with pytest.raises(CorpusError, match="no split 'dev'; there are train, test"):
        list(corpora.Corpus(tmp_path, split="dev"))
    state = {"_data_files": [], "_indices_files": [{"filename": "indices.arrow"}]}
    (tmp_path / "train" / "state.json").write_text(json.dumps(state))
    with pytest.raises(CorpusError, match="is a selection of another dataset.s rows; write"):
        list(corpora.Corpus(tmp_path))


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


def test_the_hugging_face_copy_of_c4(tmp_path):
    """Guards: validation shards read as training text; ids that a copy elsewhere does not have."""
    for split in ("train", "validation"):
        for i in range(2):
            row = {
                "text": f"{split} {i}",
                "timestamp": "2019-04-25T12:57:54Z",
                "url": f"http://{i}",
            }
            jsonl(tmp_path, [row, row], f"c4-{split}.{i:05d}-of-00002.json.gz")
    with pytest.warns(UserWarning, match="the split 'train' is read"):
        documents = list(corpora.Corpus(tmp_path))
    assert [d.id for d in documents] == [
        f"c4-train.{i:05d}-of-00002.json.gz:{row}" for i in (0, 1) for row in (0, 1)
    ]
    assert {d.text for d in documents} == {"train 0", "train 1"}


def test_a_tfds_dataset_by_its_name(tmp_path, monkeypatch):
    TinyC4(data_dir=str(tmp_path), file_format="array_record").download_and_prepare()
    found = list(corpora.Corpus("tiny_c4", data_dir=tmp_path))
    assert {d.text for d in found} == {d.text for d in DOCUMENTS}
    assert [d.id for d in found] == [f"tiny_c4/train:{i}" for i in range(4)]
    found = {d.id: d.text for d in corpora.Corpus("tiny_c4", data_dir=tmp_path, id_field="url")}
    assert found == {f"http://{d.id}": d.text for d in DOCUMENTS}
    with pytest.raises(CorpusError, match=r"no_such_set is no file, no directory and no TFDS"):
        list(corpora.Corpus("no_such_set", data_dir=tmp_path))
    with pytest.raises(CorpusError, match=r"no_such_set is no file, no directory and no TFDS"):
        list(corpora.Corpus("no_such_set", data_dir=tmp_path).files)
    corpus = corpora.Corpus("tiny_c4", data_dir=tmp_path)
    assert len(corpus.files) == 1 and corpus.pieces == [Piece(tuple(corpus.files), 4)]
    monkeypatch.setattr(corpora, "_PIECE_ROWS", 3)
    described = json.dumps(corpora.Corpus("tiny_c4", data_dir=tmp_path).as_json())
    corpus = corpora.Corpus(**json.loads(described))
    assert [piece.size for piece in corpus.pieces] == [3, 1]
    assert [d for i in (0, 1) for d in corpus.read(i)] == list(corpus)
    versioned = list(corpora.Corpus("tiny_c4:1.0.0", data_dir=tmp_path))
    assert {d.text for d in versioned} == {d.text for d in DOCUMENTS}
    assert versioned[0].id == "tiny_c4:1.0.0/train:0"
    with pytest.raises(CorpusError, match=r"tiny_c4:2.0.0 is no file, no directory and no TFDS"):
        list(corpora.Corpus("tiny_c4:2.0.0", data_dir=tmp_path))


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
    assert list(corpora.Corpus(name)) == [Document(f"{name}/train:0", "x")]
    assert asked == [(name, "train", None)]


def test_what_looks_like_a_file_is_no_tfds_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c4").mkdir()
    for name in ("c4/part.csv", "a.csv", "./c4:3.0.1", str(tmp_path / "c4:3.0.1"), "a/b/c.csv"):
        with pytest.raises(FileNotFoundError, match="no such"):
            corpora.Corpus(name)


@pytest.mark.parametrize(
    ("rows", "how", "message"),
    [
        ([{"content": "x"}], {}, r"a.jsonl, line 1: there is no field 'text'; the fields are con"),
        ([{"text": 5}], {}, "'text' is int, not a text"),
        ([[1]], {}, "item 0: a document must be an object, not int"),
        (ROWS, dict(id_field="uid"), "there is no field 'uid'"),
        (
            [*ROWS, {"text": "a \ud83d"}],
            {},
            r"a.jsonl, line 5: field 'text' has half a character, \\ud83d at 2 .*replace it",
        ),
        ([{"id": "\udc00", "text": "x"}], {}, "line 1: field 'id' has half a character"),
        (ROWS, dict(kind="xml"), "unknown kind of corpus 'xml'; use jsonl, csv, parquet"),
        (ROWS, dict(duplicate_ids="drop"), "duplicate_ids='drop'; use refuse or number"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, rows, how, message):
    with pytest.raises(CorpusError, match=message):
        list(corpora.Corpus(jsonl(tmp_path, rows), **how))


def test_what_is_not_there_or_not_known(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing.jsonl"):
        list(corpora.Corpus(tmp_path / "nothing.jsonl"))
    with pytest.raises(FileNotFoundError, match="no such corpus"):
        list(corpora.Corpus(tmp_path / "nothing"))
    with pytest.raises(CorpusError, match=r"holds no file of a corpus that is known: nothing"):
        list(corpora.Corpus(tmp_path))
    (tmp_path / "a.html").write_text("x")
    with pytest.raises(CorpusError, match="no kind of corpus has that suffix; rename"):
        list(corpora.Corpus(tmp_path / "a.html"))
    (tmp_path / "a.html").unlink()
    parquet(tmp_path)
    (tmp_path / "0.parquet").write_bytes(b"PAR1")
    with pytest.raises(CorpusError, match=r"0.parquet is not a Parquet file"):
        list(corpora.Corpus(tmp_path))
    parquet(tmp_path)
    with pytest.raises(CorpusError, match="no column 'body'; the columns are id, text, url"):
        list(corpora.Corpus(tmp_path, text_field="body"))


@pytest.mark.parametrize("make", [jsonl, parquet])
def test_of_several_fields_the_first_counts_that_there_is(tmp_path, make):
    source = make(tmp_path, [{"name": d.id, "body": d.text} for d in DOCUMENTS])
    fields = dict(text_field="abstract,body,name", id_field="uri,name")
    assert list(corpora.Corpus(source, **fields)) == DOCUMENTS
    with pytest.raises(CorpusError, match="there is no (field|column) 'abstract,title'"):
        list(corpora.Corpus(source, text_field="abstract,title"))


def test_a_share_is_the_same_documents_however_they_are_read(tmp_path):
    rows = [{"id": str(i), "text": f"text {i}"} for i in range(2000)]
    jsonl(tmp_path, rows[:700], "a.jsonl")
    jsonl(tmp_path, rows[700:], "b.jsonl")
    half = corpora.Corpus(tmp_path, share=0.5)
    ids = [d.id for d in half]
    assert 900 < len(ids) < 1100 and ids == sorted(ids, key=int)
    whole = corpora.Corpus([jsonl(tmp_path, rows[::-1], "all.jsonl")], share=0.5)
    assert [d.id for d in whole] == ids[::-1]
    tenth = {d.id for d in corpora.Corpus(tmp_path / "[ab].jsonl", share=0.1)}
    assert 150 < len(tenth) < 250 and tenth < set(ids)
    again = corpora.Corpus(**json.loads(json.dumps(half.as_json())))
    assert again.describe() == half.describe() != corpora.Corpus(tmp_path).describe()


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
    with pytest.raises(ValueError, match=r"keep='\(' is not a regular expression"):
        corpora.sample(found, 100, keep="(")


LINE = '{"text": "Oslo"}\n'


def write(folder, files):
    """Writes files by path and content."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def test_other_forms_of_files(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    lines = "".join(json.dumps(r) + "\n" for r in ROWS).encode()
    rows = lines.splitlines(keepends=True)
    frames = [zstandard.compress(b"".join(x)) for x in (rows[:2], rows[2:])]
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(frames))
    # pzstd puts a frame that decoders skip, with the size of the next, before each.
    sized = [b"\x50\x2a\x4d\x18\4\0\0\0" + len(f).to_bytes(4, "little") + f for f in frames]
    (tmp_path / "sized.jsonl.zst").write_bytes(b"".join(sized))
    (tmp_path / "bom.jsonl").write_bytes(b"\xef\xbb\xbf" + lines)
    (tmp_path / "array.json").write_text(json.dumps(ROWS, indent=1))
    (tmp_path / "array.json.gz").write_bytes(gzip.compress(json.dumps(ROWS).encode()))
    for name, tab in (("a.csv", ","), ("a.tsv", "\t")):
        with open(tmp_path / name, "w", newline="", encoding="utf-8-sig") as out:
            table = csv.DictWriter(out, list(ROWS[0]), delimiter=tab)
            table.writeheader()
            table.writerows(ROWS)
    names = ("a.jsonl.zst", "sized.jsonl.zst", "bom.jsonl", "array.json", "array.json.gz")
    for name in (*names, "a.csv", "a.tsv"):
        assert list(corpora.Corpus(tmp_path / name)) == DOCUMENTS, name
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(frames)[:-9])
    with pytest.raises(ValueError, match="a.jsonl.zst, after line 2: .* truncated or damaged"):
        list(corpora.Corpus(tmp_path / "a.jsonl.zst"))
    (tmp_path / "a.csv").write_text("id,text\na,x,y\n")
    with pytest.raises(CorpusError, match="a.csv, line 2: the row has another number of fields"):
        list(corpora.Corpus(tmp_path / "a.csv"))


def test_the_files_of_a_folder_that_are_a_corpus(tmp_path):
    files = {"a/x.jsonl": LINE, "b/x.jsonl": LINE, "LICENSE": "MIT", "README.txt": "About."}
    write(tmp_path, files | {".git/y.jsonl": "no", "_cache/y.jsonl": "no"})
    # Files of one name in two folders do not collide.
    names = ["a/x.jsonl:0", "b/x.jsonl:0"]
    paths = [tmp_path / "a/x.jsonl", tmp_path / "b/x.jsonl"]
    for source in (tmp_path, f"{tmp_path}/*/x.jsonl", paths):
        assert [d.id for d in corpora.Corpus(source)] == names
    with pytest.raises(ValueError, match="x.jsonl is listed twice"):
        corpora.Corpus([*paths, paths[0]])
    write(tmp_path, {"page.html": "<p>"})
    with pytest.warns(UserWarning, match=r"left out of the corpus, 1 of .html \(page.html\)"):
        assert [d.id for d in corpora.Corpus(tmp_path)] == names
    write(tmp_path, {"note.txt": "Oslo"})
    with pytest.raises(
        CorpusError, match=r"several kinds: 2 of .jsonl \(a/x.jsonl, …\), 1 of .txt"
    ):
        corpora.Corpus(tmp_path)
    with pytest.warns(UserWarning, match="page.html"):
        assert list(corpora.Corpus(tmp_path, kind="texts")) == [Document("note.txt", "Oslo")]


def test_the_splits_of_a_folder(tmp_path):
    write(tmp_path, {"train.jsonl": LINE, "validation/a.jsonl": LINE, "dev.jsonl": LINE})
    with pytest.warns(UserWarning, match=r"the split 'train' is read \(.*validation: 2"):
        assert [d.id for d in corpora.Corpus(tmp_path)] == ["train.jsonl:0"]
    with pytest.warns(UserWarning, match="the split 'validation' is read"):
        held_out = list(corpora.Corpus(tmp_path, split="validation"))
    assert [d.id for d in held_out] == ["dev.jsonl:0", "validation/a.jsonl:0"]
    with pytest.raises(CorpusError, match=r"has no split 'test' \("):
        corpora.Corpus(tmp_path, split="test")
    write(tmp_path, {"more.jsonl": LINE})
    with pytest.raises(CorpusError, match=r"mixes files of splits with others \("):
        corpora.Corpus(tmp_path)


def test_what_is_not_utf_8_is_named_or_skipped_and_counted(tmp_path):
    bad = b'{"text": "\xff"}\n'
    files = {
        "a.jsonl": LINE.encode() + bad + LINE.encode(),
        "a.csv": b'text,n\nOslo,1\n"b\xff\nd",2\nRome,3\n',
        "t/a.txt": "Oslo",
        "t/b.txt": b"\xff",
    }
    write(tmp_path, files)
    for name, place, rest in (
        ("a.jsonl", "a.jsonl, line 2", ["Oslo", "Oslo"]),
        ("a.csv", "a.csv, line 3", ["Oslo", "Rome"]),
        ("t", "b.txt, line 1", ["Oslo"]),
    ):
        with pytest.raises(ValueError, match=f"{place}: not UTF-8"):
            list(corpora.Corpus(tmp_path / name))
        corpus = corpora.Corpus(tmp_path / name, undecodable="skip")
        with pytest.warns(UserWarning, match="1 records are not UTF-8"):
            found = list(corpus)
        assert [d.text for d in found] == rest and corpus.skipped == 1
        if name != "t":
            # The number of the record in the file, whatever was skipped before it.
            assert [d.id for d in found] == [f"{name}:0", f"{name}:2"]


@pytest.mark.parametrize("kind", ["string", "binary"])
def test_rows_of_parquet_that_are_not_utf_8(tmp_path, kind):
    arrow()
    import pyarrow.parquet

    binary = pyarrow.array([b"Oslo", b"\xff", b"Rome"], pyarrow.binary())
    table = pyarrow.table({"text": binary.view(getattr(pyarrow, kind)())})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(CorpusError, match="a.parquet:1: not UTF-8"):
        list(corpora.Corpus(tmp_path / "a.parquet"))
    with pytest.warns(UserWarning, match="1 records"):
        found = list(corpora.Corpus(tmp_path / "a.parquet", undecodable="skip"))
    assert [d.id for d in found] == ["a.parquet:0", "a.parquet:2"]


def test_null_texts_are_blank_and_ids_of_the_corpus_may_repeat(tmp_path):
    rows = [{"id": "a", "text": t} for t in ("Oslo", None, "Rome")] + [{"id": "a~2", "text": "x"}]
    file = jsonl(tmp_path, rows)
    found = list(corpora.Corpus(file, duplicate_ids="number"))
    assert [d.id for d in found] == ["a", "a~2", "a~3", "a~2~2"]
    assert [d.text for d in found] == ["Oslo", "", "Rome", "x"]
    assert [d.id for d in corpora.Corpus(file)] == ["a", "a", "a", "a~2"]


@pytest.mark.parametrize(
    ("files", "source", "options", "message"),
    [
        (
            {"a.txt": "Oslo"},
            "",
            dict(text_field="body"),
            "text_field='body' has no effect on .*all",
        ),
        ({"a.txt": "Oslo"}, "a.txt", dict(id_field="id"), "id_field='id' has no effect"),
        ({"a.jsonl": LINE}, "a.jsonl", dict(split="test"), "split='test' has no effect on .*files"),
        ({"a.jsonl": LINE}, "", dict(split="test"), "tells a split, so split='test' has no effect"),
        ({"a.jsonl": LINE}, "a.jsonl", dict(data_dir="x"), "data_dir='x' has no effect on .*TFDS"),
        ({}, "c4/en:3.0.1", dict(undecodable="skip"), "undecodable='skip' has no effect on c4/en"),
    ],
)
def test_options_without_effect_are_refused(tmp_path, files, source, options, message):
    """Guards: a whole folder read as its split "test"."""
    write(tmp_path, files)
    with pytest.raises(CorpusError, match=message):
        corpora.Corpus(source if not files else tmp_path / source, **options)


def test_a_split_of_a_dataset_without_splits_is_refused(tmp_path):
    arrow()
    datasets(tmp_path, ROWS)
    with pytest.raises(CorpusError, match="has no splits, so split='test' has no effect"):
        list(corpora.Corpus(tmp_path, split="test"))


@pytest.mark.parametrize("form", [list, lambda files: str(files[0].parent / "*")])
@pytest.mark.parametrize(
    "names", [("a.jsonl", "b.csv"), ("a.txt", "b.jsonl"), ("a.jsonl", "b.parquet", "c.jsonl")]
)
def test_files_of_several_kinds_are_refused(tmp_path, form, names):
    """Guards: JSON lines read as a text, or a table as JSON."""
    write(tmp_path, dict.fromkeys(names, LINE))
    with pytest.raises(CorpusError, match=r"of several kinds, .* \(a\..*give files of one kind"):
        corpora.Corpus(form([tmp_path / name for name in names]))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.csv": "text,id,text\na,1,b\n"}, "a.csv: two columns are called 'text'; rename"),
        (
            {"a.json": '{"text": ["a", "b"]}'},
            "'text' is list, not a text; if this object holds col",
        ),
        ({"a.json": '{"text": {"0": "a"}}'}, "'text' is dict, not a text; if .* write rows"),
        ({"a.json": '{\n "text": "a"\n}'}, "line 1: not JSON .* here one has several lines; write"),
        ({"a.jsonl": '{"input_ids": [1, -1]}'}, "line 1: -1 is no token id"),
        ({"a.jsonl": '{"input_ids": [1, 4294967296]}'}, "line 1: 4294967296 is no token id"),
    ],
)
def test_tables_in_other_forms_are_refused(tmp_path, files, message):
    with pytest.raises(ValueError, match=message):
        list(corpora.Corpus(write(tmp_path, files)))


def test_what_describes_a_dataset_is_no_corpus(tmp_path):
    write(tmp_path, {"a.jsonl": LINE, "dataset_infos.json": "{}", "README.md": "# About"})
    assert [d.text for d in corpora.Corpus(tmp_path)] == ["Oslo"]
    with pytest.raises(CorpusError, match="None is no corpus; give a path"):
        corpora.Corpus(None)


@pytest.mark.parametrize("make", [jsonl, parquet, datasets])
def test_a_field_is_a_label_by_id_even_of_numbers_and_of_a_share(tmp_path, make):
    years = [1999, 2001, 1999, 2001]
    rows = [{**row, "year": year} for row, year in zip(ROWS, years, strict=True)]
    corpus = corpora.Corpus(make(tmp_path, rows), share=0.5, duplicate_ids="number")
    assert corpus.labels("year") == {"a": "1999", "b": "2001", "c": "1999", "d": "2001"}
    assert corpus.labels("url")["d"] == "http://d"
    with pytest.raises(CorpusError, match="'topic'"):
        corpus.labels("topic")
    (tmp_path / "again").mkdir()
    again = corpora.Corpus(make(tmp_path / "again", [*rows, rows[0] | {"year": 1}]))
    with pytest.raises(CorpusError, match="two documents have the id 'a'.*number"):
        again.labels("year")
