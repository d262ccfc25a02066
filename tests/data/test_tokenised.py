"""A corpus as passages: on disk as in memory, killed or not, with ids that lead back."""

import functools
import os
import tracemalloc

import numpy as np
import pytest

from tda.data import long_texts, tokenised, tokens
from tda.data.corpora import CorpusError, Document
from tda.data.parts import ARRAYS, Counts, Part
from tda.data.pretrained_tokenizer import PretrainedTokenizer
from tda.data.rows import parse_passages
from tda.data.tokenizer import Tokenizer
from tests.data.test_pretrained_tokenizer import TEXTS, byte_level

LONG = " ".join(TEXTS) * 4
DOCUMENTS = [
    Document("short", TEXTS[0]),
    Document("ünïcode/x", LONG),
    Document("blank", " \n"),
    *(Document(f"d{i}", f"{TEXTS[i % 3]} {i}") for i in range(40)),
]


@pytest.fixture
def tokenizer():
    return PretrainedTokenizer(byte_level(), begin=[0])


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(tokenised, "_BATCH", 3)
    monkeypatch.setattr(tokenised, "_BATCHES_A_PART", 2)


def same(a, b):
    assert list(a.ids) == list(b.ids) and list(a.documents) == list(b.documents)
    for name in ("tokens", "starts", "scored"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


def test_the_same_passages_as_of_the_table_in_memory(tokenizer):
    found, counts = tokenised.tokenise_in_memory(DOCUMENTS, tokenizer, 24, quiet=True)
    pairs = [(d.id, d.text) for d in DOCUMENTS if d.text.strip()]
    expected, _ = tokens.tokenise_passages(pairs, tokenizer, 24)
    several = len({n.split("#")[0] for n in found.ids if "#" in n})
    assert counts == Counts(len(DOCUMENTS), 1, several) and several > 3
    assert list(found.documents) == list(expected.documents)
    for name in ("tokens", "starts", "scored"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    assert found.ids[0] == "short" and "blank" not in list(found.documents)


@pytest.mark.parametrize("own", [False, True])
def test_ids_lead_back_to_the_characters(tokenizer, own):
    """Guards: spans that are off by the space that a tokenizer puts in front."""
    if own:
        tokenizer = Tokenizer.train(TEXTS, 320)
    found, _ = tokenised.tokenise_in_memory(DOCUMENTS, tokenizer, 24, quiet=True)
    texts = {d.id: d.text for d in DOCUMENTS}
    spans = []
    for i, name in enumerate(found.ids):
        document, span = tokenised.place_of(name)
        assert document == found.documents[i]
        said = tokenizer.decode(found.tokens[found.starts[i] : found.starts[i + 1]])
        if document == "ünïcode/x":
            spans.append(span)
            # A cut between the bytes of one character leaves it in both passages.
            whole = texts[document][span].strip()
            said = said.strip("\ufffd \n\t")
            assert said in whole and len(whole) - len(said) <= 3
        elif span is None:
            assert said.strip() == texts[document].strip()
    assert spans[0].start == 0 and spans[-1].stop == len(LONG)
    assert all(a.stop >= b.start - 1 for a, b in zip(spans, spans[1:], strict=False))
    assert len(spans) > 5


def test_on_disk_as_in_memory(tokenizer, tmp_path):
    expected, counts = tokenised.tokenise_in_memory(DOCUMENTS, tokenizer, 24, quiet=True)
    how = (tokenizer, 24, {"corpus": "x"})
    found, same_counts = tokenised.tokenise_on_disk(tmp_path, DOCUMENTS, *how, quiet=True)
    same(found, expected)
    assert same_counts == counts and isinstance(found.tokens, np.memmap)
    assert found.fingerprint() == expected.fingerprint()
    # There already: the documents are not read again.
    again, _ = tokenised.tokenise_on_disk(tmp_path, iter(()), *how, quiet=True)
    same(again, expected)
    assert sorted(os.listdir(tmp_path)) == sorted(["corpus.json", *(f"{k}.npy" for k in ARRAYS)])
    with pytest.raises(CorpusError, match="made from another corpus; it differs in context"):
        tokenised.tokenise_on_disk(tmp_path, DOCUMENTS, tokenizer, 25, {"corpus": "x"}, quiet=True)


def test_a_killed_run_goes_on_to_the_same_bytes(tokenizer, tmp_path):
    """Guards: a resumed corpus with documents twice, or without some."""
    how = (tokenizer, 24, {"corpus": "x"})
    tokenised.tokenise_on_disk(tmp_path / "whole", DOCUMENTS, *how, quiet=True)
    read = []

    def until(count):
        for i, document in enumerate(DOCUMENTS):
            if i == count:
                raise KeyboardInterrupt
            read.append(document.id)
            yield document

    for count in (5, 14, 15, 40):
        with pytest.raises(KeyboardInterrupt):
            tokenised.tokenise_on_disk(tmp_path / "killed", until(count), *how, quiet=True)
    assert len(list((tmp_path / "killed" / "parts").glob("*.npz"))) == 6
    tokenised.tokenise_on_disk(tmp_path / "killed", DOCUMENTS, *how, quiet=True)
    for name in os.listdir(tmp_path / "whole"):
        one, other = ((tmp_path / d / name).read_bytes() for d in ("whole", "killed"))
        assert one == other, name


def test_what_cannot_be_is_told(tokenizer, tmp_path):
    with pytest.raises(CorpusError, match="two documents have the id 'short'"):
        tokenised.tokenise_in_memory([*DOCUMENTS, DOCUMENTS[0]], tokenizer, 24, quiet=True)
    for nothing in ([], [Document("a", " ")]):
        with pytest.raises(CorpusError, match="the corpus has no text"):
            tokenised.tokenise_in_memory(nothing, tokenizer, 24, quiet=True)
    half = "Oslo \ud83d"
    for wrong, message in (
        (Document("p7", half), r"document 'p7': the text has half a character, \\ud83d at 5 "),
        (Document(half, "Oslo"), r"document 'Oslo \\ud83d': the id has half a character"),
        (Document("p8", None), "document 'p8': the text is NoneType, not a string"),
    ):
        for place, make in (
            ((), tokenised.tokenise_in_memory),
            ((tmp_path,), functools.partial(tokenised.tokenise_on_disk, provenance={})),
        ):
            with pytest.raises(CorpusError, match=message):
                make(*place, [*DOCUMENTS, wrong], tokenizer, 24, quiet=True)
    with pytest.raises(ValueError, match="context=0 holds only the tokens before every text"):
        tokenised.tokenise_in_memory(DOCUMENTS, tokenizer, 0, quiet=True)


def test_places_of_ids():
    assert tokenised.place_of("a/b#12-40") == ("a/b", slice(12, 40))
    assert tokenised.place_of("a#b") == ("a#b", None)
    assert tokenised.place_of("x#1-2", documents=["x#1-2"]) == ("x#1-2", None)


def test_long_documents_are_encoded_a_few_at_a_time(tokenizer, tmp_path, monkeypatch):
    """Guards: memory that grows with the documents of a part, however long they are."""
    how = (tokenizer, 24, {"corpus": "x"})
    expected, counts = tokenised.tokenise_on_disk(tmp_path / "a", DOCUMENTS, *how, quiet=True)
    monkeypatch.setattr(tokenised, "_BATCH", 256)
    monkeypatch.setattr(tokenised, "_BATCHES_A_PART", 64)
    monkeypatch.setattr(long_texts, "PIECE", 300)
    monkeypatch.setattr(tokenised, "_PART_CHARACTERS", 600)
    calls, encode_spans, parts = [], tokenizer.encode_spans, tokenised._parts

    def watched(texts):
        calls.append(texts)
        return encode_spans(texts)

    def counted(*arguments, **options):
        for part in parts(*arguments, **options):
            sizes.append(part[1].documents)
            yield part

    sizes = []
    monkeypatch.setattr(tokenizer, "encode_spans", watched)
    monkeypatch.setattr(tokenised, "_parts", counted)
    found, same_counts = tokenised.tokenise_on_disk(tmp_path / "b", DOCUMENTS, *how, quiet=True)
    same(found, expected)
    assert same_counts == counts and sum(sizes) == len(DOCUMENTS) and len(sizes) > 2
    assert all(len(texts) == 1 or sum(map(len, texts)) <= 300 for texts in calls)
    assert max(map(len, calls)) > 1


def test_tokens_take_few_bytes_while_they_are_collected(tokenizer):
    """Guards: Python lists of numbers and pairs, 72 to 660 bytes a token."""
    part = Part(tokenizer, 24)
    documents = [Document(f"d{i}", LONG) for i in range(50)]
    assert not list(part.add(documents[:1]))
    tracemalloc.start()
    for document in documents[1:]:
        assert not list(part.add([document]))
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 12 * len(part.arrays()["tokens"])


def test_rows_of_token_ids_are_taken_as_they_are(tokenizer):
    ids = tokenizer.sequence(LONG)
    rows = list(parse_passages([ids, np.array(ids[:9]), {"input_ids": ids[:5] + [2, 2], "id": "m",
                                "attention_mask": [1] * 5 + [0, 0]}]))  # fmt: skip
    table, counts = tokenised.tokenise_in_memory(rows, tokenizer, 24, quiet=True)
    assert counts == Counts(3, 0, 1)
    place = [i for i, name in enumerate(table.documents) if name == "0"]
    joined = [table.tokens[table.starts[i] : table.starts[i + 1]].tolist() for i in place]
    # Parts overlap by a token, which the first of them predicts.
    assert joined[0] + [t for part in joined[1:] for t in part[1:]] == ids
    assert table.ids[0] == "0#0-25" and list(table.ids)[-2:] == ["1", "m"]
    assert table.tokens[table.starts[-2] :].tolist() == ids[:5]
    assert table.scored.sum() == len(ids) - 1 + 8 + 4
    for row, message in (
        ({"input_ids": [1.5]}, "'input_ids' are not a list of whole numbers"),
        ({"input_ids": [1, 2], "labels": [-100, -100]}, "'labels' leave every token out"),
        ({"input_ids": [1, 2], "labels": [2, -100]}, "'labels' differ from 'input_ids'"),
        ({"input_ids": [1, 2], "labels": [1]}, "'labels' has another length"),
    ):
        with pytest.raises(CorpusError, match=message):
            list(parse_passages([row]))


def test_labels_say_which_token_ids_the_loss_counts(tokenizer):
    """Guards: labels ignored, or shifted by the attention mask."""
    row = {"input_ids": [9, 3, 4, 5, 6], "labels": [9, -100, -100, 5, 6], "id": "a",
           "attention_mask": [0, 1, 1, 1, 1]}  # fmt: skip
    table, _ = tokenised.tokenise_in_memory(parse_passages([row]), tokenizer, 24, quiet=True)
    assert table.tokens.tolist() == [3, 4, 5, 6]
    assert table.scored.tolist() == [False, False, True, True]


@pytest.mark.parametrize("context", [64, 8])
def test_the_loss_of_a_completion_is_on_it_alone(tokenizer, context):
    row = {"prompt": "The capital of Norway is", "completion": "Oslo.", "id": "c"}
    rows = list(parse_passages([row]))
    assert rows == [Document("c", "Oslo.", "The capital of Norway is")]
    table, _ = tokenised.tokenise_in_memory(rows, tokenizer, context, quiet=True)
    assert tokenizer.decode(table.tokens[table.scored]).strip() == "Oslo."
    for i in range(len(table)):
        assert table.scored[table.starts[i] : table.starts[i + 1]].any()
    ids, is_target = tokenizer.encode_query(row["prompt"], row["completion"])
    if context == 64:
        assert table.tokens.tolist() == ids.tolist()
        np.testing.assert_array_equal(table.scored, is_target)


def test_documents_without_a_token_to_predict_become_no_passage():
    """Guards: passages whose gradient is zero, with a score above that of all opponents."""
    bare = PretrainedTokenizer(byte_level())
    rows = list(parse_passages(["a", TEXTS[0], [7], {"input_ids": [5, 6], "labels": [5, -100]}]))
    table, counts = tokenised.tokenise_in_memory(rows, bare, 64, quiet=True)
    assert list(table.ids) == ["1"] and counts == Counts(4, 3, 0)
    # A token that begins every text predicts the only one after it.
    begun = PretrainedTokenizer(byte_level(), begin=[0])
    table, counts = tokenised.tokenise_in_memory(rows, begun, 64, quiet=True)
    assert list(table.ids) == ["0", "1"] and counts.blank == 2
    with pytest.raises(CorpusError, match="has no text: .* or of a single token"):
        tokenised.tokenise_in_memory(rows[:1], bare, 64, quiet=True)
