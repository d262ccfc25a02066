"""Tokenizers that come with a model: its ids, its template once, and targets at their place."""

import json
import types
import warnings

import numpy as np
import pytest
import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from tda.data import tokenised
from tda.data.documents import Document
from tda.data.pretrained_tokenizer import PretrainedTokenizer
from tda.data.tokenizer_files import read_template

TEXTS = [
    "Ludwig van Beethoven was born in Bonn.",
    "It rained for 12 days, 日本語 and é too.\n\n  Twice  as much…",
    "def f(x):\n\treturn x + 1  # 🙂",
]


def byte_level(template=False, size=320):
    """A byte-level BPE as Llama 3's: a template puts <s> before every text."""
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(TEXTS, trainer)
    if template:
        inner.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
        )
    return inner


def write(directory, inner, **config):
    inner.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


NAMES = dict(
    bos_token="<s>", eos_token={"__type": "AddedToken", "content": "</s>"}, pad_token="<pad>"
)


def test_ids_are_the_tokenizers_own_and_texts_come_back(tmp_path):
    inner = byte_level()
    inner.enable_truncation(4)
    inner.enable_padding(length=9)
    found = PretrainedTokenizer.load(write(tmp_path, inner, **NAMES))
    plain = byte_level()
    for text in [*TEXTS, "", " ", "a"]:
        (ids,) = found.encode([text])
        # Guards: a tokenizer that was saved with truncation or padding set.
        assert ids == plain.encode(text, add_special_tokens=False).ids
        assert found.decode(ids) == text
    assert (found.begin, found.end, found.eos, found.pad) == ((), (), 1, 2)
    assert found.vocab_size == 320


@pytest.mark.parametrize(
    ("template", "flags", "warned"),
    [
        (False, {}, ()),
        (True, {}, ()),
        (True, dict(add_bos_token=True, add_eos_token=False), ()),
        (True, dict(add_bos_token=False), ("add_bos_token=False",)),
        (False, dict(add_bos_token=True, add_eos_token=True), ("add_bos_token", "add_eos_token")),
        (True, dict(add_prefix_space=True), ("add_prefix_space=True",)),
    ],
)
def test_the_template_decides_what_stands_around_a_text(tmp_path, template, flags, warned):
    directory = write(tmp_path, byte_level(template), **NAMES, **flags)
    with warnings.catch_warnings(record=True) as messages:
        warnings.simplefilter("always")
        found = PretrainedTokenizer.load(directory)
    assert len(messages) == len(warned)
    for flag, message in zip(warned, messages, strict=True):
        assert f"{flag}" in str(message.message) and "does not count" in str(message.message)
    assert (found.begin, found.end) == ((0,) if template else (), ())
    ids = found.sequence("Bonn")
    assert ids == [*found.begin, *byte_level().encode("Bonn").ids]


@pytest.mark.parametrize("around", [dict(), dict(begin=[0]), dict(begin=[0, 2], end=[1])])
@pytest.mark.parametrize("trims", [True, False])
def test_a_saved_tokenizer_is_the_same(tmp_path, around, trims):
    inner = byte_level()
    inner.post_processor = processors.ByteLevel(trim_offsets=True) if trims else None
    found = PretrainedTokenizer(inner, **around, eos=1, pad=2)
    found.save(tmp_path)
    copy = PretrainedTokenizer.load(tmp_path)
    assert (copy.begin, copy.end, copy.eos, copy.pad) == (found.begin, found.end, 1, 2)
    assert copy.encode_spans(TEXTS) == found.encode_spans(TEXTS)
    assert copy.fingerprint() == found.fingerprint()


