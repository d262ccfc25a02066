"""The tables of a run, and example queries with their passages, as text."""

from collections.abc import Iterable

from tda.methods import METHODS

_MAIN = (
    ("mrr", "MRR"),
    ("recall_at_10", "recall@10"),
    ("mrr_strict", "MRR strict"),
    ("recall_at_10_strict", "recall@10 strict"),
    ("mrr_known", "MRR known"),
    ("recall_at_10_known", "recall@10 known"),
    ("tail_patch", "tail-patch"),
)
# The row that the others are compared with, where it is there.
_REFERENCE = "trackstar"


def table(metrics: dict) -> str:
    """Methods × metrics as a Markdown table, with what its columns mean."""
    lines = _rows(metrics, _MAIN, _cell)
    m = next(iter(metrics.values()))
    lines += [
        "",
        f"{m['n_queries']} queries, {m['n_known']} of them known (every token of "
        "the target ranks high under the prompt). Strict: only labels known to be sure count.",
    ]
    if m["n_tail_patch_queries"]:
        rule = m["tail_patch_rule"]
        lines.append(
            "Tail-patch: mean change of the target's probability after one optimizer step on a "
            f"proponent, top 10 of {m['n_tail_patch_queries']} queries; a step with a "
            f"zero gradient changes it by {_percent(m['tail_patch_control'])}. A step: "
            f"{rule['optimizer']}, its state {rule['optimizer_state']}, learning rate "
            f"{rule['learning_rate']:.3g}, {rule['batch']}."
        )
    return "\n".join(lines)


def reference_of(methods: Iterable[str]) -> str:
    """The method that others are compared with: TrackStar, or the first."""
    names = list(methods)
    return _REFERENCE if _REFERENCE in names else names[0]


def details(metrics: dict) -> str:
    """The tables beside the main one: intervals, other conventions, differences, groups."""
    reference = reference_of(metrics)
    parts = [
        "## 95% intervals\n\nPercentile bootstrap over queries.",
        _rows(metrics, (*_MAIN[:4], _MAIN[-1]), _interval),
        "## Conventions of MRR\n\nWith full ranks, and MRR@10: ranks beyond 10 count nothing.",
        _rows(
            metrics,
            (
                ("mrr", "MRR"),
                ("mrr_at_10", "MRR@10"),
                ("mrr_strict", "MRR strict"),
                ("mrr_at_10_strict", "MRR@10 strict"),
            ),
            _cell,
        ),
    ]
    if len(metrics) > 1:
        title = METHODS[reference].title
        parts += [
            f"## Difference to {title}\n\nA method's figure minus {title}'s over the same "
            "queries: mean, 95% interval, two-sided p (paired bootstrap).",
            _rows(
                {n: m["differences"][reference] for n, m in metrics.items() if n != reference},
                (*_MAIN[:4], _MAIN[-1]),
                _difference,
            ),
        ]
    if next(iter(metrics.values()))["n_tail_patch_queries"]:
        parts += [
            "## Tail-patch by depth\n\nMean over the first k proponents: change of the "
            "probability, then of the log-probability in nats.",
            _rows(
                metrics,
                [
                    (f"{name}_at_{k}", f"{title} k = {k}")
                    for name, title in (("tail_patch", "p"), ("tail_patch_log", "log p"))
                    for k in (1, 3, 5, 10)
                    if any(f"{name}_at_{k}" in m for m in metrics.values())
                ],
                _cell,
            ),
        ]
    parts += _contents(metrics)
    for key, title in (
        ("by_stated", "whether greedy decoding states the fact"),
        ("by_frequency", "fact frequency: passages that name both entities"),
        ("by_relation", "relation"),
    ):
        for name, what in (("mrr", "MRR"), ("tail_patch", "tail-patch")):
            if any(m.get(name) is not None for m in metrics.values()):
                parts += [f"## {what} by {title}", _by_group(metrics, key, name)]
    return "\n\n".join(p if isinstance(p, str) else "\n".join(p) for p in parts)


def _contents(metrics: dict) -> list:
    """What the first passages have to do with their queries, and what steps on them do."""
    kinds = list(next(iter(metrics.values()))["by_content"])
    columns = [(kind, kind) for kind in kinds]
    contents = {name: m["by_content"] for name, m in metrics.items()}
    parts: list = [
        "## What the proponents say\n\nTheir shares; a passage is of the first kind that fits.",
        _rows(contents, columns, lambda m, kind: _share(m[kind])),
    ]
    if any(x["n_tail_patches"] for m in contents.values() for x in m.values()):
        parts += [
            "## Tail-patch by what the passage says\n\nMean over pairs of a query and a passage "
            "(their number).",
            _rows(contents, columns, lambda m, kind: _patched(m[kind])),
        ]
    return parts


def _share(found: dict) -> str:
    if found["share"] is None:
        return "–"
    low, high = found["interval"]
    ends = "" if low is None else f" [{low:.1%}, {high:.1%}]"
    return f"{found['share']:.1%}{ends}"


def _patched(found: dict) -> str:
    count = found["n_tail_patches"]
    return f"{_percent(found['tail_patch'])} ({count:,})" if count else ""


def _by_group(metrics: dict, key: str, name: str) -> list[str]:
    groups: dict[str, int] = {}
    for m in metrics.values():
        for group, found in m[key].items():
            groups[group] = max(groups.get(group, 0), found["counts"].get(name, 0))
    columns = [(g, f"{g} ({count})") for g, count in groups.items() if count]
    by_method = {n: {g: found.get(name) for g, found in m[key].items()} for n, m in metrics.items()}

    def cell(m: dict, group: str) -> str:
        x = m.get(group)
        return _percent(x) if name == "tail_patch" else _number(x)

    return _rows(by_method, columns, cell)


def _rows(by_method: dict, columns, cell) -> list[str]:
    head = "| method | " + " | ".join(title for _, title in columns) + " |"
    lines = [head, "|---|" + "---:|" * len(columns)]
    for name, m in by_method.items():
        cells = [cell(m, key) for key, _ in columns]
        lines.append(f"| {METHODS[name].title} | " + " | ".join(cells) + " |")
    return lines


def _cell(m: dict, key: str) -> str:
    x = m.get(key)
    if key.startswith("tail_patch_log"):
        return _nats(x)
    return _percent(x) if key.startswith("tail_patch") else _number(x)


def _interval(m: dict, key: str) -> str:
    ends = m["intervals"].get(key)
    if ends is None:
        return _cell(m, key)
    return f"{_cell(m, key)} [{', '.join(_cell({key: x}, key) for x in ends)}]"


def _difference(m: dict, key: str) -> str:
    d = m.get(key)
    if d is None:
        return ""
    show = _percent if key.startswith("tail_patch") else _signed
    ends = "" if d["low"] is None else f" [{show(d['low'])}, {show(d['high'])}], p {d['p']:.2g}"
    return show(d["difference"]) + ends


def _number(x: float | None) -> str:
    return "–" if x is None else f"{x:.3f}"


def _signed(x: float) -> str:
    return f"{x:+.3f}"


def _percent(x: float | None) -> str:
    return "" if x is None else f"{100 * x:+.2f}%"


def _nats(x: float | None) -> str:
    return "" if x is None else f"{x:+.4f}"
