"""Live questions to a finished run: its model, tokenizer and stores, found in its workdir."""

import math
import pathlib
from collections.abc import Callable

import jax
from flax import nnx

from tda.live import Hessian, Tracer, live_stores, opened
from tda.live import others as live_others
from tda.live.sums import Checkpoints
from tda.methods import METHODS
from tda.methods import parse as parse_methods
from tda.run.remembered import LiveError, Reread, config_of

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


def load(path: pathlib.Path, config: dict) -> tuple[Tracer, int]:
    """The tracer of a finished run, and how many parameters its model has.

    Args:
        path: the workdir.
        config: the run's config, as plain values.

    Raises:
        LiveError: something of it is missing or does not belong together; the message says what.
    """
    run = opened.load(path, config)
    there = run.remembered
    text = opened.text_of(run.corpus[0]) if run.corpus else None
    text = there.fingerprint["corpus"] if there else text
    reread = Reread(run.config, path, text, len(there.lengths) if there else 0)
    encoded = live_stores.encoded(run, reread)
    if not encoded and there is None:
        raise LiveError(
            f"{path}/stores has no finished store of this model's gradients; finish the run with "
            "a gradient method and store.dtype other than none"
        )
    passages = next(iter(encoded.values())).store if encoded else reread
    h = run.config.hessian
    how = Hessian(h.sample, h.seed, h.component, h.weight, h.damping, h.cutoff, h.evaluation)
    known = there.known if there else None
    others = live_others.others(run, passages, text, reread)
    others["several"] = Checkpoints(run, reread, how, known)
    whole = run.trained.model, run.tokenizer, run.config.model.context
    tracer = Tracer(*whole, encoded, how, path / "live", known, passages, others)
    count = sum(x.size for x in jax.tree.leaves(nnx.state(run.trained.model, nnx.Param)))
    return tracer, count
