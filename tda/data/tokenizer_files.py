"""The tokenizer of a Hugging Face directory, read as transformers reads it.

`tokenizer.json` decides how a text is split, and its template which tokens come before and after.
Some of transformers' classes overrule the template, or whether a text gets a space in front; the
rules below are those of transformers 5.24. Where that version splits a text differently from
tokenizer.json (its Llama class adds no space to a text that begins with one, and its GPT-2 class
does not split SmolLM's digits), the file is followed: the model was trained with it.
"""

import dataclasses
import json
import os
import pathlib
import warnings

import tokenizers
from tokenizers import AddedToken, models

from tda.data.chats import ChatTemplate

# The files of a model's directory that decide a text's ids.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
_SPECIAL_NAMES = (
    *("bos_token", "eos_token", "unk_token", "sep_token"),
    *("pad_token", "cls_token", "mask_token"),
)


@dataclasses.dataclass(frozen=True)
class _ClassRules:
    """The rules of a class of transformers beyond its files.

    Attributes:
        tokens: special tokens by name, unless the files have others.
        puts_prefix: whether a text gets a space in front if `add_prefix_space` is absent, whatever
            tokenizer.json says; None where tokenizer.json decides.
        begins: whether the begin-of-sequence token comes first, whatever the template says; None
            where the template decides.
    """

    tokens: dict[str, str] = dataclasses.field(default_factory=dict)
    puts_prefix: bool | None = None
    begins: bool | None = None


_END_OF_TEXT = "<|endoftext|>"
_LLAMA_TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
_GEMMA_TOKENS = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
_GPT2_TOKENS = {"bos_token": _END_OF_TEXT, "eos_token": _END_OF_TEXT}
_QWEN_TOKENS = {"eos_token": _END_OF_TEXT, "pad_token": _END_OF_TEXT}
_COHERE_TOKENS = {
    "bos_token": "<BOS_TOKEN>",
    "eos_token": "<|END_OF_TURN_TOKEN|>",
    "pad_token": "<PAD>",
}
_RULES = {
    "CodeGenTokenizer": _ClassRules(_GPT2_TOKENS, puts_prefix=False),
    "CodeLlamaTokenizer": _ClassRules(_LLAMA_TOKENS, puts_prefix=True, begins=True),
    "CohereTokenizer": _ClassRules(_COHERE_TOKENS, puts_prefix=False),
    "GemmaTokenizer": _ClassRules(_GEMMA_TOKENS),
    "GPT2Tokenizer": _ClassRules(_GPT2_TOKENS, puts_prefix=False),
    "GPTNeoXTokenizer": _ClassRules(
        _GPT2_TOKENS | {"pad_token": "<|padding|>"}, puts_prefix=False, begins=False
    ),
    "LlamaTokenizer": _ClassRules(_LLAMA_TOKENS, puts_prefix=True),
    "Qwen2Tokenizer": _ClassRules(_QWEN_TOKENS, puts_prefix=False),
}
# What a file may state of a token beside its content.
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized")
# The class of transformers that follows tokenizer.json alone.
_PLAIN = "TokenizersBackend"
# The classes that belong to models, by `model_type` in config.json.
_CLASS_OF_MODEL = {
    **dict.fromkeys(("gemma", "gemma2", "gemma3", "gemma3_text"), "GemmaTokenizer"),
    **dict.fromkeys(("gpt2", "gptj", "gpt_neo", "opt", "phi", "starcoder2"), "GPT2Tokenizer"),
    **dict.fromkeys(("gpt_neox", "olmo", "olmoe", "mpt"), "GPTNeoXTokenizer"),
    **dict.fromkeys(("qwen2", "qwen3", "qwen2_moe", "qwen3_moe"), "Qwen2Tokenizer"),
    **dict.fromkeys(("cohere", "cohere2"), "CohereTokenizer"),
    **dict.fromkeys(("mistral", "mixtral", "olmo2", "olmo3"), _PLAIN),
    **dict.fromkeys(("granite", "phi3", "stablelm"), _PLAIN),
}
# Models whose files often name another class than the one that they need.
_CLASS_OF_MODEL_WINS = ("qwen2",)


