"""Opens a finished run: its config, its model, and its corpus, which is read only if needed."""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Sequence

import jax
import numpy as np
import optax
from ml_collections import ConfigDict

from tda import store as stores
from tda.data.batches import buckets
from tda.model import pretrained
from tda.run import corpus as corpora
from tda.run import learnt_tokenizer, train
from tda.run.defaults import get_config
from tda.run.run import Corpus, Run, Trained
from tda.run.withdrawals import corpus_stores
from tda.run.workdir import Workdir
from tda.runtime import atomic_file, sharding
from tda.runtime.atomic_file import write_json
from tda.runtime.progress import Progress, silent
from tda.store import GradientStore, Passage
from tda.training import checkpoint

# Files that a run writes at its end, so that live questions use its own settings.
CONFIG = "config.json"
FILE = "corpus.npz"


class LiveError(ValueError):
    """The workdir cannot answer live questions, or not this one."""


@dataclasses.dataclass(frozen=True)
class Known:
    """A run's own queries in its order, and the passages that are correct for them."""

    ids: Sequence[str] = ()
    prompts: Sequence[str] = ()
    targets: Sequence[str] = ()
    correct: Sequence[np.ndarray] = ()  # passage rows of each query, int64

    def number(self, prompt: str, target: str) -> int | None:
        """Returns the number of the first query with this text, or None if there is none."""
        return self._numbers.get(_key(prompt, target))

    @functools.cached_property
    def _numbers(self) -> dict[tuple[str, str], int]:
        keys = [_key(*pair) for pair in zip(self.prompts, self.targets, strict=True)]
        # Backwards, so that the first of equal queries stays.
        return {key: q for q, key in reversed(list(enumerate(keys)))}


def _key(prompt: str, target: str) -> tuple[str, str]:
    # White space between the two does not make another question.
    return prompt.rstrip(), target.strip()


class RememberedCorpus:
    """A finished run's corpus, with the attributes of `Corpus`.

    Those that the workdir does not keep are read, when they are needed, from the files that the run
    read.

    Args:
        config, workdir: the run's.
        tokenizer: the tokenizer of the run's model.

    Attributes:
        known: the run's queries and their correct passages.
        rows: C, the number of passages.
        on_progress: called when the files are read.
        store: a store of the corpus's gradients, which has its texts; None if there is none.

    Raises:
        LiveError: the run is not finished.
    """

    def __init__(self, config: ConfigDict, workdir: Workdir, tokenizer):
        self._config, self._workdir = config, workdir
        self.tokenizer, self.buckets = tokenizer, buckets(config.model.context)
        self.on_progress: Progress = silent
        self.store: GradientStore | None = None
        try:
            with np.load(workdir / FILE, allow_pickle=False) as file:
                record = json.loads(file["told"].tobytes())
                correct = np.split(file["correct"], np.cumsum(file["counts"])[:-1])
                # Without labels the workdir keeps the tokens, and `lengths` follow from them.
                if "lengths" in file:
                    self.lengths = file["lengths"]
        except FileNotFoundError as error:
            raise LiveError(f"{workdir / FILE} is missing: the run is not finished") from error
        self.fingerprint: dict = record["fingerprint"]
        self.rows: int = record["rows"]
        self.known = Known(record["ids"], record["prompts"], record["targets"], correct)

    @functools.cached_property
    def files(self) -> Corpus:
        """The whole corpus, from the files that the run read.

        Raises:
            LiveError: the files are gone, or hold another corpus.
        """
        self.on_progress("reading the run's corpus", 0, 0)
        try:
            corpus = corpora.open_finished(self._config, self._workdir)
        except (ValueError, OSError) as error:
            raise LiveError(
                "this question needs the files that the run read its corpus from (the workdir does "
                f"not keep all of it): {error}"
            ) from error
        if corpus.fingerprint["corpus"] != self.fingerprint["corpus"]:
            raise LiveError(
                "this question needs the files that the run read its corpus from, and these "
                "(data.sentences, data.facts, data.corpus) hold another corpus by now"
            )
        return corpus

    def __getattr__(self, name: str):
        # Called for attributes that this class does not define.
        if name in {f.name for f in dataclasses.fields(Corpus)} | {"answers", "text_of", "lengths"}:
            return getattr(self.files, name)
        raise AttributeError(name)

    layout = Corpus.layout

    @property
    def correct(self) -> dict[str, Sequence[np.ndarray]]:
        """The correct passage rows of each query by all labels."""
        return {"all": self.known.correct}

    @property
    def query_ids(self) -> Sequence[str]:
        """The id of each query's fact."""
        return self.known.ids

    @property
    def withdrawn(self) -> np.ndarray:
        """Withdrawn rows, which are never retrieved, int64."""
        return np.zeros(0, np.int64) if self.store is None else self.store.withdrawn

    def read_passages(self, rows) -> list[Passage]:
        """Returns id, document and text of some rows, from a store if there is one."""
        if self.store is not None:
            return self.store.passages(rows)
        return self.files.read_passages(rows)


