"""The table of a run, and example queries with their passages, as text."""

import math

import numpy as np

from experiments.corpus import Corpus
from tda.methods import METHODS
from tda.retrieval.ranked import Ranked


def table(metrics: dict) -> str:
    """Methods × metrics as a Markdown table."""
    head = (
        "| method | MRR | recall@10 | MRR strict | recall@10 strict | MRR known | "
        "recall@10 known | tail-patch |"
    )
    lines = [head, "|---|" + "---:|" * 7]
    for name, m in metrics.items():
        cells = [
            _number(m[k])
            for k in (
                "mrr",
                "recall_at_10",
                "mrr_strict",
                "recall_at_10_strict",
                "mrr_known",
                "recall_at_10_known",
            )
        ]
        patch = m["tail_patch"]
        cells.append("" if patch is None else f"{100 * patch:+.2f}%")
        lines.append(f"| {METHODS[name].title} | " + " | ".join(cells) + " |")
    any_method = next(iter(metrics.values()))
    lines += [
        "",
        f"{any_method['n_queries']} queries, {any_method['n_known']} of them known (every token of "
        "the target ranks high under the prompt). Strict: only labels known to be sure count.",
    ]
    if any_method["tail_patch"] is not None:
        lines.append(
            "Tail-patch: mean change of the target's probability after one optimizer step on a "
            f"proponent, top 10 of {any_method['n_tail_patch_queries']} queries; a step with a "
            f"zero gradient changes it by {100 * any_method['tail_patch_control']:+.2f}%."
        )
    return "\n".join(lines)


def _number(x: float) -> str:
    return "–" if math.isnan(x) else f"{x:.3f}"


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
                mark = "✓" if int(row) in correct else " "
                lines.append(f"    {mark} {score:8.3f}  {corpus.text_of(int(row))}")
        lines.append("")
    return "\n".join(lines)