@dataclasses.dataclass(frozen=True)
class TokenizerParts:
    """A tokenizer and the ids around its texts.

    Attributes:
        inner: the tokenizer.
        begin, end: ids before and after every text.
        eos, pad: ids of the tokens that end a document and fill a batch, or None.
        chat: the template of chats, or None.
    """

    inner: tokenizers.Tokenizer
    begin: tuple[int, ...]
    end: tuple[int, ...]
    eos: int | None
    pad: int | None
    chat: ChatTemplate | None = None


def read(path) -> TokenizerParts:
    """Reads a model's directory, or its `tokenizer.json` with the files beside it.

    Raises:
        FileNotFoundError: there is no tokenizer.json.
        ValueError: a file is damaged, or gives a token another id than the tokenizer does.
    """
    path = pathlib.Path(os.path.expanduser(path))
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.exists():
        raise FileNotFoundError(
            f"{file}: no such file; convert a tokenizer of another form (tokenizer.model) by "
            "transformers' AutoTokenizer.from_pretrained(…).save_pretrained(…)"
        )
    try:
        inner = tokenizers.Tokenizer.from_file(os.fspath(file))
    except Exception as error:  # the library raises bare Exceptions
        raise ValueError(f"{file} is not a tokenizer file: {error}") from error
    config = read_json(file.with_name("tokenizer_config.json"))
    if "added_tokens_decoder" not in config:
        config |= read_json(file.with_name("special_tokens_map.json"))
    class_name = _find_class(file, config, inner)
    rules = _RULES.get(class_name, _ClassRules())
    listed = read_json(file.with_name("added_tokens.json"))
    names = _special_tokens(config, rules, inner, listed)
    _add_tokens(file, inner, config, names, listed)
    prefix = config.get("add_prefix_space")
    if rules.puts_prefix is not None:
        is_put = rules.puts_prefix if prefix is None else bool(prefix)
        for kind, state in _prefix_changes(inner, is_put).items():
            setattr(inner, kind, component(kind, state))
    elif prefix is not None and _prefix_changes(inner, bool(prefix)):
        _warn_of_flag(file, "add_prefix_space", config)
    ids = {name: inner.token_to_id(token) for name, token in names.items()}
    begin, end = template = read_template(inner)
    if rules.begins is not None:
        begin, end = ((ids["bos_token"],) if rules.begins else ()), ()
        if (begin, end) != template:
            warnings.warn(
                f"{file}: its post_processor puts the ids {template} around a text, but "
                f"transformers' class {class_name} overrules it by {(begin, end)}; if the file is "
                f"right, set tokenizer_class in tokenizer_config.json to {_PLAIN}",
                stacklevel=2,
            )
    for flag, name, around in (
        ("add_bos_token", "bos_token", begin),
        ("add_eos_token", "eos_token", end),
    ):
        if config.get(flag) is not None and bool(config[flag]) != (ids.get(name) in around):
            _warn_of_flag(file, flag, config)
    chat = read_chat_template(_chat_source(file, config), names)
    return TokenizerParts(inner, begin, end, ids.get("eos_token"), ids.get("pad_token"), chat)


def _chat_source(file: pathlib.Path, config: dict):
    # A file of its own comes before the configuration's text, as in transformers.
    template = file.with_name("chat_template.jinja")
    return (
        template.read_text(encoding="utf-8") if template.exists() else config.get("chat_template")
    )


def read_chat_template(source, special_tokens: dict[str, str]) -> ChatTemplate | None:
    """Returns a tokenizer's template of chats; of several by name, the one named "default".

    Args:
        source: the template, or several: {name: template}, or a list of {"name", "template"}.
        special_tokens: the tokens that it may use, by name.
    """
    if isinstance(source, list):
        source = {x["name"]: x["template"] for x in source}
    if isinstance(source, dict):
        source = source.get("default")
    return None if source is None else ChatTemplate(source, tuple(sorted(special_tokens.items())))