def remember(run: Run) -> None:
    """Writes a run's config, and what most live questions need of its corpus, to its workdir."""
    facts, is_labelled = run.corpus.queries, run.corpus.has_labels
    correct = run.corpus.correct["all"] if is_labelled else [np.zeros(0, np.int64)] * len(facts)
    lengths = {"lengths": run.corpus.lengths.astype(np.int32)} if is_labelled else {}
    record = {
        "fingerprint": run.corpus.fingerprint,
        "rows": run.corpus.rows,
        "ids": [f.fact_id for f in facts],
        "prompts": [f.prompt(run.config.data.prompt) for f in facts],
        "targets": [f.entity1 for f in facts],
    }
    with atomic_file.open_atomic(run.workdir / FILE, "wb") as out:
        np.savez_compressed(
            out,
            # Text as bytes: an array of objects would need pickle.
            told=np.frombuffer(json.dumps(record).encode(), np.uint8),
            **lengths,
            # Lists of different lengths, one after the other; the empty array sets the dtype.
            correct=np.concatenate([*correct, np.zeros(0, np.int64)]),
            counts=np.asarray([len(rows) for rows in correct]),
        )
    config = run.config.to_dict()
    # A machine of another kind may open the run.
    config["model"]["dtype"] = train.computing_dtype(run.config)
    write_json(run.workdir / CONFIG, config)


def open_run(path: pathlib.Path) -> Run:
    """Opens a finished run, with its model on one device: questions come one at a time.

    Args:
        path: the workdir.

    Raises:
        LiveError: a file of the run is missing; the message names it.
    """
    # From the workdir alone: the corpus may be large or gone.
    config = _read_config(path)
    root = str(path / "model" / "checkpoints")
    provenance = _read_json(path / "stages" / "train.json")["made_from"]
    step = train.traced_step(config, provenance["steps"], checkpoint.steps(root))
    tokenizer = _tokenizer(path, config)
    mesh = sharding.make_mesh(devices=jax.local_devices()[:1])
    model = train.restore_model(_read_json(path / "model" / "config.json"), root, step, mesh)
    trained = Trained(model, root, step, optax.identity(), mesh, provenance)  # no step is taken
    workdir = Workdir(path)
    # Live questions are searched exactly: an index pays only for many queries.
    config.search.index = "none"
    corpus = RememberedCorpus(config, workdir, tokenizer)
    run = Run(config, workdir, corpus, trained, live=True)
    # Any finished store of the corpus has the passages' texts.
    path = next(filter(stores.finished, corpus_stores(run)), None)
    corpus.store = None if path is None else stores.open_store(path)
    return run


def _read_json(path: pathlib.Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise LiveError(f"{path} is missing: the run is not finished") from error


def _read_config(path: pathlib.Path) -> ConfigDict:
    """Returns a run's config; keys that are newer than the run have their defaults."""
    config, stored = get_config().to_dict(), _read_json(path / CONFIG)
    for name, value in stored.items():
        is_section = isinstance(value, dict) and isinstance(config.get(name), dict)
        config[name] = config[name] | value if is_section else value
    return ConfigDict(config)


def _tokenizer(path: pathlib.Path, config: ConfigDict):
    if not config.model.pretrained:
        return learnt_tokenizer.open_learnt(path)
    try:
        return pretrained.load_tokenizer(config.model.pretrained)
    except (ValueError, OSError) as error:
        raise LiveError(
            f"the run's tokenizer, from model.pretrained={config.model.pretrained}, cannot be "
            f"read: {error}"
        ) from error
