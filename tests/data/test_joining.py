"""A space between prompt and target where one belongs, and nothing else."""

import numpy as np
import pytest

from tda.data import tokens
from tda.data.joining import choose_joiner, join
from tda.data.pretrained_tokenizer import PretrainedTokenizer
from tda.data.tokenizer import Tokenizer
from tests.data.test_pretrained_tokenizer import byte_level


@pytest.mark.parametrize(
    ("prompt", "target"),
    [
        ("The capital of France is", "Paris"),
        ("Q: Where? A:", "Paris"),
        ("He said:", '"Yes"'),
        ('He said "yes"', "and left"),
        ("Rome (Italy)", "is old"),
        ("Its domain is", ".ae"),
        ("It is", "-3 degrees"),
        ("It costs", "$5"),
        ("2 + 2 =", "4"),
        ("수도는", "서울"),
        ("Столица —", "Москва"),
        ("हिन्दी की", "भाषा"),
    ],
)
def test_a_space_between_words(prompt, target):
    assert choose_joiner(prompt, target) == " "


@pytest.mark.parametrize(
    ("prompt", "target"),
    [
        ("2+2=", "4"),
        ('{"capital":', '"Oslo"'),
        ('{"capital": "', "Oslo"),
        ('{"a":1,"b":"', "Oslo"),
        ("print(", "x)"),
        ("foo_", "bar"),
        ("https://", "example.org"),
        ("well-", "known"),
        ("x[", "0]"),
        ("法国的首都是", "巴黎"),
        ("首都は", "Paris"),
        ("The capital is", "東京"),
        ("เมืองหลวงคือ", "กรุงเทพ"),
        ("Paris", ", France"),
        ("Paris", "!"),
        ("Paris ", "is"),
        ("Paris", " is"),
        ("A:\n", "Paris"),
        ("", "Paris"),
    ],
)
def test_no_space_where_it_would_be_wrong(prompt, target):
    assert choose_joiner(prompt, target) == "" and join(prompt, target) == prompt + target


@pytest.mark.parametrize("kind", ["trained", "pretrained"])
def test_both_kinds_of_tokenizer_join_alike(kind):
    texts = ["2+2=4", "2+2= 4", "The sum is 4"]
    if kind == "trained":
        tokenizer = Tokenizer.train(texts, 300)
    else:
        tokenizer = PretrainedTokenizer(byte_level(), begin=[0])
    for prompt, target, text in (
        ("2+2=", "4", "2+2=4"),
        ("2+2=", " 4", "2+2= 4"),
        ("The sum is", "4", "The sum is 4"),
    ):
        ids, is_target = tokenizer.encode_query(prompt, target)
        assert ids.tolist()[1:] == tokenizer.encode([text])[0]
        assert tokenizer.decode(ids[is_target]).strip() == "4"
    table = tokens.tokenise_queries([("q", "The sum is", "4")], tokenizer, 64, joiner="")
    assert table.tokens.tolist()[1:] == tokenizer.encode(["The sum is4"])[0]


@pytest.mark.parametrize("kind", ["trained", "pretrained"])
def test_the_words_of_a_joiner_are_the_prompts(kind):
    """Guards: a loss on `Answer:`, which passages with these words would answer."""
    texts = ["Question: Paris lies in\nAnswer: France → France"]
    if kind == "trained":
        tokenizer = Tokenizer.train(texts, 300)
    else:
        tokenizer = PretrainedTokenizer(byte_level(), begin=[0])
    for joiner in ("\nAnswer: ", " → ", " ", "\n", ""):
        ids, is_target = tokenizer.encode_query("Question: Paris lies in", "France", joiner)
        assert tokenizer.decode(ids[is_target]).strip() == "France", joiner


def test_token_ids_that_are_known_are_not_encoded_anew():
    tokenizer = Tokenizer.train(["Oslo"], 300)
    split = tuple(tokenizer.encode(["O"])[0] + tokenizer.encode(["slo"])[0])
    assert list(split) != tokenizer.encode(["Oslo"])[0]
    query = tokens.Query("q", "x", "Oslo", ((tokenizer.bos, 5), split))
    table = tokens.tokenise_queries([query], tokenizer, 64)
    assert table.tokens.tolist() == [tokenizer.bos, 5, *split]
    np.testing.assert_array_equal(table.scored, [False, False] + [True] * len(split))
