"""Rows are read by the names of their fields, and what is not documented is refused."""

import collections
import dataclasses

import numpy as np
import pytest

from tda.data.corpora import CorpusError, Document
from tda.data.rows import Query, parse_passages, parse_queries

Named = collections.namedtuple("Named", "target prompt id")


class Series:
    """A row of pandas, as far as it is read here."""

    def __init__(self, **fields):
        self._fields, self.index = fields, list(fields)

    def to_dict(self):
        return dict(self._fields)

    def __iter__(self):
        return iter(self._fields.values())

    def __len__(self):
        return len(self._fields)


class NAType:
    """What pandas puts for a missing value of a column of strings."""


class Frame(Series):
    """A pandas data frame, whose iteration gives names of columns."""

    columns = ("prompt", "target")


RECORD = np.array([("q", "a", "b")], [("id", "U9"), ("prompt", "U9"), ("target", "U9")])[0]


@pytest.mark.parametrize(
    ("row", "query"),
    [
        (("a", "b"), Query("0", "a", "b")),
        (["a", "b"], Query("0", "a", "b")),
        (("q", "a", "b"), Query("q", "a", "b")),
        ((7, "a", "b"), Query("7", "a", "b")),
        (np.array(["a", "b"]), Query("0", "a", "b")),
        ({"prompt": "a", "target": "b"}, Query("0", "a", "b")),
        ({"target": "b", "source": "web", "prompt": "a", "id": 3}, Query("3", "a", "b")),
        (Named("b", "a", "q"), Query("q", "a", "b")),
        (Series(target="b", prompt="a"), Query("0", "a", "b")),
        (RECORD, Query("q", "a", "b")),
        (Query(7, "a", "b"), Query("7", "a", "b")),
        ({"prompt": "a", "target": "b", "id": np.float32("nan")}, Query("0", "a", "b")),
        (Query("q", "a", "b"), Query("q", "a", "b")),
    ],
)
def test_a_query_in_every_form(row, query):
    assert parse_queries([row]) == [query]


@dataclasses.dataclass
class Unknown:
    prompt: str = "a"
    target: str = "b"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("ab", r"query 0 is 'ab' \(str\); give \(prompt, target\)"),
        (b"ab", r"query 0 is b'ab' \(bytes\)"),
        ({"a", "b"}, r"query 0 is \{.*\(set\)"),
        ((x for x in "ab"), r"query 0 is <generator .*\(generator\)"),
        (("a",), r"query 0 is \('a',\)"),
        (("a", "b", "c", "d"), "query 0 is"),
        (np.zeros((2, 2)), "query 0 is"),
        (Unknown(), r"query 0 is Unknown\("),
        (None, "query 0 is None"),
        (5, r"query 0 is 5 \(int\)"),
        (("a", 4), r"query 0: the target is 4 \(int\), not a string"),
        (("a", None), "query 0: the target is None, not a string"),
        ((float("nan"), "b"), r"query 0: the prompt is NaN \(a missing value\), not a string"),
        (("a", b"b"), r"query 0: the target is b'b' \(bytes\), not a string"),
        (("a", ["b"]), "query 0: the target is "),
        ((None, "a", "b"), "query 0 has the id None"),
        ((1.5, "a", "b"), r"query 0 has the id 1.5 \(float\)"),
        (("\ud83d", "a", "b"), "query 0: the id has half a character"),
        ({"question": "a", "answer": "b"}, "query 0 has no field 'prompt'; its fields are ques"),
        ({"prompt": "a"}, "query 0 has no field 'target'"),
        (Query("q", None, "b"), "query 0: the prompt is None, not a string"),
        (Query("q", "a", "b", ((1,), "b")), r"query 0: the tokens of the target are 'b' \(str\)"),
    ],
)
def test_another_form_of_query_is_refused(row, message):
    with pytest.raises(ValueError, match=message):
        parse_queries([row])


CONTAINERS = [
    ("ab", r"is 'ab' \(str\), not a list"),
    (b"ab", "is b'ab'.*not a list"),
    ({"x": "a", "y": "b"}, r"is a dict with the keys 'x', 'y', not a list of rows; give list\("),
    ({"a", "b"}, "is a set, which has no order; give a list"),
    (Frame(prompt=[], target=[]), r"is a Frame.*give its rows: x.to_dict\('records'\)"),
    (None, "is None, not an iterable"),
    (np.array("ab"), "is array.*not a list"),
]


@pytest.mark.parametrize(("rows", "message"), CONTAINERS)
def test_containers_that_are_no_lists_of_rows_are_refused(rows, message):
    with pytest.raises(ValueError, match=f"queries {message}"):
        parse_queries(rows)
    with pytest.raises(CorpusError, match=f"passages {message}"):
        list(parse_passages(rows))


def test_queries_of_one_id_are_refused():
    with pytest.raises(
        ValueError, match="query 0 and query 2 both have the id 'q'; give them diff"
    ):
        parse_queries([("q", "a", "b"), ("a", "b"), ("q", "c", "d")])
    with pytest.raises(ValueError, match="query 0 and query 1 both have the id '1'"):
        parse_queries([(1, "a", "b"), ("a", "b")])


