"""The data card of a release: a README about the folder's contents and how they were made."""

import json
import pathlib
import urllib.parse

from tda.methods import METHODS
from tda.reports import formats, tables
from tda.viewer import run_figures
from tda.viewer.collection import Collection
from tda.viewer.notes import TYPES

# The fields of a record and their meanings; the card has those that occur.
FIELDS = {
    "example_id": "the query's id",
    "query_set": "the query's set",
    "inputs_plaintext": "the prompt",
    "targets_plaintext": "the target, whose log-probability is traced",
    "groundtruth": "the true answer",
    "fact_id": "the fact's id in the corpus of facts",
    "relation": "the fact's relation",
    "target_nats": "−log p(target given prompt) by the model, in nats",
    "target_rank": "the worst rank of a token of the target; 1: greedy decoding states it",
    "target_prior_nats": "mean −log p(target) after prompts about other subjects of the relation",
    "other_choice_nats": "−log p of each choice beside the target, where there are choices",
    "is_8b_correct": "whether greedy decoding states the target (of this model, whatever its size)",
    "8b_generations": "answers sampled from the model",
    "8b_confidence": "the share of these that state the target",
    "c4_frequency": "passages of the corpus that name both subject and target",
    "c4_frequency_bucket": "its bucket",
    "has_trex_sentence": "whether the corpus has a passage that is labelled with the fact",
    "first_correct_rank": "the rank of the first passage that is labelled with the fact, from 1",
    "first_strict_rank": "the same, by sure labels only",
    "proponents": "texts of the passages with the highest scores, highest first",
    "proponent_ids": "their ids",
    "proponent_scores": "their scores by the method, in its own unit",
    "proponent_correct": "whether each is labelled with the fact",
    "proponent_tail_patch": "change of p(target) by one training step on it alone",
    "proponent_ais_scores": "a judge's score of each, from 0 to 1: is the fact stated?",
    "proponent_ais_best_windows": "the sentences of each with this score",
    "proponent_kinds": "what each says, by judge and rule: " + ", ".join(TYPES),
    "opponents": "texts of the passages with the lowest scores, lowest first",
    "opponent_ids": "their ids",
    "opponent_scores": "their scores",
}
# Suggested views of the viewer: title, filter, and the field that it needs.
_PRESETS = (
    ("The model knows the fact", "knowledge = knows", "knowledge"),
    ("The model states the target", "model_correct", "model_correct"),
    ("At least half of the sampled answers state it", "confidence >= 0.5", "confidence"),
    ("The model says something else", "not model_correct", "model_correct"),
    ("The first proponent states the fact", "rank = 1", "correct"),
    ("No proponent states the fact", "found = no", "correct"),
)
_CARD = """---
# Fill in the licence. That of the corpus holds for the passages' texts.
license:
---
# {title}

Which training passages made a language model say that? {queries:,} prompts with their targets,
what the model says, and the passages that each of {count} methods scores highest (proponents) and
lowest (opponents), in the format of Chang et al. (2024).

**To look at it** open `index.html`, from disk, on any web server or on GitHub Pages. Views to begin
with:

{presets}

## What was run

{facts}

All settings: [config.json](config.json). Made by `{command}` of the Python package tda-jax.

## Figures

{figures}

All figures, with intervals and differences: [metrics.json](metrics.json), and the viewer's
overview.

## Methods

{methods}

Scores are comparable only within a query and a method.

## Files

{files}

`queries.jsonl` has the queries without passages. Every line of a file is one query:

```python
import gzip, json

with gzip.open("results/{first}.jsonl.gz", "rt", encoding="utf-8") as lines:
    records = [json.loads(line) for line in lines]
```

## Fields

{fields}

## Limits

A high score says that a passage influenced the model according to the method, not that it did:
tail-patch and retraining measure that. Labels and judges err. Passages are quoted unchanged from
the corpus, whoever wrote them.

## Citation

Chang, Rajagopal, Bolukbasi, Dixon, Tenney: *Scalable Influence and Fact Tracing for Large
Language Model Pretraining*, ICLR 2025, arXiv 2410.17413, introduce TrackStar and the format of
these files.
"""


