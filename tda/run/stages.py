"""The stages of a run in order, from the corpus to the tables."""

import numpy as np

from tda import methods
from tda.reports import tables
from tda.retrieval.ranked import Ranked
from tda.run import corpus, evaluate, index, measures, remembered, retrieve, train
from tda.run.run import Corpus
from tda.run.workdir import Workdir
from tda.runtime import processes


def check(config, encoder: bool = True) -> None:
    """Nothing, where the config can be obeyed as far as it tells: before hours of training.

    Args:
        config: of the run.
        encoder: whether a sentence encoder is looked for too, which may have to be loaded.

    Raises:
        ValueError: it cannot; the message names the key.
    """
    chosen = methods.parse(config.methods)
    if not encoder:
        chosen = {n: m for n, m in chosen.items() if m.retriever != "dense"}
    retrieve.check(config, chosen)
    index.check(config)
    measures.check(config)


def trace(config, workdir: Workdir) -> tuple[dict, dict]:
    """All stages in order; returns the metrics, and what is to be told of them, by method.

    Every process of a run calls it; the first alone writes what is not a shard or a checkpoint.
    """
    processes.check_alike("config", config.to_json())
    check(config)
    data = corpus.load(config, workdir)
    trained = train.run(config, data, workdir)
    measures.check_step(config, trained)
    ranked, notes = retrieve.retrieve(config, data, trained, workdir)
    metrics = evaluate.run(config, data, trained, ranked, workdir)
    text = "\n".join([tables.run_table(metrics), *index.told(notes)])
    if processes.is_first():
        whole = f"{text}\n\n{tables.run_details(metrics)}\n"
        (workdir / "table.md").write_text(whole, encoding="utf-8")
        remembered.remember(config, data, workdir)
    print("\n" + examples(config, data, ranked))
    print(text)
    for name, note in notes.items():
        if told := retrieve.told(note):
            print(f"{name}: {told}")
    print(f"\nfiles: {workdir.path}/results/METHOD.jsonl, metrics.json, table.md")
    print(f"to look at them: python -m experiments.view --workdir={workdir.path}")
    return metrics, notes


def examples(config, corpus: Corpus, ranked: dict[str, Ranked], count: int = 3) -> str:
    """A few queries with the top three proponents of each method in full text."""
    chosen = np.random.default_rng(config.data.seed + 1).permutation(len(corpus.queries))[:count]
    lines = []
    for q in sorted(map(int, chosen)):
        fact = corpus.queries[q]
        correct = set(corpus.correct["all"][q].tolist())
        lines.append(f"{fact.prompt(config.data.prompt)} → {fact.entity1}")
        for name, found in ranked.items():
            lines.append(f"  {name}")
            for row, score in list(
                zip(found.proponents[q], found.proponent_scores[q], strict=True)
            )[:3]:
                if row < 0:  # a method that found fewer
                    continue
                mark = "✓" if int(row) in correct else " "
                lines.append(f"    {mark} {score:8.3f}  {corpus.text_of(int(row))}")
        lines.append("")
    return "\n".join(lines)
