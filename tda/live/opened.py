"""A finished run as its workdir has it: model, tokenizer, config, and what it remembers."""

import dataclasses
import json
import pathlib

import jax
import optax
from flax import nnx
from ml_collections import ConfigDict

from tda.data.pretrained_tokenizer import PretrainedTokenizer
from tda.data.tokenizer import Tokenizer
from tda.live import finished_stores
from tda.model import functional, pretrained
from tda.model.decoder import Decoder
from tda.run import checkpoints, remembered, train
from tda.run.remembered import LiveError, Remembered
from tda.run.run import Trained
from tda.runtime import sharding
from tda.runtime.fingerprint import fingerprint
from tda.store import GradientStore
from tda.training import checkpoint


@dataclasses.dataclass(frozen=True)
class Opened:
    """A finished run.

    Attributes:
        path: its workdir.
        config: its config.
        trained: its model, on one device: questions come one at a time.
        tokenizer: the model's.
        remembered: what is known of its corpus; None of a run of an older version.
        corpus, queries: the stores of gradients by this model that lack nothing, the best first:
            those of the run's own corpus and queries, and those written last.
    """

    path: pathlib.Path
    config: ConfigDict
    trained: Trained
    tokenizer: Tokenizer | PretrainedTokenizer
    remembered: Remembered | None
    corpus: list[GradientStore]
    queries: list[GradientStore]


def load(path: pathlib.Path, config: dict) -> Opened:
    """Opens a finished run.

    Args:
        path: the workdir.
        config: the run's config, as plain values.

    Raises:
        LiveError: something of it is missing; the message says what.
    """
    config = ConfigDict(config)
    root = str(path / "model" / "checkpoints")
    made = _json(path / "stages" / "train.json")["made_from"]
    step = train.traced_step(config, root, made["steps"])
    tokenizer = _tokenizer(path, config, "pretrained" in made)
    mesh = sharding.make_mesh(devices=jax.local_devices()[:1])
    model = _model(_json(path / "model" / "config.json"), root, step, mesh)
    trained = Trained(model, root, step, optax.identity(), mesh, made)  # no step is taken
    known = remembered.read(path)
    run = Opened(path, config, trained, tokenizer, known, [], [])
    return dataclasses.replace(run, **stores_of(run, step))


def at_step(run: Opened, step: int) -> Opened:
    """The run as it was at another checkpoint, with the stores of that."""
    then = dataclasses.replace(run, trained=checkpoints.at_step(run.trained, step))
    return dataclasses.replace(then, **stores_of(run, step))


def stores_of(run: Opened, step: int) -> dict[str, list[GradientStore]]:
    """The finished stores of a checkpoint's gradients, "corpus" and "queries", the best first."""
    wanted = {
        "checkpoint": fingerprint(run.trained.fingerprint),
        "step": step,
        "tokenizer": run.tokenizer.fingerprint(),
    }
    out = {}
    for name in ("corpus", "queries"):
        found = finished_stores(sorted((run.path / "stores").glob(f"{name}-*")))
        out[name] = [s for s in found if _fits(s, wanted)]
        if run.remembered is not None:
            text = run.remembered.fingerprint[name]
            out[name].sort(key=lambda s, text=text: text_of(s) != text)
    return out


def text_of(store: GradientStore) -> str | None:
    """The fingerprint of the text whose gradients a store has."""
    return store.manifest["segments"][0].get("corpus")


def _fits(store: GradientStore, wanted: dict) -> bool:
    made = store.manifest["fingerprint"]
    return all(made.get(k) == v for k, v in wanted.items())


def _json(path: pathlib.Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise LiveError(f"{path} is missing: the run is not finished") from error


def _tokenizer(path: pathlib.Path, config, is_pretrained: bool):
    if not is_pretrained:
        return Tokenizer.load(path / "model" / "tokenizer.json")
    try:
        return pretrained.load_tokenizer(config.model.pretrained)
    except (ValueError, OSError) as error:
        raise LiveError(
            f"the tokenizer of model.pretrained={config.model.pretrained} cannot be read, which "
            f"the run took from there: {error}"
        ) from error


def _model(arguments: dict, root: str, step: int, mesh) -> nnx.Module:
    model = Decoder(**arguments, rngs=nnx.Rngs(0))
    model_fn, params = functional.split(model)
    abstract = functional.abstract(params, model_fn.axes, mesh)
    return model_fn.merge(checkpoint.restore_parameters(root, abstract, step))