def describe(collection: Collection, workdir: pathlib.Path, out: pathlib.Path) -> str:
    """Returns the card of a release in Markdown.

    Args:
        collection: the release's results.
        workdir: the run's directory.
        out: the release's folder, with all its other files.
    """
    files = collection.files
    config = json.loads((workdir / "config.json").read_text("utf-8"))
    run = run_figures.read(workdir) or {"facts": []}
    facts = [*run["facts"][:1], *_model(config, workdir), *run["facts"][1:]]
    # Some fields are only in a sample of the queries.
    fields = {name for file in files for row in range(len(file)) for name in file.record(row)}
    sizes = [
        (path.relative_to(out).as_posix(), path.stat().st_size)
        for path in [out / "queries.jsonl", *sorted((out / "results").iterdir())]
    ]
    pages = [p for name in ("data", "static", "plots") for p in (out / name).rglob("*.*")]
    viewer = sum(p.stat().st_size for p in pages)
    return _CARD.format(
        title=f"What made a model say it: {len(files)} methods, {len(files[0]):,} queries",
        queries=len(files[0]),
        count=len(files),
        presets="\n".join(_presets(collection)),
        facts="\n".join(f"- {name}: {text}" for name, text in facts),
        command=f"tda {'table2' if (workdir / 'table2.md').is_file() else 'trace'}",
        figures=(workdir / "table.md").read_text("utf-8").split("\n## ")[0].strip(),
        methods=_methods([file.label for file in files]),
        files=formats.markdown(
            ["file", "MB"],
            [
                *([f"`{name}`", f"{size / 1e6:.2f}"] for name, size in sizes),
                ["the viewer: `index.html`, `data/`, `static/`, `plots/`", f"{viewer / 1e6:.2f}"],
            ],
            "lr",
        ),
        first=files[0].label,
        fields=formats.markdown(
            ["field", "meaning"],
            [[f"`{name}`", meaning] for name, meaning in FIELDS.items() if name in fields],
            "ll",
        ),
    )


def _model(config: dict, workdir: pathlib.Path) -> list[list[str]]:
    """Returns facts about the model and its training, as names and texts."""
    facts, shape = [], workdir / "model" / "config.json"
    if shape.is_file():
        sizes = {k: x for k, x in json.loads(shape.read_text("utf-8")).items() if type(x) is int}
        facts.append(["its shape", ", ".join(f"{k} {x:,}" for k, x in sizes.items())])
    train = config["train"]
    if train["epochs"]:
        text = f"{train['optimizer']}, learning rate {train['learning_rate']:g}, "
        text += f"{train['tokens_per_batch']:,} tokens a batch, epochs: {train['epochs']:g}"
        facts.append(["training here", text])
    return facts


def _methods(labels: list[str]) -> str:
    """Returns a table of the methods and the settings in which their scores differ."""
    rows = []
    for label in labels:
        method = METHODS.get(label)
        cells = tables.switches(method).values() if method else ["", "", ""]
        rows.append([f"`{label}`", method.title if method else "", *cells])
    head = ["name", "method", "optimizer's moments", "R", "unit norm"]
    return formats.markdown(head, rows, "llccc")


def _presets(collection: Collection) -> list[str]:
    """Returns links to suggested views of the viewer, as lines of a list."""
    main, *others = collection.files
    present = main.describe()["fields"]
    presets = [(title, query, main.label) for title, query, field in _PRESETS if field in present]
    for other in others if "correct" in present else ():
        title = f"{main.title} finds a passage that states the fact first, {other.title} later"
        query = f"rank = 1 and not {other.label}.rank = 1"
        presets.append((title, query, f"{main.label},{other.label}"))
    return [f"- [{title}](index.html#{_address(query, files)})" for title, query, files in presets]


def _address(query: str, files: str) -> str:
    state = {"view": "query", "files": files, "filter": query}
    return urllib.parse.urlencode(state, quote_via=urllib.parse.quote)
