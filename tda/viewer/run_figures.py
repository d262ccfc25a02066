"""The facts of a run and the figures of its methods, for the top of the overview."""

import datetime
import json
import pathlib

from tda.methods import METHODS
from tda.viewer.results_file import finite

_METRICS = ("mrr", "recall_at_10", "tail_patch")


def read(workdir: pathlib.Path) -> dict | None:
    """Returns the overview's facts and figures, from a run's `metrics.json` and `config.json`.

    Returns:
        {facts: [[name, text], …], methods: [{name, title, METRIC: [mean, low, high], …}, …]},
        without the metrics that a method lacks; None without a finished evaluation.
    """
    path = workdir / "metrics.json"
    if not path.is_file():
        return None
    metrics = _load(path)
    methods = [
        {"name": name, "title": METHODS[name].title if name in METHODS else name}
        | {
            metric: [m[metric], *m.get("intervals", {}).get(metric, [])]
            for metric in _METRICS
            if m.get(metric) is not None
        }
        for name, m in metrics.items()
    ]
    facts = []
    if (workdir / "config.json").is_file():
        config = _load(workdir / "config.json")
        model, train, data = (config[room] for room in ("model", "train", "data"))
        epochs = f"{train['epochs']:g} epoch{'' if train['epochs'] == 1 else 's'}"
        size = model["pretrained"] or f"{model['size']}, from scratch: {epochs}"
        facts += [["model", size], ["corpus", data["corpus"] or data["sentences"] or data["name"]]]
    first = next(iter(metrics.values()), {})
    if "n_queries" in first:
        facts.append(["queries", f"{first['n_queries']:,}"])
    if "n_stated" in first:
        facts.append(["the model states", f"{first['n_stated']:,} of them"])
    day = datetime.date.fromtimestamp(path.stat().st_mtime)
    return {"facts": [*facts, ["evaluated", day.isoformat()]], "methods": methods}


def _load(path: pathlib.Path) -> dict:
    # Numbers that are not finite become None: JSON lacks them.
    text = path.read_text(encoding="utf-8")
    return json.loads(text, parse_float=finite, parse_constant=finite)