@pytest.mark.parametrize(
    ("row", "document"),
    [
        ("a", Document("0", "a")),
        (("x", "a"), Document("x", "a")),
        ([4, "a"], Document("4", "a")),
        (Document("x", "a"), Document("x", "a")),
        ({"id": "x", "text": "a"}, Document("x", "a")),
        ({"text": "a", "id": "x"}, Document("x", "a")),
        ({"text": "a", "url": "u"}, Document("0", "a")),
        ({"text": None, "id": "x"}, Document("x", "")),
        ({"text": float("nan"), "id": float("nan")}, Document("0", "")),
        ({"text": np.float32("nan"), "id": NAType()}, Document("0", "")),
        (Document(5, "a"), Document("5", "a")),
        (Series(text="a", id="x"), Document("x", "a")),
    ],
)
def test_a_passage_in_every_form(row, document):
    assert list(parse_passages([row])) == [document]


def test_token_ids_may_be_an_array():
    document = Document("x", "", tokens=np.array([5, 6]), scored=np.array([False, True]))
    (found,) = parse_passages([document])
    assert found == Document("x", "", tokens=(5, 6), scored=(False, True))


def test_the_items_of_a_dict_are_passages_in_its_order():
    texts = {"x": "a", "y": "b"}
    assert list(parse_passages(texts.items())) == [Document("x", "a"), Document("y", "b")]


def test_fields_of_passages_have_names():
    rows = [{"body": "a", "uid": "x", "text": "no"}]
    assert list(parse_passages(rows, "body", "uid")) == [Document("x", "a")]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (b"ab", r"passage 0 is b'ab' \(bytes\); give a text"),
        ({"a", "b"}, "passage 0 is "),
        (("x", "y", "a"), "passage 0 is "),
        (("x", None), r"passage 0 is \('x', None\)"),
        (None, "passage 0 is None"),
        (float("nan"), "passage 0 is NaN"),
        ({"body": "a"}, "passage 0: there is no field 'text'; the fields are body"),
        ({"text": 5}, "passage 0: 'text' is int, not a text"),
        ({"text": "a", "id": ["x"]}, "passage 0: the id in 'id' is "),
        (Document("x", None), "passage 0: the text is None, not a string"),
        (Document("x", "a", prompt=5), r"passage 0: the prompt is 5 \(int\), not a string"),
        (Document(None, "a"), "passage 0 has the id None; give a string"),
        (Document("x", "", tokens=(5, 1.7)), "passage 0: the tokens are not a list of whole numb"),
        (Document("x", "", tokens=(5, 2**40)), "passage 0: 1099511627776 is no token id"),
        (
            Document("x", "", tokens=(5, 6), scored=(True,)),
            "passage 0: 'scored' is not a list of 2 booleans",
        ),
        (Document("x", "", tokens=(5, 6), scored=(0, 1)), "'scored' is not a list of 2 booleans"),
    ],
)
def test_another_form_of_passage_is_refused(row, message):
    with pytest.raises(CorpusError, match=message):
        list(parse_passages([row]))


def test_an_id_that_reads_like_a_place_in_a_message_stays():
    """Guards: a missing id told from a real one by comparing it with the place."""
    (document,) = parse_passages([{"id": "passage 0", "text": "x"}])
    assert document == Document("passage 0", "x")


def test_token_ids_that_no_token_has_are_refused():
    for ids in ([1, -2], [1, 1 << 40], np.array([3, -1])):
        with pytest.raises(CorpusError, match=r"passage 1: -?\d+ is no token id"):
            list(parse_passages(["Oslo", ids]))


def test_a_missing_id_of_a_query_is_its_number():
    rows = [{"id": x, "prompt": "a", "target": "b"} for x in ("q", float("nan"), None)]
    assert [q.id for q in parse_queries(rows)] == ["q", "1", "2"]


def test_a_source_of_rows_by_number_is_read_to_its_length():
    """Guards: a source that repeats itself, or that fails behind its end by an error of its own."""

    class Source:
        """Rows by number, as Grain's sources have them."""

        def __len__(self):
            return 2

        def __getitem__(self, i):
            return {"text": f"text {i}", "url": f"u{i}"} if i < 5 else 1 // 0

    documents = list(parse_passages(Source(), id_field="url"))
    assert [(d.id, d.text) for d in documents] == [("u0", "text 0"), ("u1", "text 1")]


def test_sources_of_grain_are_read_to_their_end():
    grain = pytest.importorskip("grain")
    source = grain.MapDataset.source([{"text": f"text {i}"} for i in range(4)])
    expected = [Document(str(i), f"text {i}") for i in range(4)]
    assert list(parse_passages(source)) == expected
    assert list(parse_passages(source.to_iter_dataset())) == expected
    kept = source.filter(lambda row: row["text"] != "text 1")
    assert [d.text for d in parse_passages(kept)] == ["text 0", "text 2", "text 3"]
    with pytest.raises(CorpusError, match="without an end.*give the source that it repeats"):
        next(parse_passages(source.repeat()))
