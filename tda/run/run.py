"""A run: config, directory, corpus and trained model, and what follows from these."""

import dataclasses
import functools
import pathlib

import jax
import numpy as np
import optax
from flax import nnx
from ml_collections import ConfigDict

from tda.data import tokens
from tda.data.batches import BatchLayout
from tda.data.joining import join
from tda.data.pretrained_tokenizer import PretrainedTokenizer
from tda.data.tokenizer import Tokenizer
from tda.facts.records import Fact, Sentence
from tda.gradients import kronecker
from tda.gradients import projection as projections
from tda.gradients.projection import Projection
from tda.gradients.sites import Site, find_sites
from tda.methods import GradientKind
from tda.model import functional
from tda.retrieval.whitening import HessianSettings
from tda.run.workdir import Workdir
from tda.runtime import sharding
from tda.runtime.fingerprint import fingerprint, plain
from tda.store import Passage
from tda.training import checkpoint

# The `store.dtype` of a run that encodes its corpus as it is searched.
NO_STORE = "none"
# The correction that a store of Adam's steps is named by.
ADAM_STEP = "adam_step"
# EK-FAC's Fisher matrix takes labels drawn from the model, LoGra the data's own.
CURVATURE_LABELS = {"ekfac": "sampled", "logra": "data"}


@dataclasses.dataclass(frozen=True)
class Trained:
    """A trained model.

    Attributes:
        model: with the checkpoint's parameters.
        root: the directory of its checkpoints.
        step: the checkpoint.
        tx: the optimizer that trained it.
        mesh: the devices it is on: of several processes each has a whole copy where it fits.
        fingerprint: JSON values that tell this training from others.
    """

    model: nnx.Module
    root: str
    step: int
    tx: optax.GradientTransformation
    mesh: jax.sharding.Mesh
    fingerprint: dict


@dataclasses.dataclass(frozen=True)
class Corpus:
    """The passages that a run traces to, and the queries that it traces.

    Attributes:
        sentences: the corpus's documents.
        queries: the facts that are asked.
        tokenizer: trained on the training text, or the pretrained model's.
        passages: tokenised documents, long ones split.
        training: the text that the model is trained on: the passages, or more than them.
        prompts: tokenised queries.
        correct: for "all" and "strict" labels, the correct passage rows of each query.
        buckets: lengths that batches are padded to.
        fingerprint: JSON values that tell this corpus and these queries from others.
    """

    sentences: list[Sentence]
    queries: list[Fact]
    tokenizer: Tokenizer | PretrainedTokenizer
    passages: tokens.TokenTable
    training: tokens.TokenTable
    prompts: tokens.TokenTable
    correct: dict[str, list[np.ndarray]]
    buckets: tuple[int, ...]
    fingerprint: dict

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each passage that carry a loss, int64 [C]."""
        before = np.concatenate([[0], np.cumsum(self.passages.scored)])
        return np.diff(before[self.passages.starts])

    def text_of(self, row: int, table: tokens.TokenTable | None = None) -> str:
        """The text of a passage, or of a row of another table."""
        table = self.passages if table is None else table
        return tokens.PassageTexts(table, self.tokenizer)[row]

    def layout(self, tokens_per_batch: int, mesh: jax.sharding.Mesh | None = None) -> BatchLayout:
        """Returns how sequences of the corpus and its queries are batched."""
        return BatchLayout(self.buckets, tokens_per_batch, self.tokenizer.pad, mesh)

    @property
    def rows(self) -> int:
        """C, the number of passages."""
        return len(self.passages)

    @property
    def query_ids(self) -> list[str]:
        """The id of each query's fact."""
        return [f.fact_id for f in self.queries]

    def read_passages(self, rows) -> list[Passage]:
        """Id, document and text of some rows."""
        table = self.passages
        return [Passage(table.ids[i], table.documents[i], self.text_of(i)) for i in rows]

    def answers(self, query: int) -> list[str]:
        """The texts that count as the query's target: the target itself first, and its aliases."""
        fact = self.queries[query]
        return [fact.entity1, *(a for a in fact.entity1_alias if a.strip())]


