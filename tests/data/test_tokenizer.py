"""The tokenizer: round trips, special tokens, and which tokens are a query's target."""

import copy
import json

import numpy as np
import pytest
import tokenizers

from tda.data.pretrained_tokenizer import PretrainedTokenizer
from tda.data.tokenizer import Tokenizer

TEXTS = [
    "Paris is the capital of France.",
    "The capital of Germany is Berlin, and Berlin is in Germany.",
    "Oslo lies in Norway; Bergen lies in Norway too.",
    "In 1905 and in 2024 the river rose by 12 metres.",
] * 3

ODD = [
    "plain",
    " leading space",
    "trailing space ",
    "two  spaces   three",
    "tab\tnew\nline\r\n",
    "naïve café — “quoted” … ½",
    "e\u0301 against é",
    "日本語のテキスト と العربية و עברית",
    "👩‍👩‍👧‍👦 family 🇳🇴 flag",
    "zero\u200bwidth \u00a0hard space \ufeff bom",
    "3.14159, 1,000,000 and ² ³",
    "a\x00nul\x7f",
    "<bos> is spelled <eos> and <pad>",
    "ĠĠ looks like a byte",
]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(TEXTS, 320)


def pieces(tokenizer, ids, mask):
    return tokenizer.decode(np.asarray(ids)[np.asarray(mask)])


@pytest.mark.parametrize("text", ODD)
def test_round_trip(tokenizer, text):
    ids = tokenizer.encode([text])[0]
    # Text is read as if a space stood before it.
    assert tokenizer.decode(ids) == (text if text.startswith(" ") else f" {text}")
    assert max(ids) < tokenizer.vocab_size


def test_a_name_has_the_same_tokens_at_the_start_and_inside(tokenizer):
    alone, inside = tokenizer.encode(["Berlin", "is Berlin"])
    assert inside[-len(alone) :] == alone


@pytest.mark.parametrize("spelled", ["<bos>", "<eos>", "<pad>", "x<bos>y", " <eos> <pad>"])
def test_spelled_out_special_tokens_are_ordinary_text(tokenizer, spelled):
    """Guards: doubled begin-of-sequence token."""
    special = {tokenizer.pad, tokenizer.bos, tokenizer.eos}
    assert len(special) == 3
    assert not special & set(tokenizer.encode([spelled])[0])
    ids, _ = tokenizer.encode_query(f"say {spelled}", f"{spelled} again")
    assert ids[0] == tokenizer.bos and not special & set(ids[1:].tolist())


def test_a_copy_treats_special_tokens_alike(tokenizer):
    """Guards: a setting that `tokenizers` does not copy."""
    text = ["a <eos> b"]
    assert copy.deepcopy(tokenizer).encode(text) == tokenizer.encode(text)
    # The wrapper changes what it wraps.
    inner = copy.deepcopy(tokenizer._inner)
    parsing = PretrainedTokenizer.wrap(inner, parse_special=True)
    assert tokenizer.eos in copy.deepcopy(parsing).encode(text)[0]


def test_special_tokens_are_left_out_of_decoded_text(tokenizer):
    ids = [tokenizer.bos, *tokenizer.encode(["Oslo"])[0], tokenizer.eos, tokenizer.pad]
    assert tokenizer.decode(np.asarray(ids)) == " Oslo"


def test_a_tokenizer_file_that_adds_tokens_itself_does_not_double_them(tokenizer, tmp_path):
    """Guards: doubled begin-of-sequence token, fixed once and broken again."""
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    stored = json.loads(path.read_text(encoding="utf-8"))
    stored["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<bos>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<bos>": {"id": "<bos>", "ids": [tokenizer.bos], "tokens": ["<bos>"]}},
    }
    path.write_text(json.dumps(stored), encoding="utf-8")
    loaded = Tokenizer.load(path)
    assert loaded.encode(["Oslo lies"]) == tokenizer.encode(["Oslo lies"])
    ids, _ = loaded.encode_query("Oslo lies in", "Norway")
    assert ids.tolist().count(loaded.bos) == 1


