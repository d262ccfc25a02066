"""Tokenizers that come with a pretrained model: read from its files, or made from parts.

A text gets the token ids that the model was trained with. The ids that the tokenizer itself puts
before and after a text (such as a begin-of-sequence token) are read from its template once.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
import tokenizers

from tda.data import tokenizer_files
from tda.data.chats import ChatTemplate
from tda.data.joining import join
from tda.data.tokenizer_files import (
    component,
    read_chat_template,
    read_template,
    with_template,
    without_template,
)
from tda.runtime import atomic_file
from tda.runtime.fingerprint import fingerprint_parts


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
        chat: the template of chats, or None.
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
        chat: ChatTemplate | None = None,
    ):
        inner.no_truncation()
        inner.no_padding()
        if getattr(inner.model, "dropout", None):
            inner.model.dropout = None  # which would give a text other ids every time
        inner.encode_special_tokens = not parse_special
        if inner.post_processor is not None:
            # `begin` and `end` replace its template; its treatment of offsets stays.
            state = json.loads(inner.post_processor.__getstate__())
            inner.post_processor = component("post_processor", without_template(state))
        self._inner, self.parse_special = inner, parse_special
        self.begin, self.end = tuple(map(int, begin)), tuple(map(int, end))
        self.eos, self.chat = eos, chat
        self.pad = next(i for i in (pad, eos, 0) if i is not None)

    def __setstate__(self, state: dict) -> None:
        # `tokenizers` pickles as JSON, which lacks this setting: without it a copy, such as that of
        # a worker process, would read special tokens in a text.
        self.__dict__.update(state)
        self._inner.encode_special_tokens = not self.parse_special

    @classmethod
    def load(cls, path, parse_special: bool = False) -> "PretrainedTokenizer":
        """Reads a model's directory, or its `tokenizer.json` alone.

        Raises:
            FileNotFoundError, ValueError: as `tda.data.tokenizer_files.read`, which describes the
                files.
        """
        parts = tokenizer_files.read(path)
        return cls(
            parts.inner,
            begin=parts.begin,
            end=parts.end,
            eos=parts.eos,
            pad=parts.pad,
            parse_special=parse_special,
            chat=parts.chat,
        )

    @classmethod
    def wrap(cls, tokenizer, parse_special: bool = False):
        """Returns a tokenizer of any form as one with this class's methods.

        Args:
            tokenizer: a fast tokenizer of transformers (an `AutoTokenizer`), a
                `tokenizers.Tokenizer`, a path for `load`, or an object with this class's methods,
                which is returned unchanged.
            parse_special: see the class.

        Raises:
            TypeError: it is none of these.
        """
        if isinstance(tokenizer, str | os.PathLike):
            return cls.load(tokenizer, parse_special)
        inner = getattr(tokenizer, "backend_tokenizer", tokenizer)
        if isinstance(inner, tokenizers.Tokenizer):
            # A copy, since the constructor switches off truncation and padding.
            inner = tokenizers.Tokenizer.from_str(inner.to_str())
            begin, end = read_template(inner)
            eos, pad = (getattr(tokenizer, f"{n}_token_id", None) for n in ("eos", "pad"))
            special_tokens = getattr(tokenizer, "special_tokens_map", {})
            names = {k: t for k, t in special_tokens.items() if isinstance(t, str)}
            return cls(
                inner,
                begin=begin,
                end=end,
                eos=eos,
                pad=pad,
                parse_special=parse_special,
                chat=read_chat_template(getattr(tokenizer, "chat_template", None), names),
            )
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
        inner = tokenizers.Tokenizer.from_str(self._inner.to_str())
        state = None
        if inner.post_processor is not None:
            state = json.loads(inner.post_processor.__getstate__())
        if self.begin or self.end:
            begin, end = (list(map(inner.id_to_token, ids)) for ids in (self.begin, self.end))
            ids = dict(zip([*begin, *end], [*self.begin, *self.end], strict=True))
            state = with_template(state, begin, end, ids)
            inner.post_processor = component("post_processor", state)
        tokens = {"bos_token": next(iter(self.begin), None), "eos_token": self.eos}
        tokens |= {"pad_token": self.pad}
        names = {k: inner.id_to_token(i) for k, i in tokens.items() if i is not None}
        # The class of transformers that follows tokenizer.json in everything.
        config = {"tokenizer_class": "PreTrainedTokenizerFast"} | names
        for name, text in (
            ("tokenizer.json", inner.to_str(pretty=True)),
            ("tokenizer_config.json", json.dumps(config, ensure_ascii=False, indent=1)),
        ):
            with atomic_file.open_atomic(directory / name) as out:
                out.write(text + "\n")

    def as_json(self) -> dict:
        """Returns the tokenizer as JSON values, for `from_json` in another process."""
        chat = None if self.chat is None else dataclasses.astuple(self.chat)
        names = ("begin", "end", "eos", "pad", "parse_special")
        fields = {name: getattr(self, name) for name in names}
        return fields | {"inner": self._inner.to_str(), "chat": chat}

    @classmethod
    def from_json(cls, fields: dict) -> "PretrainedTokenizer":
        """Returns a tokenizer that gives texts the ids of the one that `as_json` was called on."""
        inner = tokenizers.Tokenizer.from_str(fields["inner"])
        options = {k: v for k, v in fields.items() if k not in ("inner", "chat")}
        if fields["chat"] is not None:
            source, special_tokens = fields["chat"]
            options["chat"] = ChatTemplate(source, tuple(map(tuple, special_tokens)))
        return cls(inner, **options)

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id that a sequence can hold.

        A special token that is not read in texts does not count: Gemma 3's tokenizer has one that
        exceeds the rows of its text model.
        """
        used = set(self._inner.get_vocab(with_added_tokens=False).values())
        for i, token in self._inner.get_added_tokens_decoder().items():
            if self.parse_special or not token.special:
                used.add(i)
        used |= {*self.begin, *self.end, self.pad}
        return 1 + max(used if self.eos is None else used | {self.eos})

    def fingerprint(self) -> str:
        """Returns a hash of all settings that decide a text's ids."""
        settings = json.dumps([self.begin, self.end, self.parse_special])
        return fingerprint_parts([self._inner.to_str(), settings])

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Returns the token ids of each text, without `begin` and `end`."""
        return [ids for ids, _ in self.encode_spans(texts)]

    def encode_spans(self, texts: list[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """Returns the token ids of each text, and the characters [start, stop) of each token."""
        encodings = self._encode_each(texts)
        out = [(e.ids, e.offsets) for e in encodings]
        if not (self.parse_special and self.begin):
            return out
        n = len(self.begin)
        # A text that spells out `begin` must not get it twice.
        return [(i[n:], o[n:]) if tuple(i[:n]) == self.begin else (i, o) for i, o in out]

    def _encode_each(self, texts: Sequence[str]) -> list[tokenizers.Encoding]:
        """Returns the library's encoding of each text.

        Raises:
            ValueError: a text has a word that the vocabulary lacks, and no token stands for these.
        """
        try:
            return self._inner.encode_batch(texts, add_special_tokens=False)
        except Exception as error:  # the library raises bare Exceptions
            if len(texts) > 1:
                return [encoding for text in texts for encoding in self._encode_each([text])]
            raise ValueError(
                f"the tokenizer cannot encode the text {texts[0][:60]!r} ({error}); add the token "
                "for unknown words to its vocabulary"
            ) from error

    def encode_words(self, text: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns the token ids of a text, their characters and their words.

        Returns:
            Ids, int32 [T]; the characters [start, stop) of each token, int64 [T, 2]; and the number
            of the word, as the pre-tokenizer cuts the text, that each token is a part of, int64
            [T].
        """
        (encoding,) = self._encode_each([text])
        words = [-1 if word is None else word for word in encoding.word_ids]
        places_Tx2 = np.asarray(encoding.offsets, np.int64).reshape(-1, 2)
        ids, words_T = np.asarray(encoding.ids, np.int32), np.asarray(words, np.int64)
        n = len(self.begin)
        if self.parse_special and n and tuple(ids[:n].tolist()) == self.begin:
            ids, places_Tx2, words_T = ids[n:], places_Tx2[n:], words_T[n:]
        return ids, places_Tx2, words_T

    def encode_chat(self, messages: Sequence[Mapping]) -> tuple[list[int], np.ndarray, np.ndarray]:
        """Returns the token ids of a chat as the tokenizer's template writes it.

        Special tokens spelled out in the text, such as the template's, are read as those tokens, as
        in transformers.

        Args:
            messages: dicts of a "role" and a "content", in order.

        Returns:
            Ids; the characters [start, stop) of each token in the chat's text, int64 [T, 2]; and
            whether a token is part of an answer (a message of the role "assistant"), bool [T].

        Raises:
            ValueError: the tokenizer has no template, or the template cannot write the messages.
            ImportError: Jinja is not installed.
        """
        if self.chat is None:
            raise ValueError(
                "this tokenizer has no chat template (chat_template.jinja, or chat_template in "
                "tokenizer_config.json); give texts, or the token ids ('input_ids')"
            )
        text, answers = self.chat.render_with_answers(messages)
        self._inner.encode_special_tokens = False
        try:
            (encoding,) = self._encode_each([text])
        finally:
            self._inner.encode_special_tokens = not self.parse_special
        places = np.asarray(encoding.offsets, np.int64).reshape(-1, 2)
        is_answer = np.zeros(len(places), bool)
        for answer in answers:
            is_answer |= (places[:, 0] < answer.stop) & (places[:, 1] > answer.start)
        return encoding.ids, places, is_answer

    def sequence(self, text: str) -> list[int]:
        """Returns the token ids of `begin text end`."""
        return [*self.begin, *self.encode([text])[0], *self.end]

    def encode_query(
        self, prompt: str, target: str, joiner: str | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns the token ids of `begin prompt target` and which of them are the target's.

        A token that crosses the boundary counts as the target's.

        Args:
            prompt, target: the texts.
            joiner: the text between them; by default a space where one belongs
                (`tda.data.joining.choose_joiner`).

        Returns:
            Ids, int32 [T], and whether a token is the target's, bool [T].

        Raises:
            ValueError: the target has no token, or no token comes before it, so that nothing
                predicts it.
        """
        text = join(prompt, target, joiner)
        ((ids, spans),) = self.encode_spans([text])
        # A token that crosses the border is the target's; white space that is a token of its own,
        # and the joiner's words, are the prompt's.
        border = len(text) - len(target.lstrip())
        is_target = [bool(target.strip()) and stop > border for _, stop in spans]
        if not any(is_target):
            remedy = (
                "the tokenizer has no token for any of its characters"
                if target.strip()
                else "give more than white space"
            )
            raise ValueError(
                f"the target {target!r} of the prompt {prompt!r} has no token of its own; {remedy}"
            )
        if is_target[0] and not self.begin:
            raise ValueError(
                f"no token comes before the target {target!r}: this tokenizer has no token that "
                "begins a sequence; give the query a prompt"
            )
        ids = np.asarray([*self.begin, *ids], np.int32)
        return ids, np.asarray([False] * len(self.begin) + is_target)

    def decode(self, ids) -> str:
        """Returns the text of token ids without special tokens."""
        return self._inner.decode(list(map(int, ids)), skip_special_tokens=True)
