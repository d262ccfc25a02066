"""Live questions to a finished run: its model, tokenizer and stores, found in its workdir."""

import dataclasses
import json
import math
import pathlib
from collections.abc import Callable

import jax
from flax import nnx

from configs import defaults
from experiments.workdir import fingerprint, write_json
from tda import checkpoint, sharding
from tda.data.tokenizer import Tokenizer
from tda.gradients import second_moments, sites
from tda.gradients.projection import Projection
from tda.live import Encoded, Hessian, Tracer, finished_stores
from tda.methods import METHODS
from tda.methods import parse as parse_methods
from tda.model import functional
from tda.model.decoder import Decoder
from tda.store import GradientStore

# Written at the end of a run, so that questions are answered by its own settings.
CONFIG = "config.json"


class LiveError(ValueError):
    """A workdir cannot answer live questions."""


def remember(config, workdir) -> None:
    """Writes a run's config into its workdir."""
    write_json(workdir / CONFIG, config.to_dict())


def open_workdir(path) -> "LiveRun | None":
    """A finished run to ask; None where the workdir holds no model."""
    path = pathlib.Path(path)
    return LiveRun(path) if (path / "model" / "config.json").exists() else None


class LiveRun:
    """Answers a viewer's questions (`tda.viewer.server.Live`); opened by the first of them.

    Attributes:
        heat_methods: names of the methods whose scores have parts by position.
    """

    heat_methods = tuple(n for n, m in METHODS.items() if m.is_plain)

    def __init__(self, path: pathlib.Path):
        self._path = path
        self._tracer: Tracer | None = None

    def _open(self, progress: Callable) -> Tracer:
        if self._tracer is None:
            progress("opening the model and its store", 0, 0)
            self._config = _config_of(self._path)
            self._tracer, self._parameters = load(self._path, self._config)
        return self._tracer

    def describe(self, progress: Callable) -> dict:
        """Methods, which of them can be asked, and sizes."""
        tracer = self._open(progress)
        usual = [m for m in self._config["methods"].split(",") if m in METHODS]
        return {
            "methods": [
                {
                    "name": n,
                    "title": m.title,
                    "usual": n in usual,
                    "lacks": tracer.lacks(m),
                }
                for n, m in METHODS.items()
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


def _config_of(path: pathlib.Path) -> dict:
    """The run's config; a run of an older version left none, and had the defaults perhaps."""
    config = defaults.get_config().to_dict()
    if (path / CONFIG).exists():
        there = json.loads((path / CONFIG).read_text(encoding="utf-8"))
        config = {
            k: v | there.get(k, {}) if isinstance(v, dict) else there.get(k, v)
            for k, v in config.items()
        }
    return config


def load(path: pathlib.Path, config: dict) -> tuple[Tracer, int]:
    """The tracer of a finished run, and how many parameters its model has.

    Args:
        path: the workdir.
        config: the run's config, as plain values.

    Raises:
        LiveError: something of it is missing or does not belong together; the message says what.
    """
    root = str(path / "model" / "checkpoints")
    made = _json(path / "stages" / "train.json")["made_from"]
    step = made["steps"]
    tokenizer = Tokenizer.load(path / "model" / "tokenizer.json")
    model = _model(_json(path / "model" / "config.json"), root, step)
    encoded = {}
    wanted = {"checkpoint": fingerprint(made), "step": step, "tokenizer": tokenizer.fingerprint()}
    stores = finished_stores(sorted((path / "stores").glob("corpus-*")))
    queries = finished_stores(sorted((path / "stores").glob("queries-*")))
    for corrected in (False, True):
        fitting = [s for s in stores if _fits(s, wanted, corrected)]
        fitting.sort(key=lambda s: not _is_configs(s, config))
        if fitting:
            encoded[corrected] = _encoded(fitting[0], queries, model, root, step)
    if not encoded:
        raise LiveError(
            f"{path}/stores has no finished store of this model's gradients; finish the run with "
            "a gradient method and store.dtype other than none"
        )
    h = config["hessian"]
    if h["damping"] < 0 or h["cutoff"] or h["evaluation"] != "all":
        raise LiveError(
            "the run's R is made in a way that live questions do not know (hessian.damping=-1, "
            "hessian.cutoff or hessian.evaluation); view its results with --nolive"
        )
    how = Hessian(h["sample"], h["seed"], h["component"], h["weight"], h["damping"])
    count = sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
    tracer = Tracer(model, tokenizer, config["model"]["context"], encoded, how, path / "live")
    return tracer, count


def _json(path: pathlib.Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise LiveError(f"{path} is missing: the run is not finished") from error


def _model(arguments: dict, root: str, step: int) -> nnx.Module:
    model = Decoder(**arguments, rngs=nnx.Rngs(0))
    model_fn, params = functional.split(model)
    # Questions come one at a time: one device, whatever the run was trained on.
    mesh = sharding.make_mesh(devices=jax.local_devices()[:1])
    abstract = functional.abstract(params, model_fn.axes, mesh)
    return model_fn.merge(checkpoint.restore_parameters(root, abstract, step))


def _fits(store: GradientStore, wanted: dict, corrected: bool) -> bool:
    made = store.manifest["fingerprint"]
    same = all(made.get(k) == v for k, v in wanted.items())
    return same and (made["correction"] != "none") == corrected


def _is_configs(store: GradientStore, config: dict) -> bool:
    """Whether a store was made by the config's own settings, and not by an earlier run's."""
    made, g = store.manifest["fingerprint"], config["gradients"]
    own = made["correction"] in ("none", g["correction"])
    same = all(made[k] == g[k] for k in ("output", "include", "exclude", "untapped"))
    dtype = store.manifest["dtype"] == config["store"]["dtype"]
    return own and same and dtype and made["projection"] == config["projection"]


def _beside(scale: second_moments.Scale) -> second_moments.Scale:
    """A scale on the model's device, whichever devices it was saved from."""
    parts = {f.name: getattr(scale, f.name) for f in dataclasses.fields(scale)}
    device = jax.local_devices()[0]
    there = {n: jax.device_put(x, device) for n, x in parts.items() if x is not None}
    return dataclasses.replace(scale, **there)


def _encoded(
    store: GradientStore, queries: list[GradientStore], model: nnx.Module, root: str, step: int
) -> Encoded:
    made = store.manifest["fingerprint"]
    include, exclude = made["include"] or None, made["exclude"] or None
    chosen = sites.find(model, include, exclude, made["untapped"])
    correction = made["correction"]

    def scales():
        if correction == "none":
            return None
        if made["second_moments"] != "optimizer":
            raise LiveError(
                "the second moments of this run's corrected gradients were estimated from its "
                "text, not read from the checkpoint; ask by a method without correction"
            )
        found = second_moments.read(root, chosen, correction, step)
        return {path: _beside(scale) for path, scale in found.items()}

    same = [q for q in queries if q.manifest["fingerprint"] == made]
    return Encoded(
        store,
        same[0] if same else None,
        Projection(**made["projection"]),
        scales,
        made["output"],
        include,
        exclude,
        made["untapped"],
    )
