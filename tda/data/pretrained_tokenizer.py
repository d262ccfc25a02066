"""Tokenizers that came with a model: `tokenizer.json` read as it is, or made from parts.

The token ids of a text are those that the model was trained with. What the tokenizer itself puts
before and after a text (a begin-of-sequence token, say) is found out once, by asking it, and put
there once.
"""

import hashlib
import json
import os
import pathlib
from collections.abc import Sequence

import numpy as np
import tokenizers
from tokenizers import processors

from tda.runtime import atomic_file


class PretrainedTokenizer:
    """Text to token ids and back, as a pretrained model has it.

    A sequence is `begin text end`: what the tokenizer's own template puts there, often nothing.
    A special token spelled out in a text is split into ordinary tokens, unless `parse_special`.

    Args:
        inner: the tokenizer.
        begin, end: ids that stand before and after every text.
        eos: the id that ends a document, or None.
        pad: an id for padding, which never carries a loss.
        parse_special: a special token spelled out in a text is that token, as in transformers; one
            that a text begins with is then not put before it again.
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
            # transformers puts a template that adds nothing where there was none.
            if _template(inner) == ((), ()):
                inner.post_processor = None
        self._inner, self.parse_special = inner, parse_special
        self.begin, self.end = tuple(map(int, begin)), tuple(map(int, end))
        self.eos = eos
        self.pad = next(i for i in (pad, eos, 0) if i is not None)

    @classmethod
    def load(cls, path, parse_special: bool = False) -> "PretrainedTokenizer":
        """Reads a model's directory, or its `tokenizer.json` alone.

        Names of tokens, and whether they are put before and after a text, come from the
        `tokenizer_config.json` beside it where that says so, else from the template.

        Raises:
            FileNotFoundError: there is no tokenizer.json.
            ValueError: a file is damaged, or names a token that there is not.
        """
        path = pathlib.Path(os.path.expanduser(path))
        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.exists():
            raise FileNotFoundError(
                f"{file}: no such file; a tokenizer of another form (tokenizer.model) is turned "
                "into one by transformers' AutoTokenizer.from_pretrained(…).save_pretrained(…)"
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
            found = (ids[name],) if config[flag] else ()
            begin, end = (found, end) if name == "bos_token" else (begin, found)
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
        """A tokenizer in whatever form one has it.

        Args:
            tokenizer: a fast tokenizer of transformers (an `AutoTokenizer`), a
                `tokenizers.Tokenizer`, a path for `load`, or anything with this class's methods,
                which is given back.
            parse_special: see the class.

        Raises:
            TypeError: none of these.
        """
        if isinstance(tokenizer, str | os.PathLike):
            return cls.load(tokenizer, parse_special)
        inner = getattr(tokenizer, "backend_tokenizer", tokenizer)
        if isinstance(inner, tokenizers.Tokenizer):
            # A copy: truncation and padding are switched off in it.
            inner = tokenizers.Tokenizer.from_str(inner.to_str())
            begin, end = _template(inner)
            eos, pad = (getattr(tokenizer, f"{n}_token_id", None) for n in ("eos", "pad"))
            how = dict(eos=eos, pad=pad, parse_special=parse_special)
            return cls(inner, begin=begin, end=end, **how)
        if hasattr(tokenizer, "encode_query") and hasattr(tokenizer, "encode_spans"):
            return tokenizer
        raise TypeError(
            f"{type(tokenizer).__name__} is not a tokenizer that is known here; give a fast one of "
            "transformers, a tokenizers.Tokenizer, or a PretrainedTokenizer"
        )

    def save(self, directory) -> None:
        """Writes `tokenizer.json` and `tokenizer_config.json`, which `load` reads."""
        directory = pathlib.Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        if len(self.begin) > 1 or len(self.end) > 1:
            # Kept by the template, which the file has.
            flags: dict = {}
        else:
            flags = {"add_bos_token": bool(self.begin), "add_eos_token": bool(self.end)}
        tokens = {
            "bos_token": self.begin[0] if self.begin else None,
            "eos_token": self.end[0] if self.end else self.eos,
            "pad_token": self.pad,
        }
        named = {k: self._inner.id_to_token(i) for k, i in tokens.items() if i is not None}
        for name, text in (
            ("tokenizer.json", self._inner.to_str(pretty=True)),
            ("tokenizer_config.json", json.dumps(named | flags, ensure_ascii=False, indent=1)),
        ):
            with atomic_file.open_atomic(directory / name) as out:
                out.write(text + "\n")

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id."""
        return 1 + max(self._inner.get_vocab(with_added_tokens=True).values())

    def fingerprint(self) -> str:
        """A hash of everything that decides which ids a text gets."""
        own = [self.begin, self.end, self.parse_special]
        return hashlib.sha256((self._inner.to_str() + json.dumps(own)).encode()).hexdigest()[:16]

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, without what stands before and after it."""
        return [ids for ids, _ in self.encode_spans(texts)]

    def encode_spans(self, texts: list[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """Token ids of each text, and the characters [start, stop) that each token is of."""
        found = self._inner.encode_batch(texts, add_special_tokens=False)
        out = [(e.ids, e.offsets) for e in found]
        if not (self.parse_special and self.begin):
            return out
        n = len(self.begin)
        # The text spells it out; it is put there in any case, once.
        return [(i[n:], o[n:]) if tuple(i[:n]) == self.begin else (i, o) for i, o in out]

    def sequence(self, text: str) -> list[int]:
        """`begin text end`, as ids."""
        return [*self.begin, *self.encode([text])[0], *self.end]

    def encode_query(self, prompt: str, target: str) -> tuple[np.ndarray, np.ndarray]:
        """Token ids of `begin prompt target` and which of them are the target's.

        Prompt and target are joined as they are where there is white space between them, else by
        one space. A token that reaches over the boundary counts as the target's.

        Returns:
            int32 [T] ids and bool [T], true at target tokens.

        Raises:
            ValueError: the target has no token, or the prompt none before it, so that nothing
                predicts the target.
        """
        joined = not prompt or prompt[-1:].isspace() or target[:1].isspace()
        text = f"{prompt}{target}" if joined else f"{prompt} {target}"
        ((ids, spans),) = self.encode_spans([text])
        # Where tokens of white space end says nothing: the boundary is the last word's end.
        boundary = len(prompt.rstrip())
        is_target = [bool(target.strip()) and stop > boundary for _, stop in spans]
        # White space between them that is a token of its own belongs to the prompt.
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
        """The text of token ids, special tokens left out."""
        return self._inner.decode(list(map(int, ids)), skip_special_tokens=True)


def _read_config(file: pathlib.Path) -> dict:
    if not file.exists():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not JSON ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file} must hold a JSON object")
    return found


def _template(inner: tokenizers.Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What the tokenizer itself puts before and after a text."""
    plain = inner.encode("a", add_special_tokens=False).ids
    whole = inner.encode("a", add_special_tokens=True).ids
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return tuple(whole[:start]), tuple(whole[start + len(plain) :])
    raise ValueError("the tokenizer's template changes the text itself; it cannot be used")