def _warn_of_flag(file: pathlib.Path, flag: str, config: dict) -> None:
    warnings.warn(
        f"{file.with_name('tokenizer_config.json')}: {flag}={config[flag]} does not count beside "
        f"{file.name}, as in transformers; to change the tokens before and after a text, change "
        f"{file.name} (its post_processor or pre_tokenizer)",
        stacklevel=2,
    )


def read_json(file: pathlib.Path) -> dict:
    """Returns the settings in a JSON file of a model; none if there is no file.

    Raises:
        ValueError: it is not a JSON object.
    """
    if not file.exists():
        return {}
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not JSON ({error})") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file} is a {type(values).__name__}, not an object of settings")
    return values


def _find_class(file: pathlib.Path, config: dict, inner: tokenizers.Tokenizer) -> str:
    """Returns the class that transformers' AutoTokenizer takes, without "Fast"."""
    model = read_json(file.with_name("config.json"))
    model_type = model.get("model_type")
    of_model = _CLASS_OF_MODEL.get(model_type, "")
    stated = str(config.get("tokenizer_class") or model.get("tokenizer_class") or "")
    stated = stated.removesuffix("Fast")
    if stated == "LlamaTokenizer" and '"ByteLevel"' in _state(inner):
        return _PLAIN  # Llama 3, whose tokenizer is not SentencePiece's
    if not stated or of_model == _PLAIN or model_type in _CLASS_OF_MODEL_WINS:
        return of_model or stated
    return stated


def _state(inner: tokenizers.Tokenizer) -> str:
    """Returns the steps before and after the tokenizer's model, as JSON."""
    steps = (inner.normalizer, inner.pre_tokenizer, inner.post_processor, inner.decoder)
    return json.dumps([json.loads(step.__getstate__()) for step in steps if step is not None])


def _content(token) -> str | None:
    return token.get("content") if isinstance(token, dict) else token


def _special_tokens(config: dict, rules: _ClassRules, inner, listed: dict) -> dict[str, str]:
    """Returns the special tokens by name: those of the files, else those of the class."""
    vocabulary = inner.get_vocab() | listed
    named = {k: t for k, t in rules.tokens.items() if t in vocabulary}
    named |= {k: _content(v) for k, v in config.items() if k in _SPECIAL_NAMES}
    return {name: token for name, token in named.items() if token}


def _add_tokens(file, inner, config: dict, names: dict[str, str], listed: dict) -> None:
    """Adds the tokens that only the tokenizer's configuration lists.

    Raises:
        ValueError: a token gets another id than its file says.
    """
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    extra = list(extra.values()) if isinstance(extra, dict) else extra
    special = {*names.values(), *(_content(token) for token in extra)}
    decoder = config.get("added_tokens_decoder")
    if decoder is not None:
        stated = {int(i): AddedToken(**token) for i, token in decoder.items()}
    else:
        stated = {
            i: AddedToken(token, normalized=token not in special, special=token in special)
            for token, i in listed.items()
        } | inner.get_added_tokens_decoder()
    existing = inner.get_added_tokens_decoder()
    for i, token in sorted(stated.items(), key=lambda item: item[0]):
        # The library compares added tokens by their content; transformers by all of their flags.
        if repr(existing.get(i)) != repr(token):
            inner.add_tokens([token])
        if inner.token_to_id(token.content) != i:
            raise ValueError(
                f"{file.parent}: the configuration gives the token {token.content!r} the id {i}, "
                f"but {file.name} gives it {inner.token_to_id(token.content)}; fetch the "
                "tokenizer's files again, all of one version"
            )
    known = {token.content for token in inner.get_added_tokens_decoder().values()}
    absent = [t for t in dict.fromkeys([*names.values(), *map(_content, extra)]) if t not in known]
    stated_flags = {_content(t): t for t in [*config.values(), *extra] if isinstance(t, dict)}
    for token in absent:
        flags = {k: v for k, v in stated_flags.get(token, {}).items() if k in _FLAGS}
        inner.add_tokens([AddedToken(token, special=True, **flags)])


