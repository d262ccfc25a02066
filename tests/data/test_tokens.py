"""Passages and queries as tables of tokens."""

import types

import numpy as np
import pytest

from tda.data import tokenised, tokens
from tda.data.documents import Document
from tda.data.parts import Counts
from tda.data.tokenizer import Tokenizer

SHORT = "Oslo lies in Norway."
LONG = "The capital of Germany is Berlin, and 日本語 too: " * 6


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([SHORT, LONG], 290)


def sequence(table, i):
    part = slice(table.starts[i], table.starts[i + 1])
    return table.tokens[part].tolist(), table.scored[part].tolist()


def tokenise(texts, tokenizer, context):
    documents = [Document(*pair) for pair in texts]
    return tokenised.tokenise_in_memory(documents, tokenizer, context)


def test_a_passage_is_bos_text_eos(tokenizer):
    """Guards: doubled begin-of-sequence token."""
    table, counts = tokenise([("a", SHORT), ("b", "Oslo")], tokenizer, 64)
    assert list(table.ids) == list(table.documents) == ["a", "b"]
    assert counts == Counts(documents=2, blank=0, split=0)
    for i, text in enumerate([SHORT, "Oslo"]):
        ids, scored = sequence(table, i)
        assert ids == [tokenizer.bos, *tokenizer.encode([text])[0], tokenizer.eos]
        # Everything is predicted but <bos>.
        assert scored == [False] + [True] * (len(ids) - 1)
    np.testing.assert_array_equal(table.lengths, [len(sequence(table, i)[0]) for i in range(2)])
    assert table.tokens.dtype == np.int32 and table.starts.dtype == np.int64


@pytest.mark.parametrize("context", [1, 7, 10, 64])
def test_splitting_loses_nothing(tokenizer, context):
    """Guards: tokens of long documents dropped in silence."""
    texts = [("first", LONG), ("short", "Oslo"), ("last", LONG[::-1])]
    table, counts = tokenise(texts, tokenizer, context)
    assert table.lengths.max() <= context + 1
    joined, scored_count = {}, {}
    for i, document in enumerate(table.documents):
        ids, scored = sequence(table, i)
        assert ids[0] == tokenizer.bos and ids.count(tokenizer.bos) == 1
        assert scored == [False] + [True] * (len(ids) - 1)
        joined[document] = joined.get(document, []) + ids[1:]
        scored_count[document] = scored_count.get(document, 0) + sum(scored)
    for document, text in texts:
        whole = tokenizer.encode([text])[0]
        if len(whole) % context:  # a text that just fills its passages has no <eos>
            whole.append(tokenizer.eos)
        assert joined[document] == whole
        assert scored_count[document] == len(whole)
    assert counts.documents == 3
    assert counts.split == sum(table.documents.count(d) > 1 for d in joined)


def test_a_document_that_fits_exactly_is_not_split(tokenizer):
    n = len(tokenizer.encode([SHORT])[0]) + 1
    table, _ = tokenise([("a", SHORT)], tokenizer, n)
    assert list(table.ids) == ["a"] and table.tokens[-1] == tokenizer.eos
    # One position less: the text still fits, and no passage of <eos> alone is made.
    table, counts = tokenise([("a", SHORT)], tokenizer, n - 1)
    assert list(table.ids) == ["a"] and table.tokens[-1] != tokenizer.eos and counts.split == 0
    table, _ = tokenise([("a", SHORT)], tokenizer, n - 2)
    assert len(table) == 2


def test_no_passage_holds_only_ends_of_the_text(tokenizer):
    """A template may end in several tokens, of which a passage may have no room for the last."""
    two_ends = types.SimpleNamespace(begin=[1], end=[2, 3])
    for n in range(1, 40):
        text = [9] * n
        ranges = tokens.cut([*text, 2, 3], two_ends, 8)
        assert all(first < n for first, _ in ranges) and ranges[-1][1] >= n


def test_only_a_querys_target_is_scored(tokenizer):
    """Guards: query gradients over the prompt too."""
    table = tokens.tokenise_queries(
        [("q1", "Oslo lies in", "Norway"), ("q2", "Berlin is in", "Germany")], tokenizer, 64
    )
    assert table.ids == ["q1", "q2"]
    for i, (prompt, target) in enumerate([("Oslo lies in", "Norway"), ("Berlin is in", "Germany")]):
        ids, scored = sequence(table, i)
        expected, mask = tokenizer.encode_query(prompt, target)
        assert ids == expected.tolist() and scored == mask.tolist()
        assert ids.count(tokenizer.bos) == 1 and tokenizer.eos not in ids


def test_half_a_character_is_refused_by_name(tokenizer):
    """Guards: the tokenizer's "TextEncodeInput must be …", which names nothing."""
    half = "Oslo \ud83d"
    with pytest.raises(ValueError, match=r"document 'b': the text has half a character, \\ud83d"):
        tokenise([("a", SHORT), ("b", half)], tokenizer, 64)
    with pytest.raises(ValueError, match=r"query 'q2': the prompt has half a character"):
        tokens.tokenise_queries([("q1", "a", "b"), ("q2", half, "b")], tokenizer, 64)
    with pytest.raises(ValueError, match=r"query 'q2': the target has half a character"):
        tokens.tokenise_queries([("q1", "a", "b"), ("q2", "a", half)], tokenizer, 64)


def test_query_errors_name_the_query(tokenizer):
    with pytest.raises(ValueError, match="query 'q2': the target '' of the prompt"):
        tokens.tokenise_queries([("q1", "a", "b"), ("q2", "a", " ")], tokenizer, 64)
    needed = len(tokenizer.encode_query(LONG, "Norway")[0]) - 1
    with pytest.raises(ValueError, match=f"query 'long' needs {needed} positions, the context has"):
        tokens.tokenise_queries([("q1", "a", "b"), ("long", LONG, "Norway")], tokenizer, needed - 1)
    assert len(tokens.tokenise_queries([("long", LONG, "Norway")], tokenizer, needed)) == 1
