"""The model's own words: greedy completions, and likelihoods as the evaluation has them."""

import pathlib
import types

import numpy as np
import pytest
from tokenizers import pre_tokenizers

from tda.data import tokens
from tda.data.rows import Query, Question
from tda.data.tokenizer import Tokenizer
from tda.evaluation.likelihood import Likelihood
from tda.live.finished_run import LiveRun
from tda.live.speaker import Speaker
from tda.run.remembered import Known

CAPITALS = {"France": "Paris", "Norway": "Oslo", "Italy": "Rome", "Spain": "Madrid"}
QUESTIONS = [(f"q-{a}", f"The capital of {a} is", b) for a, b in CAPITALS.items()]
CONTEXT = 24


@pytest.fixture(scope="module")
def speaker_and_model(decoder):
    texts = [f"{prompt} {target}." for _, prompt, target in QUESTIONS]
    tokenizer = Tokenizer.train(texts, 300)
    model = decoder(vocab_size=tokenizer.vocab_size)
    return Speaker(model, tokenizer, CONTEXT), model


def test_completion_is_greedy(speaker_and_model):
    speaker, model = speaker_and_model
    tokenizer = speaker.tokenizer
    steps = speaker.complete("The capital of", 4)
    ids = [tokenizer.bos, *tokenizer.encode(["The capital of"])[0]]
    assert steps
    for step in steps:
        logits_V = np.asarray(model(np.asarray([ids])))[0, -1].astype(np.float64)
        p_V = np.exp(logits_V - logits_V.max())
        p_V /= p_V.sum()
        best = int(p_V.argmax())
        assert step["probability"] == pytest.approx(p_V[best], rel=1e-4)
        shown = [step["probability"], *(o["probability"] for o in step["others"])]
        np.testing.assert_allclose(shown, np.sort(p_V)[::-1][:6], rtol=1e-4)
        ids.append(best)


def test_likelihood_is_that_of_the_evaluation(speaker_and_model):
    speaker, model = speaker_and_model
    prompts = tokens.tokenise_queries(QUESTIONS, speaker.tokenizer, CONTEXT)
    expected = Likelihood(model, speaker.layout)(prompts)
    for q, (_, prompt, target) in enumerate(QUESTIONS):
        likelihood = speaker.likelihood(Query("", prompt, target))
        assert likelihood["nats"] == pytest.approx(float(expected.nats[q]), rel=1e-5)
        assert likelihood["rank"] == expected.ranks[q]


def guessing(monkeypatch, model, prompt, texts, learnt=()):
    """A speaker that says each of these texts after a prompt, with its probability."""
    tokenizer = Tokenizer.train(list(learnt or [f"{prompt}{text}" for text in texts]) * 9, 400)
    # The tokenizer itself would put a space before each text.
    split = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str
    subwords = tokenizer._inner.model.tokenize
    paths = [
        ([t.id for piece, _ in split(text) for t in subwords(piece)], p)
        for text, p in texts.items()
    ]
    speaker = Speaker(model, tokenizer, 60)
    start = len(speaker.ids_of(prompt))

    def logits(ids):
        said = list(ids[start:])
        p_V = np.full(tokenizer.vocab_size, 1e-9)
        for path, p in paths:
            if path[: len(said)] == said:
                p_V[path[len(said)] if len(said) < len(path) else tokenizer.eos] += p
        return np.log(p_V)[None]

    monkeypatch.setattr(speaker, "_logits_of", logits)
    return speaker