@pytest.mark.parametrize(
    "template",
    [
        processors.TemplateProcessing("<s> $A </s>", "$A $B", [("<s>", 7), ("</s>", 9)]),
        processors.BertProcessing(("</s>", 9), ("<s>", 7)),
        processors.RobertaProcessing(("</s>", 9), ("<s>", 7)),
        processors.Sequence(
            [
                processors.ByteLevel(),
                processors.TemplateProcessing("<s> $A </s>", "$A $B", [("<s>", 7), ("</s>", 9)]),
            ]
        ),
    ],
)
def test_a_template_is_read_whatever_the_vocabulary(template):
    """Guards: a template read by a word that a vocabulary without Latin letters has not."""
    inner = tokenizers.Tokenizer(models.WordLevel({"日": 0, "本": 1, "?": 2}, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.post_processor = template
    for model in (inner, tokenizers.Tokenizer(models.BPE())):
        model.post_processor = template
        assert read_template(model) == ((7,), (9,))
    found = PretrainedTokenizer.wrap(inner)
    assert found.sequence("日本") == [7, 0, 1, 9]
    inner.post_processor = processors.TemplateProcessing("$A $A", "$A $B", [])
    with pytest.raises(ValueError, match="template changes the text itself"):
        PretrainedTokenizer.wrap(inner)


def test_tokens_of_every_file_are_added(tmp_path):
    """Guards: a token that only the configuration lists, split into letters."""
    token = dict(content="<new>", lstrip=False, rstrip=False, single_word=False, normalized=False)
    stated = {"320": token | {"special": True}, "321": token | {"content": "<tab>"}}
    directory = write(tmp_path, byte_level(), **NAMES, added_tokens_decoder=stated)
    found = PretrainedTokenizer.load(directory, parse_special=True)
    assert found.encode(["<new><tab>"]) == [[320, 321]]
    # A special token is text unless it is parsed; any other is always a token.
    assert PretrainedTokenizer.load(directory).encode(["<new><tab>"])[0][-1:] == [321]
    assert len(PretrainedTokenizer.load(directory).encode(["<new><tab>"])[0]) > 2
    write(tmp_path, byte_level(), **NAMES, extra_special_tokens=["<more>"])
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<new>": 320}))
    assert PretrainedTokenizer.load(tmp_path, True).encode(["<new><more>"]) == [[320, 321]]
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<new>": 400}))
    with pytest.raises(ValueError, match="'<new>' the id 400, but tokenizer.json gives it 320"):
        PretrainedTokenizer.load(tmp_path)


@pytest.mark.parametrize("place", ["mask_token", "extra_special_tokens"])
def test_a_special_token_keeps_what_the_configuration_states_of_it(tmp_path, place):
    """Guards: a space that is a token of its own, where transformers counts it to the next."""
    token = {"__type": "AddedToken", "content": "<mask>", "lstrip": True, "special": True}
    listed = [token] if place == "extra_special_tokens" else token
    directory = write(tmp_path, byte_level(), **NAMES, **{place: listed})
    (ids,) = PretrainedTokenizer.load(directory, parse_special=True).encode(["a  <mask>b"])
    assert ids == [*byte_level().encode("a").ids, 320, *byte_level().encode("b").ids]


def test_special_tokens_count_as_the_models_only_if_used(tmp_path):
    """Guards: Gemma 3's text model refused for an image token that no text has."""
    directory = write(tmp_path, byte_level(), **NAMES, extra_special_tokens=["<image>"])
    assert PretrainedTokenizer.load(directory).vocab_size == 320
    assert PretrainedTokenizer.load(directory, parse_special=True).vocab_size == 321
    write(tmp_path, byte_level(), **NAMES | dict(eos_token="<end>"))
    assert PretrainedTokenizer.load(directory).vocab_size == 321


def test_the_beginning_is_never_doubled(tmp_path):
    """Guards: doubled begin-of-sequence token, fixed once and broken again."""
    directory = write(tmp_path, byte_level(template=True), **NAMES)
    for parse_special in (False, True):
        found = PretrainedTokenizer.load(directory, parse_special)
        for text in ("Bonn", "<s>Bonn", "<s> Bonn"):
            assert found.sequence(text).count(0) == 1
            assert found.encode_query(text, "x")[0].tolist().count(0) == 1
            table, _ = tokenised.tokenise_in_memory([Document("a", text)], found, 64)
            assert table.tokens.tolist().count(0) == 1
    # Without parse_special, what is spelled out is text; with it, it is the token.
    plain, parsed = (PretrainedTokenizer.load(directory, p) for p in (False, True))
    assert plain.decode(plain.encode(["</s>Bonn"])[0]) == "</s>Bonn"
    assert parsed.encode(["</s>Bonn"])[0][0] == 1


@pytest.mark.parametrize("begin", [(), (0,)])
@pytest.mark.parametrize(
    ("prompt", "target"),
    [
        ("Ludwig was born in", "Bonn"),
        ("Ludwig was born in", " Bonn"),
        ("Ludwig was born in ", "Bonn"),
        ("Answer:\n", "日本語 12"),
        ("Answer:\n\n", "  Bonn"),
        ("Twice  as", "much…"),
    ],
)
def test_the_target_is_the_tokens_after_the_prompt(begin, prompt, target):
    found = PretrainedTokenizer(byte_level(), begin=begin)
    ids, is_target = found.encode_query(prompt, target)
    assert ids.dtype == np.int32 and len(ids) == len(is_target)
    spaced = prompt[-1].isspace() or target[0].isspace()
    joined = f"{prompt}{target}" if spaced else f"{prompt} {target}"
    assert found.decode(ids) == joined
    assert found.decode(ids[is_target]).strip() == target.strip()
    assert not is_target[: len(begin)].any()
    first = int(np.flatnonzero(is_target)[0])
    assert is_target[first:].all()


def test_tokenizers_in_other_forms(tmp_path):
    inner = byte_level(template=True)
    inner.enable_truncation(4)
    other = types.SimpleNamespace(backend_tokenizer=inner, eos_token_id=1, pad_token_id=2)
    expected = PretrainedTokenizer.load(write(tmp_path, byte_level(template=True), **NAMES))
    for form in (other, inner, tmp_path, str(tmp_path), expected):
        found = PretrainedTokenizer.wrap(form)
        assert found.sequence(TEXTS[1]) == expected.sequence(TEXTS[1])
        assert found.begin == (0,)
    assert PretrainedTokenizer.wrap(expected) is expected
    found = PretrainedTokenizer.wrap(other)
    assert (found.eos, found.pad) == (1, 2) and inner.truncation is not None
    with pytest.raises(TypeError, match="int is not a known kind of tokenizer"):
        PretrainedTokenizer.wrap(3)


def test_what_cannot_be_asked_is_told():
    found = PretrainedTokenizer(byte_level())
    with pytest.raises(ValueError, match="has no token of its own; give more than white space"):
        found.encode_query("Bonn lies in", "\n")
    with pytest.raises(ValueError, match="no token comes before the target 'Bonn'"):
        found.encode_query("", "Bonn")
    ids, is_target = PretrainedTokenizer(byte_level(), begin=[0]).encode_query("", "Bonn")
    assert ids[0] == 0 and is_target[1:].all()


def test_merges_that_drop_out_give_the_same_ids_every_time(tmp_path):
    """Guards: other ids in every call, so that no stored token fits."""
    inner = byte_level()
    (expected,) = PretrainedTokenizer(byte_level()).encode(TEXTS[:1])
    inner.model.dropout = 0.9
    found = PretrainedTokenizer.load(write(tmp_path, inner, **NAMES))
    assert all(found.encode(TEXTS[:1]) == [expected] for _ in range(3))


@pytest.mark.parametrize("kind", [models.WordPiece, models.WordLevel])
def test_words_that_the_vocabulary_lacks_are_named(kind):
    """Guards: the library's bare exception, which names no text."""
    inner = tokenizers.Tokenizer(kind({"Oslo": 0, "Rome": 1}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PretrainedTokenizer(inner)
    assert tokenizer.encode(["Oslo Rome", "Rome"]) == [[0, 1], [1]]
    message = r"cannot encode the text 'Oslo and' \(.*UNK.*add the token for unknown words"
    with pytest.raises(ValueError, match=message):
        tokenizer.encode(["Rome", "Oslo and"])
    with pytest.raises(ValueError, match=message):
        tokenizer.encode_words("Oslo and")


def test_files_that_do_not_fit_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="save_pretrained"):
        PretrainedTokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="is not a tokenizer file"):
        PretrainedTokenizer.load(tmp_path)


@pytest.mark.parametrize("context", [1, 5, 8, 200])
@pytest.mark.parametrize("around", [dict(), dict(begin=[0]), dict(begin=[0], end=[1])])
def test_every_token_of_a_long_text_is_predicted_once(context, around):
    """Guards: tokens at the cuts of a document that no passage predicts."""
    found = PretrainedTokenizer(byte_level(), **around)
    documents = [Document("a", TEXTS[1]), Document("b", TEXTS[0])]
    table, counts = tokenised.tokenise_in_memory(documents, found, context)
    assert table.lengths.max() <= context + 1
    predicted = {"a": [], "b": []}
    for i, document in enumerate(table.documents):
        part = slice(table.starts[i], table.starts[i + 1])
        predicted[document] += table.tokens[part][table.scored[part]].tolist()
    for name, text in (("a", TEXTS[1]), ("b", TEXTS[0])):
        whole = [*found.encode([text])[0]]
        expected = whole if around else whole[1:]
        assert predicted[name] in (expected, expected + list(found.end))
    assert counts.documents == 2


def gguf_file(path, tokenizer_model, **fields):
    gguf = pytest.importorskip("gguf", reason="needs the extra `gguf`")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(tokenizer_model)
    for name, value in fields.items():
        add = {
            "tokens": writer.add_token_list,
            "merges": writer.add_token_merges,
            "types": writer.add_token_types,
            "scores": writer.add_token_scores,
            "pre": writer.add_tokenizer_pre,
            "bos": writer.add_bos_token_id,
            "eos": writer.add_eos_token_id,
            "unknown": writer.add_unk_token_id,
            "add_bos": writer.add_add_bos_token,
            "space": writer.add_add_space_prefix,
        }[name]
        add(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def test_byte_level_bpe_of_a_gguf_file(tmp_path):
    from tda.model.pretrained import gguf_tokenizer

    inner = byte_level()
    model = json.loads(inner.to_str())["model"]
    listed = sorted(model["vocab"], key=model["vocab"].get)
    file = gguf_file(
        tmp_path / "a.gguf",
        "gpt2",
        tokens=listed,
        merges=[" ".join(m) for m in model["merges"]],
        types=[3, 3, 3] + [1] * (len(listed) - 3),
        pre="gpt-2",
        bos=0,
        eos=1,
        add_bos=True,
    )
    found = gguf_tokenizer.load(file)
    assert (found.begin, found.end, found.eos) == ((0,), (), 1)
    for text in TEXTS:
        assert found.encode([text])[0] == inner.encode(text).ids
    # Other rules of words: digits apart, or by three.
    for pre, digits in (("smollm", 1), ("qwen2", 1), ("llama-bpe", 3)):
        fields = dict(tokens=listed, merges=[], types=[1] * len(listed), pre=pre)
        words = gguf_tokenizer.load(gguf_file(tmp_path / f"{pre}.gguf", "gpt2", **fields))
        split = words._inner.pre_tokenizer.pre_tokenize_str("in 12345")
        assert max(len(w) for w, _ in split if w.isdigit()) == digits
    with pytest.raises(ValueError, match="tokenizer.ggml.pre='tekken' is not known"):
        gguf_tokenizer.load(gguf_file(tmp_path / "b.gguf", "gpt2", tokens=listed, pre="tekken"))
    with pytest.raises(ValueError, match="kind 'bert' is not known"):
        gguf_tokenizer.load(gguf_file(tmp_path / "c.gguf", "bert", tokens=listed))


@pytest.mark.slow
@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("user_defined", [[], ["<tab>", "<tabs>", "▁▁▁", "▁▁", "nn", "日", "(x"]])
def test_sentencepiece_of_a_gguf_file_is_sentencepieces_own(tmp_path, prefix, user_defined):
    spm = pytest.importorskip("sentencepiece", reason="needs the extra `models`")
    from tda.model.pretrained import gguf_tokenizer

    text = tmp_path / "text.txt"
    text.write_text("\n".join(t.replace("\n", " ") for t in TEXTS) * 3)
    spm.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(tmp_path / "m"),
        model_type="bpe",
        vocab_size=340,
        byte_fallback=True,
        add_dummy_prefix=prefix,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
        user_defined_symbols=user_defined,
    )
    theirs = spm.SentencePieceProcessor(model_file=str(tmp_path / "m.model"))
    count = theirs.get_piece_size()
    kinds = [
        2 if theirs.is_unknown(i) else 3 if theirs.is_control(i) else 6 if theirs.is_byte(i) else 1
        for i in range(count)
    ]
    for piece in user_defined:
        kinds[theirs.piece_to_id(piece)] = 4
    file = gguf_file(
        tmp_path / "m.gguf",
        "llama",
        tokens=[theirs.id_to_piece(i) for i in range(count)],
        scores=[theirs.get_score(i) for i in range(count)],
        types=kinds,
        bos=1,
        eos=2,
        unknown=0,
        space=prefix,
    )
    ours = gguf_tokenizer.load(file)
    assert ours.begin == (1,)
    rng = np.random.default_rng(0)
    alphabet = [*"abdefghilnortuvw .,123日本é🙂", "  ", "<tab>", "<tabs>", "nn", "Bonn"]
    random = ["".join(rng.choice(alphabet, rng.integers(1, 40))) for _ in range(300)]
    for case in [*(t.replace("\n", " ") for t in TEXTS), *random, "  two  spaces ", "<tab>x", "(x"]:
        assert ours.encode([case])[0] == theirs.encode(case), case
        assert ours.decode(ours.encode([case])[0]) == case
    assert ours.encode([""])[0] == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["byte-level", "template", "llama-2"])
def test_ids_are_those_of_transformers(tmp_path, kind):
    transformers = pytest.importorskip("transformers", reason="needs the extra `models`")
    inner = byte_level(template=kind == "template")
    if kind == "llama-2":
        inner = _metaspace()
    write(tmp_path, inner, **NAMES, tokenizer_class="PreTrainedTokenizerFast")
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    ours = PretrainedTokenizer.load(tmp_path, parse_special=True)
    assert PretrainedTokenizer.wrap(theirs, True).fingerprint() == ours.fingerprint()
    rng = np.random.default_rng(1)
    pieces = [*"abcXYZ 019\n\t.,;é日本語🙂ß\u200d", "  ", "Bonn", "</s>", "don't", "12345"]
    texts = ["".join(rng.choice(pieces, rng.integers(0, 25))) for _ in range(400)]
    for text in ["", " ", "\n", *TEXTS, *texts]:
        assert ours.sequence(text) == theirs(text)["input_ids"], repr(text)


BYTES = pre_tokenizers.ByteLevel
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def steps_of(kind, prefix):
    """The normalizer and pre-tokenizer of a family's tokenizer.json."""
    if kind == "qwen2":
        split = pre_tokenizers.Split(Regex(QWEN2), "isolated")
        steps = [split, BYTES(add_prefix_space=prefix, use_regex=False)]
        return normalizers.NFC(), pre_tokenizers.Sequence(steps)
    if kind == "cohere":
        steps = [pre_tokenizers.Digits(individual_digits=True), BYTES(add_prefix_space=prefix)]
        return normalizers.NFC(), pre_tokenizers.Sequence(steps)
    return (normalizers.NFC() if kind == "neox" else None), BYTES(add_prefix_space=prefix)


# Each as on the hub: `model_type` of config.json, `tokenizer_class`, and what kind of file it has.
CLASSES = {
    "gpt2": ("gpt2", None, "bytes"),
    "gpt2-named": ("gpt2", "GPT2Tokenizer", "bytes"),
    "smollm": ("llama", "GPT2Tokenizer", "bytes"),
    "smollm3": ("smollm3", "PreTrainedTokenizerFast", "bytes"),
    "llama3": ("llama", "PreTrainedTokenizerFast", "bytes"),
    "deepseek": ("llama", "LlamaTokenizerFast", "bytes"),
    "neox": ("gpt_neox", "GPTNeoXTokenizer", "neox"),
    "olmo": ("olmo", "GPTNeoXTokenizerFast", "neox"),
    "olmo2": ("olmo2", "GPT2Tokenizer", "bytes"),
    "olmo3": ("olmo3", "GPT2Tokenizer", "bytes"),
    "stablelm": ("stablelm", "GPTNeoXTokenizerFast", "neox"),
    "phi": ("phi", "CodeGenTokenizer", "bytes"),
    "phi3": ("phi3", "GPT2Tokenizer", "bytes"),
    "starcoder2": ("starcoder2", "GPT2Tokenizer", "bytes"),
    "falcon": ("falcon", "PreTrainedTokenizerFast", "bytes"),
    "bloom": ("bloom", "BloomTokenizerFast", "bytes"),
    "opt": ("opt", "GPT2Tokenizer", "bytes"),
    "qwen2": ("qwen2", "Qwen2Tokenizer", "qwen2"),
    "qwen3": ("qwen3", "Qwen2TokenizerFast", "qwen2"),
    "cohere": ("cohere", "CohereTokenizerFast", "cohere"),
    "mistral-bytes": ("mistral", "PreTrainedTokenizerFast", "bytes"),
    "llama2": ("llama", "LlamaTokenizer", "metaspace"),
    "mistral": ("mistral", "LlamaTokenizerFast", "metaspace"),
    "codellama": ("llama", "CodeLlamaTokenizer", "metaspace"),
    "phi3-spm": ("phi3", "LlamaTokenizer", "metaspace"),
    "gemma": ("gemma2", "GemmaTokenizerFast", "gemma"),
    "gemma3": ("gemma3_text", "GemmaTokenizerFast", "gemma"),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*does not count:UserWarning")
@pytest.mark.filterwarnings("ignore:.*overrules it:UserWarning")
@pytest.mark.parametrize("template", [False, True])
@pytest.mark.parametrize("name", CLASSES)
def test_every_class_gives_the_ids_of_transformers(tmp_path, name, template):
    transformers = pytest.importorskip("transformers", reason="needs the extra `models`")
    model_type, class_name, kind = CLASSES[name]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    names = NAMES | (dict(unk_token="<unk>") if kind in ("metaspace", "gemma") else {})
    names |= dict(tokenizer_class=class_name) if class_name else {}
    flags = [{}] + [{k: v} for k in ("add_bos_token", "add_eos_token") for v in (False, True)]
    flags += [dict(add_prefix_space=v) for v in (False, True)]
    flags += [dict(special_tokens="apart")]
    rng = np.random.default_rng(1)
    pieces = [*"abcXYZ 019\n\t.,;é日本語🙂ß", "  ", "Bonn", "</s>", "don't", "<new>"]
    texts = ["".join(rng.choice(pieces, rng.integers(0, 25))) for _ in range(60)]
    for prefix in (False, True):
        for flag in flags:
            if kind in ("metaspace", "gemma"):
                inner = _metaspace(template, kind, prefix)
            else:
                inner = byte_level(template)
                inner.normalizer, inner.pre_tokenizer = steps_of(kind, prefix)
            config = names | flag
            if flag.pop("special_tokens", None):
                (tmp_path / "special_tokens_map.json").write_text(json.dumps(names))
                count = inner.get_vocab_size()
                (tmp_path / "added_tokens.json").write_text(json.dumps({"<new>": count}))
                config = dict(tokenizer_class=class_name) if class_name else {}
            write(tmp_path, inner, **config)
            theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
            ours = PretrainedTokenizer.load(tmp_path, parse_special=True)
            for text in ["", " ", "日本", *TEXTS, *texts]:
                if kind == "metaspace" and prefix and (text[:1] == " " or "<" in text):
                    # The file and the class differ where a space or a special token comes first;
                    # the file is as SentencePiece, by which the models were trained.
                    continue
                expected = theirs(text)["input_ids"]
                assert ours.sequence(text) == expected, (repr(text), flag, prefix)
            assert (ours.eos, theirs.bos_token) == (theirs.eos_token_id, theirs.bos_token)


def _metaspace(template=True, kind="metaspace", prefix=True):
    """As Llama 2's: spaces are letters, bytes stand for what is not in the vocabulary."""
    inner = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("(?<=.)(?= )"), "isolated")
    special = ["<s>", "</s>", "<pad>", "<unk>", *(f"<0x{i:02X}>" for i in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=360, special_tokens=special, show_progress=False)
    inner.train_from_iterator([TEXTS[0].replace(" ", "▁")], trainer)
    state = json.loads(inner.to_str())
    state["pre_tokenizer"] = None
    if kind == "gemma":
        split = pre_tokenizers.Split(" ", "merged_with_previous")
        state["pre_tokenizer"] = json.loads(split.__getstate__())
    state["added_tokens"] = [t for t in state["added_tokens"] if not t["content"].startswith("<0x")]
    state["normalizer"] = {
        "type": "Sequence",
        "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ],
    }
    if kind == "gemma" or not prefix:
        del state["normalizer"]["normalizers"][0]
    inner = tokenizers.Tokenizer.from_str(json.dumps(state))
    if template:
        inner.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
        )
    return inner
