"""Live questions to a finished run: its model, tokenizer and stores, found in its workdir."""

import math
import pathlib
from collections.abc import Callable

import jax
from flax import nnx

from tda.live.live_stores import encoded_kinds
from tda.live.others import others
from tda.live.retrievers import StoredPassages
from tda.live.sums import Checkpoints
from tda.live.tracer import Tracer
from tda.methods import METHODS
from tda.methods import parse as parse_methods
from tda.run.remembered import LiveError, config_of, open_run

__all__ = ["LiveError", "LiveRun", "load", "open_workdir"]


def open_workdir(path) -> "LiveRun | None":
    """A finished run to ask; None where the workdir holds no model."""
    path = pathlib.Path(path)
    return LiveRun(path) if (path / "model" / "config.json").exists() else None


class LiveRun:
    """Answers a viewer's questions (`tda.viewer.server.Live`); opened by the first of them.

    Attributes:
        heat_methods: names of the methods whose scores have parts by position.
    """

    heat_methods = tuple(n for n, m in METHODS.items() if m.shares_scan and m.curvature == "none")

    def __init__(self, path: pathlib.Path):
        self._path = path
        self._tracer: Tracer | None = None

    def _open(self, progress: Callable) -> Tracer:
        if self._tracer is None:
            progress("opening the model and its store", 0, 0)
            self._config = config_of(self._path)
            self._tracer, self._parameters = load(self._path, self._config)
        self._tracer.corpus.on_progress = progress
        return self._tracer

    def describe(self, progress: Callable) -> dict:
        """Methods, the run's own first; which of them can be asked; and sizes."""
        tracer = self._open(progress)
        named = [m.strip() for m in self._config["methods"].split(",")]
        usual = [m for m in named if m in METHODS]
        listed = [*usual, *(n for n in METHODS if n not in usual)]
        return {
            "methods": [
                {
                    "name": n,
                    "title": m.title,
                    "usual": n in usual,
                    "lacks": tracer.lacks(m),
                }
                for n in listed
                for m in [METHODS[n]]
            ],
            "passages": tracer.passages,
            "parameters": self._parameters,
        }

    def complete(self, progress: Callable, prompt: str, tokens: int) -> dict:
        """The model's own completion of a prompt."""
        steps = self._open(progress).speaker.complete(prompt, tokens, on_progress=progress)
        ended = bool(steps) and steps[-1]["token"] == "<eos>"
        return {"steps": steps[:-1] if ended else steps, "ended": ended}

    def trace(
        self, progress: Callable, prompt: str, target: str, methods: list[str], k: int
    ) -> dict:
        """Passages by method, as results records."""
        tracer = self._open(progress)
        chosen = parse_methods(",".join(methods))
        likelihood = tracer.speaker.likelihood(prompt, target)
        found = tracer.trace(prompt, target, chosen, k, progress)
        return {
            "probability": math.exp(-likelihood["nats"]),
            "rank": likelihood["rank"],
            "methods": [
                {"name": n, "title": m.title, "record": found[n]} for n, m in chosen.items()
            ],
        }

    def heat(self, progress: Callable, prompt: str, target: str, method: str, passage: str) -> dict:
        """What each position of a passage carries of its score."""
        tracer = self._open(progress)
        (chosen,) = parse_methods(method).values()
        return tracer.heat(prompt, target, chosen, passage, progress)


def load(path: pathlib.Path, config: dict | None = None) -> tuple[Tracer, int]:
    """The tracer of a finished run, and how many parameters its model has.

    Args:
        path: the workdir.
        config: the run's config, as plain values; read from the workdir by default.

    Raises:
        LiveError: something of it is missing or does not belong together; the message says what.
    """
    run = open_run(path, config)
    corpus, encoded = run.corpus, encoded_kinds(run)
    passages = StoredPassages(next(iter(encoded.values())).store) if encoded else corpus
    retrievers = others(run, passages) | {"several": Checkpoints(run)}
    model, context = run.trained.model, run.config.model.context
    folder = path / "live"
    tracer = Tracer(
        model,
        corpus.tokenizer,
        context,
        encoded,
        run.hessian,
        folder,
        corpus.known,
        passages,
        retrievers,
    )
    tracer.corpus = corpus
    return tracer, sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