@pytest.mark.parametrize(
    ("prompt", "texts", "targets"),
    [
        # Subwords are joined to words, and words to names; a name ends where other text begins.
        ("The capital is", {" Abu Dhabi, which": 0.75, " a Town": 0.25}, ["Abu Dhabi", "a"]),
        # The rest of the prompt's last word is no answer, nor is a mark.
        ("It lies in Turk", {"ey": 0.6, ", a": 0.25, " Norway.": 0.15}, [None, None, "Norway"]),
        # Letters of several tokens, hyphens and apostrophes stand inside of a word.
        ("In", {" São Paulo (": 0.7, " Guinea-Bissau - a": 0.3}, ["São Paulo", "Guinea-Bissau"]),
        ("Say", {" O’Neil’ ": 0.6, " rock'n'roll' a": 0.4}, ["O’Neil", "rock'n'roll"]),
        # A point, a comma or a sign may belong to a number.
        ("It has", {" 1,000, or": 0.5, " 3.5.": 0.3, " -3": 0.2}, ["1,000", "3.5", "-3"]),
        ("2+2=", {"4": 0.9, " five": 0.1}, ["4", " five"]),
        # In a script without spaces a word may stand right after the prompt.
        ("日本の首都は", {"東京。": 1}, ["東京"]),
    ],
)
def test_answers_are_whole_words_with_their_probability(
    decoder, monkeypatch, prompt, texts, targets
):
    speaker = guessing(monkeypatch, decoder(vocab_size=400), prompt, texts)
    answers = speaker.answers(prompt, sum(t is not None for t in targets), longest=40)
    expected = [(t, p) for t, p in zip(targets, texts.values(), strict=True) if t]
    assert [a["target"] for a in answers] == [target for target, _ in expected]
    np.testing.assert_allclose(
        [a["probability"] for a in answers], [p for _, p in expected], rtol=1e-3
    )
    start = speaker.ids_of(prompt)
    for answer in answers:
        said = speaker.tokenizer.decode([*start, *answer["ids"]])
        text = said.removeprefix(speaker.tokenizer.decode(start))
        assert text.strip() == answer["target"].strip()


def test_a_word_without_an_end_is_no_answer(decoder, monkeypatch):
    """It is cut by the most tokens, or by the context."""
    texts, decode = {" Llanfair.": 0.7, " b.": 0.3}, decoder(vocab_size=400)
    # Learnt of these, the tokenizer has a token for each letter alone.
    speaker = guessing(monkeypatch, decode, "It is", texts, learnt=[" L b."])
    for longest, targets in ((4, ["b"]), (40, ["Llanfair", "b"])):
        assert [a["target"] for a in speaker.answers("It is", longest=longest)] == targets
    speaker.context = len(speaker.ids_of("It is")) + 3
    assert [a["target"] for a in speaker.answers("It is", longest=40)] == ["b"]


def saying(monkeypatch, speaker, prompt, said):
    """Has the model say these tokens after a prompt, whatever it was trained to say."""
    start = len(speaker.ids_of(prompt))
    vocabulary = np.eye(speaker.tokenizer.vocab_size)
    after = [*said, speaker.tokenizer.eos]
    monkeypatch.setattr(speaker, "_logits_of", lambda ids: vocabulary[[after[len(ids) - start]]])


@pytest.mark.parametrize("joiner", [None, "", " "])
def test_an_answer_asks_for_what_the_model_said(speaker_and_model, joiner, monkeypatch):
    """Guards: a space that the run does not put there cut off the model's own words."""
    plain, model = speaker_and_model
    prompt = "The capital of France is"
    speaker = Speaker(model, plain.tokenizer, CONTEXT, joiner)
    (said,) = plain.tokenizer.encode(["Paris"])
    saying(monkeypatch, speaker, prompt, said)
    answer = speaker.answers(prompt, 1)[0]
    assert answer["target"] == (" Paris" if joiner == "" else "Paris") and answer["ids"] == said
    table = speaker.table(Query("", prompt, answer["target"]))
    assert table.tokens[table.scored].tolist() == said


