"""A long text is tokenised in pieces, to the tokens that it has as a whole."""

import numpy as np
import pytest
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, trainers

from tda.data import long_texts, part_files, parts, pieces, tokenised
from tda.data.corpora import Document
from tda.data.pretrained_tokenizer import PretrainedTokenizer
from tda.data.tokenizer import Tokenizer
from tests.data.test_pretrained_tokenizer import TEXTS, _metaspace, byte_level, steps_of
from tests.data.test_tokenised import Listed


def as_bytes(kind, prefix):
    inner = byte_level()
    inner.normalizer, inner.pre_tokenizer = steps_of(kind, prefix)
    return inner


def unigram():
    """As T5's: its normalizer drops white space at the ends, and joins runs of it."""
    inner = tokenizers.Tokenizer(models.Unigram())
    inner.normalizer = normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.Strip(),
            normalizers.Replace(tokenizers.Regex(" {2,}"), " "),
        ]
    )
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False
    )
    inner.train_from_iterator(TEXTS, trainer)
    return inner


def word_piece():
    inner = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]", max_input_chars_per_word=50))
    inner.normalizer = normalizers.BertNormalizer()
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=200, special_tokens=["[UNK]"], show_progress=False
    )
    inner.train_from_iterator(TEXTS, trainer)
    return inner


def by_length():
    """Words of seven characters: where they begin depends on the beginning of the text."""
    inner = byte_level()
    steps = [pre_tokenizers.FixedLength(7), pre_tokenizers.ByteLevel(False, use_regex=False)]
    inner.pre_tokenizer = pre_tokenizers.Sequence(steps)
    return inner


KINDS = {
    "bytes": lambda: as_bytes("bytes", False),
    "bytes-prefix": lambda: as_bytes("bytes", True),
    "qwen2": lambda: as_bytes("qwen2", False),
    "cohere": lambda: as_bytes("cohere", False),
    "neox": lambda: as_bytes("neox", False),
    "llama2": lambda: _metaspace(False),
    "gemma": lambda: _metaspace(False, "gemma"),
    "unigram": unigram,
    "word-piece": word_piece,
    "by-length": by_length,
}
_RNG = np.random.default_rng(0)
_PIECES = [
    *"abcXYZ 0123\n\t.,;é日本語🙂ß",
    "  ",
    "Bonn ",
    "\n\n",
    "don't ",
    " the",
    "e\u0301",
    *TEXTS,
]
LONG = {
    "words": " ".join(TEXTS) * 40,
    "mixed": "".join(_RNG.choice(_PIECES, 1500)),
    "a word": "ab" * 2500,
    "digits": "1234567" * 700,
    "spaces": "Bonn" + " " * 3000 + "is" + "\n" * 1500 + "a city.",
    "unspaced": "日本語はとても美しい言葉です" * 250,
}


@pytest.mark.parametrize("text", LONG)
@pytest.mark.parametrize("kind", KINDS)
def test_pieces_have_the_tokens_of_the_whole(kind, text, monkeypatch):
    monkeypatch.setattr(long_texts, "PIECE", 600)
    tokenizer = PretrainedTokenizer(KINDS[kind]())
    pieces = list(long_texts.encode_pieces(tokenizer, LONG[text]))
    ((ids, places),) = tokenizer.encode_spans([LONG[text]])
    assert np.concatenate([p.ids for p in pieces]).tolist() == ids
    assert np.concatenate([p.places for p in pieces]).tolist() == list(map(list, places))


def test_words_are_never_encoded_in_one_call(monkeypatch):
    monkeypatch.setattr(long_texts, "PIECE", 600)
    tokenizer = Tokenizer.train(TEXTS, 300)
    lengths, encode_words = [], tokenizer.encode_words
    monkeypatch.setattr(
        tokenizer, "encode_words", lambda x: (lengths.append(len(x)), encode_words(x))[1]
    )
    pieces = list(long_texts.encode_pieces(tokenizer, LONG["words"]))
    assert max(lengths) == 600 and len(pieces) > 10
    # The overlaps are encoded twice, and no more.
    assert sum(lengths) < 1.4 * len(LONG["words"])


@pytest.mark.parametrize("begin", [[], [0]])
@pytest.mark.parametrize("end", [[], [1]])
@pytest.mark.parametrize("context", [5, 64, 100_000])
def test_passages_of_a_long_document_are_those_of_the_whole(begin, end, context, monkeypatch):
    tokenizer = PretrainedTokenizer(byte_level(), begin=begin, end=end)
    documents = [Document("a", TEXTS[0]), Document("b", LONG["mixed"]), Document("c", "x")]
    documents += [Document("p", LONG["words"][:900], LONG["words"][:3000])]
    tables = []
    for piece in (1 << 20, 600):
        monkeypatch.setattr(long_texts, "PIECE", piece)
        tables.append(tokenised.tokenise_in_memory(documents, tokenizer, context))
    (a, counts), (b, other) = tables
    assert counts == other and list(a.ids) == list(b.ids)
    for name in ("tokens", "starts", "scored"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


def test_a_document_longer_than_a_part_resumes_to_the_same_table(tmp_path, monkeypatch):
    """Guards: memory that grows with a document; its passages twice, or under another's name."""
    tokenizer = PretrainedTokenizer(byte_level(), begin=[0])
    documents = [Document(f"d{i}", LONG["words"][: 3000 * (i % 2) + 90]) for i in range(4)]
    whole, counts = tokenised.tokenise_in_memory(documents, tokenizer, 24)
    monkeypatch.setattr(long_texts, "PIECE", 600)
    monkeypatch.setattr(parts, "PART_TOKENS", 400)
    monkeypatch.setattr(pieces, "BATCH", 1)
    monkeypatch.setattr(pieces, "BATCHES_A_PART", 2)
    write, sizes = part_files.write, []

    class Killed(Exception):
        pass

    for survivors in range(40):
        left = iter(range(survivors))

        def killed(path, arrays, *arguments, left=left):
            if next(left, None) is None:
                raise Killed
            sizes.append(len(arrays["tokens"]))
            return write(path, arrays, *arguments)

        monkeypatch.setattr(part_files, "write", killed)
        try:
            table, same_counts = tokenised.tokenise_on_disk(
                tmp_path, Listed(documents), tokenizer, 24
            )
            break
        except Killed:
            # Each time it is killed, one file later.
            continue
    assert survivors > 3 and max(sizes) < 450
    assert same_counts == counts
    assert list(table.ids) == list(whole.ids) and list(table.documents) == list(whole.documents)
    for name in ("tokens", "starts", "scored"):
        np.testing.assert_array_equal(getattr(table, name), getattr(whole, name))
