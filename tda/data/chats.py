"""Chats as texts: the tokenizer's own template, and which characters of a text are answers."""

import dataclasses
import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

# What templates take for today, since a corpus has to have the same tokens on every day: the date
# that Llama 3's writes where there is no clock.
_TODAY = datetime.datetime(2024, 7, 26)


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """A tokenizer's template for chats, in Jinja, as transformers reads it.

    A template comes with a model's files, so it runs in Jinja's sandbox, where it can change no
    value and reach only its arguments.

    Attributes:
        source: the template.
        special_tokens: (name, token) pairs that it may use, such as ("bos_token", "<s>").
    """

    source: str
    special_tokens: tuple[tuple[str, str], ...] = ()

    def render(self, messages: Sequence[Mapping], is_asked: bool = False) -> str:
        """Returns the text of a chat, with the beginning of an answer if `is_asked`.

        Raises:
            ValueError: the template refuses the messages, or is not valid.
            ImportError: Jinja is not installed.
        """
        jinja2 = _import_jinja()
        try:
            return _compile(self.source).render(
                messages=[dict(m) for m in messages],
                add_generation_prompt=is_asked,
                tools=None,
                documents=None,
                **dict(self.special_tokens),
            )
        except jinja2.TemplateError as error:
            raise ValueError(f"the tokenizer's chat template refuses it: {error}") from error

    def render_with_answers(self, messages: Sequence[Mapping]) -> tuple[str, list[slice]]:
        """Returns the text of a chat, and the characters of each of the assistant's messages.

        An answer is all that its message adds to the text of the chat before it. So it ends with
        the token that ends a turn, which the model has to produce too.

        Raises:
            ValueError: as `render`; there is no message of the assistant; or the template changes
                the beginning of a chat when messages follow, so that answers have no fixed place.
        """
        text, answers = self.render(messages), []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self.render(messages[:i], is_asked=True)
            so_far = self.render(messages[: i + 1])
            if not (so_far.startswith(before) and text.startswith(so_far)):
                raise ValueError(
                    f"the tokenizer's chat template changes the text before message {i} when "
                    "messages follow, so the answer has no fixed place; cut the chat after the "
                    "answer, or give token ids ('input_ids') with 'labels'"
                )
            answers.append(slice(len(before), len(so_far)))
        if not answers:
            raise ValueError("there is no message with the role 'assistant', so nothing to learn")
        return text, answers


def parse_messages(value: Any) -> tuple[dict, ...]:
    """Returns the messages of a chat.

    Raises:
        ValueError: `value` is no list of messages with a role and a text.
    """
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Sequence):
        raise ValueError(f"it is {type(value).__name__}, not a list of messages")
    for i, message in enumerate(value):
        if not isinstance(message, Mapping):
            raise ValueError(f"message {i} is {type(message).__name__}, not a dict")
        for field in ("role", "content"):
            if not isinstance(message.get(field), str):
                raise ValueError(
                    f"the {field!r} of message {i} is {message.get(field)!r}, not a string"
                )
    return tuple(dict(message) for message in value)


def _import_jinja():
    try:
        import jinja2
        import jinja2.ext
        import jinja2.sandbox
    except ImportError as error:
        raise ImportError("chats need Jinja: pip install 'tda-jax[chat]'") from error
    return jinja2


@functools.lru_cache(maxsize=8)
def _compile(source: str):
    jinja2 = _import_jinja()
    from jinja2.ext import Extension

    class Generation(Extension):
        """Renders the contents of `{% generation %}`, with which templates mark answers."""

        tags = {"generation"}

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(["name:endgeneration"], drop_needle=True)

    def refuse(message):
        raise jinja2.TemplateError(message)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    # What transformers offers to templates.
    environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = _TODAY.strftime
    return environment.from_string(source)
