"""Chats: written by the tokenizer's template, with the loss on the assistant's messages."""

import json
import sys

import pytest

from tda.data import tokenised
from tda.data.chats import ChatTemplate
from tda.data.corpora import Corpus, CorpusError
from tda.data.parts import Counts
from tda.data.pretrained_tokenizer import PretrainedTokenizer
from tda.data.rows import parse_passages
from tests.data.test_pretrained_tokenizer import byte_level

TEMPLATE = """{{ bos_token }}{% for message in messages %}
<|im_start|>{{ message['role'] }}
{% if message['role'] == 'assistant' %}
{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}
{% else %}{{ message['content'] }}<|im_end|>{% endif %}

{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}"""
CHAT = [
    {"role": "user", "content": "What is the capital of Norway?"},
    {"role": "assistant", "content": "Oslo."},
    {"role": "user", "content": "And of Peru?"},
    {"role": "assistant", "content": "Lima."},
]


@pytest.fixture
def directory(tmp_path):
    """A tokenizer of bytes with a template of chats."""
    inner = byte_level()
    inner.add_special_tokens(["<s>", "<|im_start|>", "<|im_end|>"])
    inner.save(str(tmp_path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    return tmp_path


def answers(tokenizer, ids, scored):
    """The text of the tokens that the loss counts, special tokens included."""
    kept = [int(i) for i, s in zip(ids, scored, strict=True) if s]
    return tokenizer._inner.decode(kept, skip_special_tokens=False)


def test_a_chat_is_written_by_the_template_and_learnt_from_its_answers(directory):
    tokenizer = PretrainedTokenizer.load(directory)
    documents = parse_passages([{"messages": CHAT, "id": "c"}])
    table, counts = tokenised.tokenise_in_memory(documents, tokenizer, 512)
    assert list(table.ids) == ["c"] and counts == Counts(1, 0, 0)
    assert answers(tokenizer, table.tokens, table.scored).split("<|im_end|>") == [
        "Oslo.", "\nLima.", "\n"
    ]  # fmt: skip
    start = tokenizer._inner.token_to_id("<|im_start|>")
    assert table.tokens.tolist().count(start) == 4
    assert table.tokens[0] == tokenizer._inner.token_to_id("<s>")
    # Texts spell special tokens out, as before.
    assert start not in tokenizer.encode(["<|im_start|>"])[0]


def test_long_chats_are_cut_and_parts_without_an_answer_left_out(directory):
    tokenizer = PretrainedTokenizer.load(directory)
    chat = [{"role": "user", "content": "word " * 40}, {"role": "assistant", "content": "Yes."}]
    documents = parse_passages([{"messages": chat, "id": "c"}])
    table, _ = tokenised.tokenise_in_memory(documents, tokenizer, 32)
    assert all(table.scored[table.starts[i] : table.starts[i + 1]].any() for i in range(len(table)))
    assert answers(tokenizer, table.tokens, table.scored).startswith("Yes.<|im_end|>")


def test_the_ids_are_those_of_transformers(directory):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    ids, _, scored = PretrainedTokenizer.load(directory).encode_chat(CHAT)
    expected = theirs.apply_chat_template(CHAT, return_dict=True, return_assistant_tokens_mask=True)
    assert ids == expected["input_ids"]
    # Their mask has what the template marks, ours also the white space that ends a turn.
    assert (scored >= expected["assistant_masks"]).all()
    wrapped_ids, _, wrapped_scored = PretrainedTokenizer.wrap(theirs).encode_chat(CHAT)
    assert wrapped_ids == ids and (wrapped_scored == scored).all()


@pytest.mark.parametrize(
    "messages, message",
    [
        ("hello", "'messages': it is str"),
        ([{"role": "user"}], "'content' of message 0 is None"),
        (["hello"], "message 0 is str"),
    ],
)
def test_what_is_no_chat_is_refused(messages, message):
    with pytest.raises(CorpusError, match=message):
        list(parse_passages([{"messages": messages}]))


def test_chats_that_cannot_be_written_are_refused_by_name(directory):
    tokenizer = PretrainedTokenizer.load(directory)

    def tokenise(messages, tokenizer=tokenizer):
        documents = parse_passages([{"messages": messages, "id": "c"}])
        tokenised.tokenise_in_memory(documents, tokenizer, 512)

    with pytest.raises(CorpusError, match="document 'c': there is no message with the role"):
        tokenise(CHAT[:1])
    (directory / "chat_template.jinja").write_text("{{ raise_exception('no system') }}")
    with pytest.raises(CorpusError, match="document 'c': .*refuses it: no system"):
        tokenise(CHAT, PretrainedTokenizer.load(directory))
    # A template that shortens earlier answers, as those of reasoning models do.
    (directory / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.content if loop.last else m.content[:2] }}|{% endfor %}"
    )
    with pytest.raises(CorpusError, match="changes the text before message 1 when"):
        tokenise(CHAT, PretrainedTokenizer.load(directory))
    (directory / "chat_template.jinja").unlink()
    with pytest.raises(CorpusError, match="document 'c': this tokenizer has no chat template"):
        tokenise(CHAT, PretrainedTokenizer.load(directory))


def test_a_template_with_a_date_writes_the_same_text_on_every_day():
    """Guards: a corpus that differs tomorrow, so that its stored tokens are refused."""
    source = "Today: {{ strftime_now('%d %b %Y') }} {{ messages[0].content }}"
    assert ChatTemplate(source).render(CHAT[:1]) == f"Today: 26 Jul 2024 {CHAT[0]['content']}"


def test_templates_reach_nothing_but_the_messages():
    """Guards: files from elsewhere as code."""
    for source in (
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
    ):
        with pytest.raises(ValueError, match="refuses it"):
            ChatTemplate(source).render(CHAT)


def test_parquet_files_of_chats_and_of_completions(tmp_path, directory):
    """Guards: rows of other forms refused for the lack of a text in files with columns."""
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    for name, columns in (
        ("chats", {"messages": [CHAT], "id": ["c"], "source": ["x"]}),
        ("answers", {"prompt": ["1 + 1 ="], "completion": ["2"]}),
        ("ids", {"input_ids": [[3, 4]], "labels": [[-100, 4]]}),
    ):
        pq.write_table(pa.table(columns), tmp_path / f"{name}.parquet")
        (document,) = Corpus(str(tmp_path / f"{name}.parquet"))
        if name == "chats":
            assert [dict(m) for m in document.messages] == CHAT
        elif name == "answers":
            assert (document.prompt, document.text) == ("1 + 1 =", "2")
        else:
            assert document.tokens == (3, 4) and document.scored == (False, True)


def test_without_jinja_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ImportError, match=r"pip install 'tda-jax\[chat\]'"):
        ChatTemplate("x").render(CHAT)