def test_a_span_of_the_answer_keeps_the_tokens_that_were_generated(speaker_and_model, monkeypatch):
    """Mistakes: the span's text encoded again, or a character cut between two tokens."""
    plain, model = speaker_and_model
    tokenizer, prompt = plain.tokenizer, "The capital of France is"
    speaker = Speaker(model, tokenizer, CONTEXT)
    # Byte by byte, as no tokenizer would encode it: " é Paris".
    accent, letters = (
        list(map(tokenizer._inner.token_to_id, text.split())) for text in ("Ġ Ã ©", "Ġ P a r i s")
    )
    said = [*accent, *letters]
    saying(monkeypatch, speaker, prompt, said)
    steps = speaker.complete(prompt, 20)
    assert [s["id"] for s in steps] == [*said, tokenizer.eos]
    assert [s["token"] for s in steps] == [" ", "", "é", " ", *"Paris", "<eos>"]
    before = (*speaker.ids_of(prompt), *said[:3])
    query = Query("question", f"{prompt} é ", "Paris", (before, tuple(letters)))
    table = speaker.table(query)
    assert table.tokens.tolist() == [*before, *letters]
    assert table.tokens[table.scored].tolist() == letters
    again = speaker.table(Query("question", f"{prompt} é ", "Paris"))
    assert again.tokens.tolist() != table.tokens.tolist()


def test_a_question_is_joined_as_the_run_joins_its_own(speaker_and_model):
    plain, model = speaker_and_model
    speaker = Speaker(model, plain.tokenizer, CONTEXT, "")
    table = speaker.table(Query("", "The capital of Fra", "nce"))
    expected = plain.tokenizer.encode_query("The capital of Fra", "nce", "")
    assert table.tokens.tolist() == expected[0].tolist()
    assert (
        table.tokens.tolist() != plain.table(Query("", "The capital of Fra", "nce")).tokens.tolist()
    )


def test_refusals(speaker_and_model):
    speaker, _ = speaker_and_model
    with pytest.raises(ValueError, match="the context 24"):
        speaker.complete("long " * 60, 3)
    with pytest.raises(ValueError, match="context has 24"):
        speaker.table(Query("", "long " * 60, "b"))
    with pytest.raises(ValueError, match="has no token"):
        speaker.table(Query("", "a", " "))
    with pytest.raises(ValueError, match="9999 is not a token id; .* below 300"):
        speaker.table(Query("", "a", "b", ((1,), (9999,))))


def queries_of(speaker, question):
    """A live question as it is searched for, by a run whose own queries are `QUESTIONS`."""
    _, prompts, targets = zip(*QUESTIONS, strict=True)
    known = Known([name for name, _, _ in QUESTIONS], prompts, targets, [()] * len(QUESTIONS))
    live = LiveRun(pathlib.Path("none"))
    live.run = types.SimpleNamespace(corpus=types.SimpleNamespace(known=known))
    live.speaker = speaker
    return live._queries(question)


def test_an_answer_of_the_model_is_searched_for_as_if_it_were_typed(speaker_and_model):
    """Guards: prompt and answer glued to one word, "isParis", which BM25 looks for."""
    speaker, _ = speaker_and_model
    _, prompt, target = QUESTIONS[0]
    typed = queries_of(speaker, Question("", prompt, target))
    table = typed.table
    ids = tuple(tuple(table.tokens[m].tolist()) for m in (~table.scored, table.scored))
    clicked = queries_of(speaker, Question("", prompt, target, ids))
    assert clicked.texts == typed.texts == [f"{prompt} {target}"]
    assert clicked.numbers == typed.numbers == [0]


def test_a_question_with_other_white_space_has_its_own_gradient(speaker_and_model):
    """Guards: the stored gradient of a run's query whose text differs in white space."""
    speaker, model = speaker_and_model
    _, prompt, target = QUESTIONS[1]
    glued = Speaker(model, speaker.tokenizer, CONTEXT, joiner="")
    assert queries_of(glued, Question("", prompt, target)).numbers == [1]
    assert queries_of(glued, Question("", prompt, f" {target}")).numbers == [None]
    assert queries_of(speaker, Question("", f"{prompt} ", target)).numbers == [1]