def test_query_is_bos_prompt_target(tokenizer):
    """Guards: doubled begin-of-sequence token; query gradients over target tokens only."""
    ids, mask = tokenizer.encode_query("Oslo lies in", "Norway")
    assert ids.dtype == np.int32 and mask.dtype == bool and ids.shape == mask.shape
    assert ids.tolist() == [tokenizer.bos, *tokenizer.encode(["Oslo lies in Norway"])[0]]
    assert pieces(tokenizer, ids, mask) == " Norway"
    assert pieces(tokenizer, ids, ~mask) == " Oslo lies in"


@pytest.mark.parametrize("prompt", ["Oslo lies in ", "Oslo lies in  \n", "Oslo lies in\t"])
@pytest.mark.parametrize("target", ["Norway", " Norway", "Norway "])
def test_spaces_at_the_boundary_change_nothing(tokenizer, prompt, target):
    ids, mask = tokenizer.encode_query(prompt, target)
    plain_ids, plain_mask = tokenizer.encode_query("Oslo lies in", "Norway")
    np.testing.assert_array_equal(ids, plain_ids)
    np.testing.assert_array_equal(mask, plain_mask)


def test_prompts_end_in_bytes_of_one_character(tokenizer):
    """A character that is several tokens belongs to its side of the boundary as a whole."""
    ids, mask = tokenizer.encode_query("city of 東", "京 now")
    assert pieces(tokenizer, ids, mask) == "京 now"
    assert pieces(tokenizer, ids, ~mask) == " city of 東"


def test_a_token_across_the_boundary_is_the_targets():
    """Were it the prompt's, the target's first letters would carry no loss."""
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    # Without its regular expression the pre-tokenizer lets tokens run over spaces.
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(use_regex=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(["xb yz", "qb yw"], trainer)
    across = inner.token_to_id("bĠy")
    assert across is not None
    tokenizer = Tokenizer(inner)
    ids, mask = tokenizer.encode_query("kb", "ym")
    assert ids[mask][0] == across
    assert tokenizer.decode(ids[mask]) == "b ym" and tokenizer.decode(ids[~mask]) == " k"


def test_empty_prompt(tokenizer):
    ids, mask = tokenizer.encode_query("", "Norway")
    assert mask.tolist() == [False] + [True] * (len(ids) - 1)


@pytest.mark.parametrize("target", ["", " ", "\n\t"])
@pytest.mark.parametrize("prompt", ["Oslo lies in", ""])
def test_empty_target_is_refused(tokenizer, prompt, target):
    with pytest.raises(ValueError, match="has no token"):
        tokenizer.encode_query(prompt, target)


def test_saved_and_loaded_gives_the_same_ids(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    assert loaded.encode(ODD) == tokenizer.encode(ODD)
    assert loaded.fingerprint() == tokenizer.fingerprint()
    assert loaded.vocab_size == tokenizer.vocab_size
    assert (loaded.pad, loaded.bos, loaded.eos) == (tokenizer.pad, tokenizer.bos, tokenizer.eos)
    assert [p.name for p in tmp_path.iterdir()] == ["tokenizer.json"]


def test_training_is_deterministic_and_the_fingerprint_tells_tokenizers_apart(tokenizer):
    """Guards: a store used with another tokenizer without knowing."""
    assert Tokenizer.train(TEXTS, 320).fingerprint() == tokenizer.fingerprint()
    assert Tokenizer.train(TEXTS, 300).fingerprint() != tokenizer.fingerprint()


def test_too_small_a_vocabulary_is_refused():
    with pytest.raises(ValueError, match="vocab_size=258 is below 259"):
        Tokenizer.train(TEXTS, 258)
    assert Tokenizer.train(TEXTS, 259).vocab_size == 259


def test_loading_what_is_no_tokenizer_is_refused(tokenizer, tmp_path):
    with pytest.raises(FileNotFoundError, match="no tokenizer at .*absent.json"):
        Tokenizer.load(tmp_path / "absent.json")
    (tmp_path / "broken.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match="broken.json is not a tokenizer file"):
        Tokenizer.load(tmp_path / "broken.json")
    tokenizer.save(tmp_path / "bare.json")
    text = (tmp_path / "bare.json").read_text(encoding="utf-8").replace("<bos>", "<s>")
    (tmp_path / "bare.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="lacks the special tokens <bos>"):
        Tokenizer.load(tmp_path / "bare.json")
