"""Tokenizers that come with a pretrained model: read from `tokenizer.json`, or made from parts.

A text has the token ids that the model was trained with. The ids that the tokenizer itself puts
before and after a text (such as a begin-of-sequence token) are found once, by encoding a text with
and without them.
"""

import json
import os
import pathlib
from collections.abc import Sequence

import numpy as np
import tokenizers
from tokenizers import processors

from tda.runtime import atomic_file
from tda.runtime.fingerprint import fingerprint_parts

# The files of a model's directory that decide which ids a text gets.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)


class PretrainedTokenizer:
    """The tokenizer of a pretrained model.

    A sequence is `begin text end`; the tokenizer's template decides `begin` and `end`, which are
    often empty. A special token spelled out in a text is split into ordinary tokens, unless
    `parse_special` is set.

    Args:
        inner: the tokenizer.
        begin, end: the ids before and after every text.
        eos: the id that ends a document, or None.
        pad: the id of padding, which never carries a loss.
        parse_special: whether a special token spelled out in a text is read as that token, as in
            transformers; if a text spells out `begin`, it is not added again.
    """

    def __init__(
        self,
        inner: tokenizers.Tokenizer,
        *,
        begin: Sequence[int] = (),
        end: Sequence[int] = (),
        eos: int | None = None,
        pad: int | None = None,
        parse_special: bool = False,
    ):
        inner.no_truncation()
        inner.no_padding()
        inner.encode_special_tokens = not parse_special
        if isinstance(inner.post_processor, processors.TemplateProcessing):
            # transformers adds a template that does nothing if there was none.
            if _template(inner) == ((), ()):
                inner.post_processor = None
        self._inner, self.parse_special = inner, parse_special
        self.begin, self.end = tuple(map(int, begin)), tuple(map(int, end))
        self.eos = eos
        self.pad = next(i for i in (pad, eos, 0) if i is not None)

    @classmethod
    def load(cls, path, parse_special: bool = False) -> "PretrainedTokenizer":
        """Reads a model's directory, or its `tokenizer.json` alone.

        The names of special tokens, and whether they are put before and after a text, come from
        the `tokenizer_config.json` beside it if that says so, else from the template.

        Raises:
            FileNotFoundError: there is no tokenizer.json.
            ValueError: a file is damaged, or names a token that the tokenizer lacks.
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
        config = _read_config(file.with_name("tokenizer_config.json"))
        ids = {}
        for name in ("bos_token", "eos_token", "pad_token"):
            token = config.get(name)
            token = token.get("content") if isinstance(token, dict) else token
            ids[name] = None if token is None else inner.token_to_id(token)
            if token is not None and ids[name] is None:
                raise ValueError(f"{file} has no token {token!r}, which is its {name}")
        begin, end = _template(inner)
        for flag, name in (("add_bos_token", "bos_token"), ("add_eos_token", "eos_token")):
            if config.get(flag) is None:
                continue
            if config[flag] and ids[name] is None:
                raise ValueError(f"{file}: {flag} is set, but there is no {name}")
            token_ids = (ids[name],) if config[flag] else ()
            begin, end = (token_ids, end) if name == "bos_token" else (begin, token_ids)
        return cls(
            inner,
            begin=begin,
            end=end,
            eos=ids["eos_token"],
            pad=ids["pad_token"],
            parse_special=parse_special,
        )

    @classmethod
    def wrap(cls, tokenizer, parse_special: bool = False):
        """Returns a tokenizer of any form as one with this class's methods.

        Args:
            tokenizer: a fast tokenizer of transformers (an `AutoTokenizer`), a
                `tokenizers.Tokenizer`, a path for `load`, or an object with this class's methods,
                which is returned as it is.
            parse_special: see the class.

        Raises:
            TypeError: it is none of these.
        """
        if isinstance(tokenizer, str | os.PathLike):
            return cls.load(tokenizer, parse_special)
        inner = getattr(tokenizer, "backend_tokenizer", tokenizer)
        if isinstance(inner, tokenizers.Tokenizer):
            # A copy, since truncation and padding are switched off in it.
            inner = tokenizers.Tokenizer.from_str(inner.to_str())
            begin, end = _template(inner)
            eos, pad = (getattr(tokenizer, f"{n}_token_id", None) for n in ("eos", "pad"))
            return cls(inner, begin=begin, end=end, eos=eos, pad=pad, parse_special=parse_special)
        if hasattr(tokenizer, "encode_query") and hasattr(tokenizer, "encode_spans"):
            return tokenizer
        raise TypeError(
            f"{type(tokenizer).__name__} is not a known kind of tokenizer; give a fast one of "
            "transformers, a tokenizers.Tokenizer, or a PretrainedTokenizer"
        )

    def save(self, directory) -> None:
        """Writes `tokenizer.json` and `tokenizer_config.json`, which `load` reads."""
        directory = pathlib.Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        if len(self.begin) > 1 or len(self.end) > 1:
            # The flags can say one token; the template in tokenizer.json says several.
            flags: dict = {}
        else:
            flags = {"add_bos_token": bool(self.begin), "add_eos_token": bool(self.end)}
        tokens = {
            "bos_token": self.begin[0] if self.begin else None,
            "eos_token": self.end[0] if self.end else self.eos,
            "pad_token": self.pad,
        }
        names = {k: self._inner.id_to_token(i) for k, i in tokens.items() if i is not None}
        for name, text in (
            ("tokenizer.json", self._inner.to_str(pretty=True)),
            ("tokenizer_config.json", json.dumps(names | flags, ensure_ascii=False, indent=1)),
        ):
            with atomic_file.open_atomic(directory / name) as out:
                out.write(text + "\n")

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id."""
        return 1 + max(self._inner.get_vocab(with_added_tokens=True).values())

    def fingerprint(self) -> str:
        """Returns a hash of everything that decides which ids a text gets."""
        settings = json.dumps([self.begin, self.end, self.parse_special])
        return fingerprint_parts([self._inner.to_str(), settings])

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Returns the token ids of each text, without `begin` and `end`."""
        return [ids for ids, _ in self.encode_spans(texts)]

    def encode_spans(self, texts: list[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """Returns the token ids of each text, and the characters [start, stop) of each token."""
        encodings = self._inner.encode_batch(texts, add_special_tokens=False)
        out = [(e.ids, e.offsets) for e in encodings]
        if not (self.parse_special and self.begin):
            return out
        n = len(self.begin)
        # A text that spells out `begin` must not get it twice.
        return [(i[n:], o[n:]) if tuple(i[:n]) == self.begin else (i, o) for i, o in out]

    def sequence(self, text: str) -> list[int]:
        """Returns the token ids of `begin text end`."""
        return [*self.begin, *self.encode([text])[0], *self.end]

    def encode_query(self, prompt: str, target: str) -> tuple[np.ndarray, np.ndarray]:
        """Returns the token ids of `begin prompt target` and which of them are the target's.

        Prompt and target are joined by one space, unless there is white space between them
        already. A token that crosses the boundary counts as the target's.

        Returns:
            Ids, int32 [T], and whether a token is the target's, bool [T].

        Raises:
            ValueError: the target has no token, or no token comes before it, so that nothing
                predicts it.
        """
        joined = not prompt or prompt[-1:].isspace() or target[:1].isspace()
        text = f"{prompt}{target}" if joined else f"{prompt} {target}"
        ((ids, spans),) = self.encode_spans([text])
        # The boundary is the end of the prompt's last word: white space after it may be a token of
        # its own or part of the target's first token.
        boundary = len(prompt.rstrip())
        is_target = [bool(target.strip()) and stop > boundary for _, stop in spans]
        # White space between the two that is a token of its own belongs to the prompt.
        first = len(text) - len(text[len(prompt) :].lstrip())
        is_target = [t and stop > first for t, (_, stop) in zip(is_target, spans, strict=True)]
        if not any(is_target):
            raise ValueError(f"the target {target!r} of the prompt {prompt!r} has no token")
        if is_target[0] and not self.begin:
            raise ValueError(
                f"nothing stands before the target {target!r}: this tokenizer has no token that "
                "begins a sequence; give the query a prompt"
            )
        ids = np.asarray([*self.begin, *ids], np.int32)
        return ids, np.asarray([False] * len(self.begin) + is_target)

    def decode(self, ids) -> str:
        """Returns the text of token ids without special tokens."""
        return self._inner.decode(list(map(int, ids)), skip_special_tokens=True)


def _read_config(file: pathlib.Path) -> dict:
    if not file.exists():
        return {}
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not JSON ({error})") from error
    if not isinstance(config, dict):
        raise ValueError(f"{file} must hold a JSON object")
    return config


def _template(inner: tokenizers.Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the ids that the tokenizer itself puts before and after a text."""
    text = inner.encode("a", add_special_tokens=False).ids
    sequence = inner.encode("a", add_special_tokens=True).ids
    for start in range(len(sequence) - len(text) + 1):
        if sequence[start : start + len(text)] == text:
            return tuple(sequence[:start]), tuple(sequence[start + len(text) :])
    raise ValueError("the tokenizer's template changes the text itself; it cannot be used")