@dataclasses.dataclass(frozen=True)
class Run:
    """What every stage after the training works on.

    Gradients are named by their kind; the stores of a kind are those of the "corpus" and of the
    "queries". Where a method takes a `step`, it is a checkpoint; the traced one where None.
    """

    config: ConfigDict
    """Settings; see `configs/defaults.py`."""

    workdir: Workdir
    """The directory of everything that the run keeps."""

    corpus: Corpus
    """Passages and queries."""

    trained: Trained
    """The model at the traced checkpoint."""

    live: bool = False
    """Whether the run is finished and held open for questions: none of its stores is written."""

    def at_step(self, step: int) -> "Run":
        """The run with the model of another checkpoint of the same training.

        The parameters are restored; an optimizer's state is read where it is needed.
        """
        trained = self.trained
        if step == trained.step:
            return self
        model_fn, params = functional.split(trained.model)
        abstract = functional.abstract(params, model_fn.axes, trained.mesh)
        params = checkpoint.restore_parameters(trained.root, abstract, step)
        then = dataclasses.replace(trained, model=model_fn.merge(params), step=step)
        return dataclasses.replace(self, trained=then)

    @property
    def total_steps(self) -> int:
        """Steps of the training, of which the traced checkpoint may end a part; 0 without one."""
        return self.trained.fingerprint["steps"]

    @property
    def checkpoint(self) -> dict:
        """The traced checkpoint as JSON values."""
        return {"checkpoint": plain(self.trained.fingerprint), "step": self.trained.step}

    @property
    def layout(self) -> BatchLayout:
        """How sequences are cut into batches for the trained model, on its mesh."""
        return self.corpus.layout(self.config.gradients.tokens_per_batch, self.trained.mesh)

    @property
    def unsharded_layout(self) -> BatchLayout:
        """The same for work that does not split a batch over devices."""
        return self.corpus.layout(self.config.gradients.tokens_per_batch)

    @property
    def search_mesh(self) -> jax.sharding.Mesh | None:
        """The devices that this process searches on; None where it is one."""
        mesh = self.trained.mesh
        if not sharding.is_local(mesh):
            mesh = sharding.make_mesh(devices=jax.local_devices())
        return mesh if sharding.batch_devices(mesh) > 1 else None

    @property
    def hessian(self) -> HessianSettings:
        """How R is made."""
        return HessianSettings(**dict(self.config.hessian))

    @property
    def query_texts(self) -> list[str]:
        """The text of each query: prompt and target."""
        prompt = self.config.data.prompt
        return [join(f.prompt(prompt), f.entity1) for f in self.corpus.queries]

    def table(self, name: str) -> tokens.TokenTable:
        """The sequences of the "corpus" or of the "queries"."""
        return {"corpus": self.corpus.passages, "queries": self.corpus.prompts}[name]

    def projection(self, kind: GradientKind) -> Projection:
        """P of a kind of gradients."""
        projection = Projection(**dict(self.config.projection))
        # Components of different matrices have nothing in common that could be added up.
        if kind.curvature == "logra":
            projection = dataclasses.replace(projection, pooling="matrix")
        return projection

    def sites(self, kind: GradientKind) -> list[Site]:
        """The parameters whose gradients are taken."""
        g = self.config.gradients
        chosen = find_sites(self.trained.model, g.include or None, g.exclude or None, g.untapped)
        return chosen if kind.curvature == "none" else kronecker.factored(chosen)

    def blocks(self, kind: GradientKind) -> tuple[str, ...]:
        """The names of an encoding's blocks, in order."""
        return projections.layout(self.sites(kind), self.projection(kind)).blocks

    def second_moments(self, step: int | None = None) -> str | dict:
        """The batches that second moments are estimated from, or "optimizer" where they are read.

        Raises:
            ValueError: `gradients.second_moments` is unknown.
        """
        g = self.config.gradients
        if g.second_moments not in ("auto", "optimizer", "estimate"):
            raise ValueError(
                f"unknown gradients.second_moments={g.second_moments!r}; "
                "use auto, optimizer or estimate"
            )
        step = self.trained.step if step is None else step
        has_state = checkpoint.has_optimizer(self.trained.root, step)
        if g.second_moments == "optimizer" or (g.second_moments == "auto" and has_state):
            return "optimizer"
        return {
            "estimated from batches": g.estimate_batches,
            "of tokens": self.config.train.tokens_per_batch,
            "text": self.corpus.fingerprint["training"],
            "seed": self.config.seed,
        }

    def curvature_provenance(self, curvature: str) -> dict:
        """What decides the Kronecker factors of a checkpoint, as JSON values."""
        c = self.config.curvature
        provenance = {
            "kind": curvature,
            "labels": CURVATURE_LABELS[curvature],
            "passages": c.sample,
            "seed": c.seed,
            "corpus": self.corpus.fingerprint["corpus"],
        }
        return provenance | ({"damping": c.damping} if curvature == "ekfac" else {})

    def provenance(self, kind: GradientKind, step: int | None = None) -> dict:
        """What decides the gradients of a kind, apart from the rows, as JSON values."""
        g = self.config.gradients
        correction = g.correction if kind.corrected else "none"
        provenance = {
            "checkpoint": fingerprint(self.trained.fingerprint),
            "step": self.trained.step if step is None else step,
            "projection": dataclasses.asdict(self.projection(kind)),
            "correction": ADAM_STEP if kind.adam_step else correction,
            "output": kind.output or g.output,
            "include": g.include,
            "exclude": g.exclude,
            "untapped": g.untapped,
            "parameters": {s.path: list(s.shape) for s in self.sites(kind)},
            "tokenizer": self.corpus.fingerprint["tokenizer"],
        }
        if kind.corrected:
            provenance["second_moments"] = self.second_moments(step)
        if kind.curvature != "none":
            provenance["curvature"] = self.curvature_provenance(kind.curvature)
        return plain(provenance)

    def store_path(self, name: str, kind: GradientKind, step: int | None = None) -> pathlib.Path:
        """The directory of the store of the "corpus" or of the "queries"."""
        provenance = self.provenance(kind, step)
        label = kind.curvature if kind.curvature != "none" else provenance["correction"]
        rows = {name: self.corpus.fingerprint[name], "dtype": self.config.store.dtype}
        return self.workdir / "stores" / f"{name}-{label}-{fingerprint(provenance | rows)}"
