"""Judges: names and words by hand, and models of inference against a direct computation."""

import numpy as np
import pytest

from tda.evaluation import entailment, judges
from tda.evaluation.judge import Claim, JudgeSettings, sentences, windows
from tda.evaluation.lexical import Lexical

BORN = Claim(
    "Ann Lee was born in Oslo", "Ann Lee was born in", ("Oslo", "Kristiania"), ("Ann Lee",)
)
WORDS = "premise : hypothesis : Ann Lee was born in Oslo , and left Rome 1 0".split()


def test_sentences_end_at_punctuation_and_lines():
    text = ' Dr. Ann J. Lee (b. 1901) left. She said "No!" to him. Then...\n'
    text += "An e.g. of U.S. law\n\n\nEnd. "
    assert [text[s] for s in sentences(text)] == [
        "Dr. Ann J. Lee (b. 1901) left.",
        'She said "No!" to him.',
        "Then...",
        "An e.g. of U.S. law",
        "End.",
    ]
    assert sentences(" \n ") == [] and windows("", 2) == [slice(0, 0)]


def test_windows_are_consecutive_sentences_of_the_text():
    text = "One. Two!  Three? Four."
    shown = [text[w] for w in windows(text, 2)]
    assert shown == ["One. Two!", "Two!  Three?", "Three? Four."]
    assert [text[w] for w in windows(text, 0)] == [text] == [text[w] for w in windows(text, 4)]


@pytest.mark.parametrize(
    "premise, score",
    [
        ("Ann Lee was born in Oslo.", 1.0),
        ("ANN LEE, births in kristiania", 0.8),
        ("Ann Lee left Oslo.", 0.8),
        ("Lee was born in Oslo.", 0.5),
        ("She was born in Oslo.", 0.0),
        ("Ann Lee was born in Rome, not in Osloville.", 0.0),
    ],
)
def test_a_premise_without_the_target_or_the_subject_states_nothing(premise, score):
    assert Lexical().score([(premise, BORN)]) == pytest.approx([score])


@pytest.mark.parametrize("names", [("The Who",), ("!!!",), ("Douglas Adams", "The")])
def test_a_name_without_words_of_its_own_is_found_whole_or_not_at_all(names):
    """Guards: a name of function words alone, of which every passage has all the words."""
    claim = Claim("x", f"{names[0]} comes from", ("Cambridge",), names)
    scores = Lexical().score([("Cambridge has a university", claim)])
    assert scores.tolist() == [0.0]
    (score,) = Lexical().score([(f"{names[0]} played in Cambridge", claim)])
    assert score == pytest.approx(0.8)


def test_without_names_the_prompt_stands_for_the_subject():
    claim = Claim("The capital of Norway is Oslo", "The capital of Norway is", ("Oslo",))
    premises = ["Oslo, Norway's capital", "Norway loves Oslo", "Oslo", "Norway's capital"]
    scores = Lexical().score([(p, claim) for p in premises])
    assert scores.tolist() == [1.0, 0.5, 0.0, 0.0]
    nicknamed = Claim("X", "X", ("Oslo",), ("Bob Roe Poe", "Ann Lee"))
    assert Lexical().score([("Lee left Oslo", nicknamed)]) == pytest.approx([0.5 * 0.8])
    qualified = Claim("X is Y", "X is", ("Y",), ("X (comedian)",))
    assert Lexical().score([("X is Y", qualified)]) == [1.0]
    qualified = Claim("Ann Lee", "Ann Lee", ("Y",), ("Ann Lee (singer)",))
    assert Lexical().score([("Lee is Y", qualified)]) == [0.5]


def test_names_of_judges(monkeypatch):
    monkeypatch.setattr(judges, "JUDGES", dict(judges.JUDGES))
    judges.register("mine", lambda settings: settings.batch)
    assert judges.make("mine", JudgeSettings(batch=7)) == 7
    with pytest.raises(ValueError, match="'nli' is registered already"):
        judges.register("nli", Lexical)
    with pytest.raises(ValueError, match="judge.name='gemini'; there are lexical, nli, mine"):
        judges.make("gemini", JudgeSettings())
    with pytest.raises(ValueError, match="judge.model='x', but the lexical judge has no model"):
        judges.make("lexical", JudgeSettings(model="x"))


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setattr(entailment.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"extra `judge`: pip install 'tda-jax\[judge\]'"):
        judges.make("nli", JudgeSettings(model="x"))