def _prefix_changes(inner: tokenizers.Tokenizer, is_put: bool) -> dict[str, dict | None]:
    """Returns the new states of the steps that must change so that a space is put or not."""
    changes: dict[str, dict | None] = {}
    for kind in ("normalizer", "pre_tokenizer", "decoder"):
        step = getattr(inner, kind)
        if step is not None:
            state = json.loads(step.__getstate__())
            changed = _with_prefix(state, is_put)
            changes |= {kind: changed} if changed != state else {}
    steps = [s.__getstate__() for s in (inner.normalizer, inner.pre_tokenizer) if s is not None]
    if is_put and not any(name in s for s in steps for name in (*_PREFIXING, b"ByteLevel")):
        metaspace = {"type": "Metaspace", "replacement": "▁", "split": False}
        changes["pre_tokenizer"] = metaspace | {"prepend_scheme": "first"}
    return changes


_PREFIXING = (b'"Prepend"', b'"Metaspace"')


def _with_prefix(state: dict, is_put: bool) -> dict | None:
    kind = state["type"]
    for key in ("normalizers", "pretokenizers", "decoders"):
        if key in state:
            children = [_with_prefix(child, is_put) for child in state[key]]
            return state | {key: [child for child in children if child is not None]}
    if kind == "ByteLevel":
        return state | {"add_prefix_space": is_put}
    if kind == "Metaspace":
        # "always" and "first" differ only in a text with tokens of the kind that is never split.
        is_right = (state["prepend_scheme"] != "never") == is_put
        return state if is_right else state | {"prepend_scheme": "first" if is_put else "never"}
    if kind == "Prepend" or (kind == "Strip" and state.get("start")):
        return state if is_put else None
    return state


def component(kind: str, state: dict | None):
    """Returns a part of a tokenizer ("normalizer", "post_processor", …) from its JSON state."""
    empty = json.loads(tokenizers.Tokenizer(models.BPE()).to_str())
    return getattr(tokenizers.Tokenizer.from_str(json.dumps(empty | {kind: state})), kind)


def without_template(state: dict | None) -> dict | None:
    """Returns a post-processor's JSON state without the tokens that it puts around a text."""
    if state is None or state["type"] == "ByteLevel":
        return state  # it trims the characters that belong to a token
    if state["type"] == "RobertaProcessing":
        flags = {key: state[key] for key in ("add_prefix_space", "trim_offsets")}
        return {"type": "ByteLevel", "use_regex": True} | flags
    if state["type"] == "Sequence":
        steps = [without_template(step) for step in state["processors"]]
        steps = [step for step in steps if step is not None]
        return state | {"processors": steps} if len(steps) > 1 else next(iter(steps), None)
    return None


def with_template(
    state: dict | None, begin: list[str], end: list[str], ids: dict[str, int]
) -> dict:
    """Returns a post-processor's JSON state that puts tokens around a text.

    Args:
        state: a state from `without_template`.
        begin, end: tokens before and after the text.
        ids: their ids.
    """

    def special(tokens):
        return [{"SpecialToken": {"id": token, "type_id": 0}} for token in tokens]

    texts = [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"]
    template = {
        "type": "TemplateProcessing",
        "single": [*special(begin), texts[0], *special(end)],
        "pair": [*special(begin), *texts, *special(end)],
        "special_tokens": {t: {"id": t, "ids": [i], "tokens": [t]} for t, i in ids.items()},
    }
    return {"type": "Sequence", "processors": [*([state] if state else []), template]}


def read_template(inner: tokenizers.Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the ids that a tokenizer itself puts before and after a text.

    Raises:
        ValueError: the template drops or repeats the text.
    """
    if inner.post_processor is None:
        return (), ()
    # A text of one token that no vocabulary has, so that it differs from the template's tokens.
    probe = 2**32 - 1
    word = tokenizers.Tokenizer(models.WordLevel({"x": probe}, unk_token="x")).encode("x")
    ids = inner.post_processor.process(word, None, True).ids
    if ids.count(probe) != 1:
        raise ValueError("the tokenizer's template changes the text itself; it cannot be used")
    place = ids.index(probe)
    return tuple(ids[:place]), tuple(ids[place + 1 :])
