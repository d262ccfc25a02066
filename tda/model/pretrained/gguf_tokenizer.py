"""The tokenizer in a GGUF file's metadata: byte-level BPE, or SentencePiece's BPE.

The file has tokens, merges or scores, and the name of the rule that splits text into words before
merges apply, but not the rule itself.
"""

import pathlib
import re

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from tda.data.pretrained_tokenizer import PretrainedTokenizer
from tda.model.pretrained.gguf_file import Gguf
from tda.model.pretrained.tensors import PretrainedError

# Kinds of tokens, as the format numbers them.
_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = range(1, 7)

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# How text is split into words, by the name in tokenizer.ggml.pre; None is GPT-2's rule.
_WORDS = {
    "gpt-2": None,
    "smollm": None,
    "llama-bpe": _LLAMA3,
    "dbrx": _LLAMA3,
    "qwen2": _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}"),
}


def load(path, parse_special: bool = False) -> PretrainedTokenizer:
    """Returns the tokenizer of a GGUF file.

    Raises:
        PretrainedError: an unknown kind of tokenizer, or an unknown rule that splits words.
    """
    source = Gguf(pathlib.Path(path))

    def value(key, default=None):
        return source.metadata(f"tokenizer.ggml.{key}", default)

    kind, tokens = value("model"), value("tokens")
    if kind not in ("gpt2", "llama") or not tokens:
        raise PretrainedError(f"{path}: a tokenizer of the kind {kind!r} is not known here")
    types = value("token_type", [_NORMAL] * len(tokens))
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if kind == "gpt2":
        inner = _byte_level(path, vocabulary, value("merges", []), value("pre"))
        adds_bos = value("pre") == "llama-bpe"
    else:
        scores, prefix = value("scores", []), value("add_space_prefix", True)
        inner = _sentencepiece(vocabulary, types, scores, value("unknown_token_id"), prefix)
        adds_bos = True
    special = [t for t, k in zip(tokens, types, strict=True) if k == _CONTROL]
    inner.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    if kind == "gpt2":
        user_defined = [t for t, k in zip(tokens, types, strict=True) if k == _USER]
        inner.add_tokens([AddedToken(t, normalized=False) for t in user_defined])
    bos, eos = value("bos_token_id"), value("eos_token_id")
    return PretrainedTokenizer(
        inner,
        begin=[bos] if value("add_bos_token", adds_bos) and bos is not None else [],
        end=[eos] if value("add_eos_token", False) and eos is not None else [],
        eos=eos,
        pad=value("padding_token_id"),
        parse_special=parse_special,
    )


def _byte_level(path, vocabulary, merges, words: str | None) -> tokenizers.Tokenizer:
    if words not in _WORDS:
        raise PretrainedError(
            f"{path}: tokenizer.ggml.pre={words!r} is not known here; known are "
            f"{', '.join(_WORDS)}; give the tokenizer.json of the model instead"
        )
    pairs = [tuple(m.split(" ")) for m in merges]
    # Llama 3 keeps a word that is a token, even if merges do not lead to it.
    ignore_merges = words == "llama-bpe"
    inner = tokenizers.Tokenizer(models.BPE(vocabulary, pairs, ignore_merges=ignore_merges))
    pattern = _WORDS[words]
    steps = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)]
    if pattern is not None:
        steps.insert(0, pre_tokenizers.Split(Regex(pattern), "isolated"))
    if words == "smollm":
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    if words == "qwen2":
        inner.normalizer = normalizers.NFC()
    inner.pre_tokenizer = pre_tokenizers.Sequence(steps)
    inner.decoder = decoders.ByteLevel()
    return inner


def _sentencepiece(vocabulary, types, scores, unknown, prefix: bool) -> tokenizers.Tokenizer:
    normal = {t for t, i in vocabulary.items() if types[i] in (_NORMAL, _USER)}
    # SentencePiece has no merges: pairs are merged in the order of their union's score, and among
    # equal scores the pair with the shorter first half goes first.
    merges = [
        (-scores[vocabulary[token]], vocabulary[token], i, token[:i], token[i:])
        for token in normal
        if types[vocabulary[token]] == _NORMAL
        for i in range(1, len(token))
        if token[:i] in normal and token[i:] in normal
    ]
    pairs = [(a, b) for *_, a, b in sorted(merges)]
    unknown_token = next((t for t, i in vocabulary.items() if i == unknown), None)
    options = dict(unk_token=unknown_token, fuse_unk=True, byte_fallback=True)
    inner = tokenizers.Tokenizer(models.BPE(vocabulary, pairs, **options))
    user_defined = [token for token in normal if types[vocabulary[token]] == _USER]
    if user_defined:
        _isolate(inner, normal.difference(user_defined), user_defined, pairs, options)
    steps = [normalizers.Replace(" ", "▁")]
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), *steps] if prefix else steps)
    after = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    inner.decoder = decoders.Sequence([*after, decoders.Strip(" ", 1, 0)] if prefix else after)
    return inner


def _isolate(inner, merged: set[str], user_defined: list[str], pairs, options: dict) -> None:
    """Makes user-defined pieces tokens wherever the normalised text has them.

    SentencePiece finds them after it has put a space before the text and replaced spaces by "▁",
    the longest first, and merges nothing with them. An added token of `tokenizers` would be found
    before that.

    Args:
        inner: the tokenizer, whose model and pre-tokenizer change.
        merged: the other tokens.
        user_defined: the pieces.
        pairs, options: merges and further arguments of the BPE model.
    """
    longest_first = sorted(user_defined, key=len, reverse=True)
    pattern = Regex("|".join(re.escape(piece) for piece in longest_first))
    # With `ignore_merges`, a word that is a token stays one token, as an isolated piece must. A
    # token that no merges lead to, which SentencePiece never produces, would too, so it is renamed.
    words = sorted(merged)
    lone = [len(e.ids) == 1 for e in inner.encode_batch(words, add_special_tokens=False)]
    unreachable = {word for word, is_lone in zip(words, lone, strict=True) if not is_lone}
    vocabulary = {
        f"{word}\0" if word in unreachable else word: i for word, i in inner.get_vocab().items()
    }
    inner.model = models.BPE(vocabulary, pairs, ignore_merges=True, **options)
    inner.pre_tokenizer = pre_tokenizers.Split(pattern, "isolated")