@pytest.fixture(scope="module")
def save(tmp_path_factory):
    """Saves a tiny model with random weights and a tokenizer of words; returns its directory."""
    torch = pytest.importorskip("torch", reason="needs the extra `judge`")
    transformers = pytest.importorskip("transformers", reason="needs the extra `judge`")
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {w: i for i, w in enumerate(dict.fromkeys(["[P]", "[E]", "[U]", *WORDS]))}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[U]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="$A [E]", pair="$A [E] $B:1 [E]:1", special_tokens=[("[E]", 1)]
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[P]", eos_token="[E]", unk_token="[U]"
    )
    torch.manual_seed(0)
    count = len(vocabulary)
    small = dict(vocab_size=count, pad_token_id=0, eos_token_id=1)
    t5 = dict(d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0)
    bert = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
    bert |= small | dict(max_position_embeddings=24, type_vocab_size=2)

    def make(name, labels=("contradiction", "Entailment", "neutral"), bare=False):
        path = tmp_path_factory.mktemp(name)
        if name == "t5":
            config = transformers.T5Config(**small, **t5)
            model = transformers.T5ForConditionalGeneration(config)
        else:
            config = transformers.BertConfig(**bert, id2label=dict(enumerate(labels)))
            model = transformers.BertForSequenceClassification(config)
        # Norms start as ones and biases as zeros; the weights are large enough to tell inputs.
        for weights in model.parameters():
            torch.nn.init.normal_(weights, std=0.5)
        (model.bert if bare else model).save_pretrained(path)
        if bare:
            config.save_pretrained(path)
        tokenizer.save_pretrained(path)
        return str(path)

    return make, tokenizer


PREMISES = ["Ann Lee left Rome", "Oslo", "Lee was born in Rome , and Ann in Oslo , and left", ""]


def direct(tokenizer, model, premise, claim):
    """The score of one pair alone, from the library's own classes."""
    import torch

    if model.config.is_encoder_decoder:
        inputs = tokenizer(f"premise: {premise} hypothesis: {claim}", return_tensors="pt")
        start = torch.zeros((1, 1), dtype=torch.long)
        answer = tokenizer.convert_tokens_to_ids("1")
        logits = model(**inputs, decoder_input_ids=start).logits[0, 0]
    else:
        inputs, answer = tokenizer(premise, claim, return_tensors="pt"), 1
        logits = model(**inputs).logits[0]
    return float(torch.softmax(logits, -1)[answer].detach())


@pytest.mark.parametrize("name", ["t5", "bert"])
def test_scores_are_those_of_the_library(save, name):
    import transformers

    make, tokenizer = save
    path = make(name)
    kinds = {
        "t5": transformers.AutoModelForSeq2SeqLM,
        "bert": transformers.AutoModelForSequenceClassification,
    }
    model = kinds[name].from_pretrained(path).eval()
    pairs = [(premise, BORN) for premise in PREMISES]
    expected = [direct(tokenizer, model, premise, BORN.text) for premise in PREMISES]
    assert max(expected) - min(expected) > 20 * 1e-4 * min(expected)
    judge = judges.make("nli", JudgeSettings(model=path, batch=3))
    np.testing.assert_allclose(judge.score(pairs), expected, rtol=1e-4)
    # In another order and batch.
    turned = judges.make("nli", JudgeSettings(model=path, batch=1)).score(pairs[::-1])
    np.testing.assert_allclose(turned[::-1], expected, rtol=1e-4)
    assert path not in judge.identity  # its contents, wherever they lie


@pytest.mark.parametrize("name, tokens", [("t5", 17), ("bert", 14)])
def test_a_long_premise_is_cut_and_never_its_claim(save, name, tokens):
    make, _ = save
    judge = judges.make("nli", JudgeSettings(model=make(name), tokens=tokens))
    long, cut = " ".join(["Ann left Rome and"] * 9), "Ann left Rome and Ann left"
    assert judge.score([(long, BORN)]) == pytest.approx(judge.score([(cut, BORN)]), rel=1e-4)
    with pytest.raises(ValueError, match="leaves no room for a premise"):
        judge.score([("Oslo", Claim("Ann " * tokens, "", ()))])


def test_models_that_judge_nothing_are_refused(save, tmp_path):
    make, _ = save
    for path, message in (
        (make("bert", labels=("LABEL_0", "LABEL_1")), "must begin with 'entail'"),
        (make("bert", labels=("entailment", "entailed")), "must begin with 'entail'"),
        (str(tmp_path), "cannot load judge.model"),
        ("", "needs --config.judge.model"),
    ):
        with pytest.raises(ValueError, match=message):
            judges.make("nli", JudgeSettings(model=path))
    bare = judges.make("nli", JudgeSettings(model=make("bert", bare=True)))
    with pytest.raises(ValueError, match="lacks the weights 'classifier.bias' and 1 others"):
        bare.score([("Oslo", BORN)])
