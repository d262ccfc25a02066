"""A run: config, directory, corpus and trained model, and values derived from them."""

import dataclasses
import functools
import shutil
import sys

import jax
import numpy as np
import optax
from flax import nnx
from ml_collections import ConfigDict

from tda.data import tokens
from tda.data.batches import BatchLayout, draw
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
from tda.retrieval.hessian_settings import HessianSettings
from tda.run.workdir import Workdir
from tda.runtime import sharding
from tda.runtime.engine import PROCESSES, Engine
from tda.runtime.fingerprint import fingerprint, plain
from tda.runtime.groups import Groups
from tda.store import Form, Passage
from tda.training import checkpoint

# `store.dtype` of a run without a store: the corpus is encoded while it is searched.
NO_STORE = "none"
# Shards whose rows R and searches take as a group: 4 GiB with shards of the default size.
_GROUP_SHARDS = 16
# The name of the correction in a store of Adam's steps.
ADAM_STEP = "adam_step"
# EK-FAC's Fisher matrix takes labels drawn from the model, LoGra and R of whole gradients the
# data's own.
CURVATURE_LABELS = {"ekfac": "sampled", "logra": "data", "whole": "data"}


def projection_of(config) -> Projection:
    """Returns a config's projection, without a number of blocks where its pooling has none.

    A config file may set more keys than its run needs (`tda.run.idle_keys`): in Python such a
    number is a mistake and refused.

    Raises:
        ValueError: a value is not possible.
    """
    settings = dict(config.projection)
    if settings["pooling"] != "blocks":
        settings["blocks"] = projections.DEFAULT_BLOCKS
    return Projection(**settings)


def memory_bytes(config) -> int:
    """Returns `search.memory_gib`, which may be infinite, in bytes."""
    return int(min(config.search.memory_gib * 2**30, sys.maxsize))


def stored_as(config) -> str:
    """Names how a run's rows are stored, such as "int8" or "2bit, rank 8".

    Raises:
        ValueError: the blocks cannot be stored as pairs of vectors.
    """
    dtype, rank = config.store.dtype, config.store.rank
    if not rank or dtype == NO_STORE:
        return dtype
    if config.projection.pooling != "matrix":
        raise ValueError(
            f"store.rank={rank} stores each matrix's block as {rank} pairs of vectors; a sum of "
            "several matrices' blocks needs many more. Use projection.pooling=matrix, or "
            "store.rank=0"
        )
    Form(dtype, (config.projection.side**2,), rank)
    return f"{dtype}, rank {rank}"


@dataclasses.dataclass(frozen=True)
class Trained:
    """A trained model at one checkpoint."""

    model: nnx.Module
    root: str  # the directory of its checkpoints
    step: int  # the checkpoint
    tx: optax.GradientTransformation  # the optimizer that trained it
    mesh: jax.sharding.Mesh  # the model's devices: of each process, if a whole copy fits there
    fingerprint: dict  # JSON values that identify the training
    batches: tuple[BatchLayout, int] | None = None  # layout and seed of its batches; None: the
    # config's
    steps: tuple[int, ...] | None = None  # checkpoints that a method may sum over, rising; None:
    # those on disk


@dataclasses.dataclass(frozen=True)
class Corpus:
    """The passages that a run traces to, and the queries that it traces."""

    sentences: list[Sentence]  # the corpus's documents; empty without labels
    queries: list[Fact]
    tokenizer: Tokenizer | PretrainedTokenizer  # learnt from the training text, or the model's own
    passages: tokens.TokenTable  # tokenised documents, long ones split
    training: tokens.TokenTable  # the text that the model is trained on: the passages, or more
    prompts: tokens.TokenTable  # tokenised queries
    correct: dict[str, list[np.ndarray]]  # by "all" and "strict" labels, each query's correct rows;
    # empty without labels
    buckets: tuple[int, ...]  # lengths that batches are padded to
    fingerprint: dict  # JSON values that identify corpus and queries

    @property
    def has_labels(self) -> bool:
        """Whether it is known which passages are correct for a query."""
        return bool(self.correct)

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """The number of scored tokens of each passage, int64 [C]."""
        return self.passages.scored_lengths

    def text_of(self, row: int, table: tokens.TokenTable | None = None) -> str:
        """Returns the text of a passage, or of a row of another table."""
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
        """Returns id, document and text of some rows."""
        table = self.passages
        return [Passage(table.ids[i], table.documents[i], self.text_of(i)) for i in rows]

    def answers(self, query: int) -> list[str]:
        """Returns the texts that count as the query's target: the target first, then aliases."""
        fact = self.queries[query]
        return [fact.entity1, *(a for a in fact.entity1_alias if a.strip())]


@dataclasses.dataclass(frozen=True)
class Run:
    """The input of every stage after the training.

    Each kind of gradients has a store of the "corpus" and one of the "queries". A `step` is a
    checkpoint; None stands for the traced one.
    """

    config: ConfigDict  # see `configs/defaults.py`
    workdir: Workdir  # the directory of everything that the run keeps
    corpus: Corpus
    trained: Trained  # the model at the traced checkpoint
    live: bool = False  # finished, and held open for questions: no store is written
    engine: Engine = PROCESSES  # who computes which group of a stage's work
    groups_folder: str = "groups"  # in the workdir; of its own for each run that shares one

    def at_step(self, step: int) -> "Run":
        """Returns the run with the model of another checkpoint of the same training."""
        trained = self.trained
        if step == trained.step:
            return self
        model_fn, params = functional.split(trained.model)
        abstract = functional.abstract(params, model_fn.axes, trained.mesh)
        params = checkpoint.restore_parameters(trained.root, abstract, step)
        trained = dataclasses.replace(trained, model=model_fn.merge(params), step=step)
        return dataclasses.replace(self, trained=trained)

    @property
    def total_steps(self) -> int:
        """Steps of the whole training, beyond the traced checkpoint too; 0 without a training."""
        return self.trained.fingerprint["steps"]

    @property
    def checkpoint(self) -> dict:
        """The traced checkpoint as JSON values."""
        return {"checkpoint": plain(self.trained.fingerprint), "step": self.trained.step}

    @property
    def layout(self) -> BatchLayout:
        """The layout of batches for the trained model, on its mesh."""
        return self.corpus.layout(self.config.gradients.tokens_per_batch, self.trained.mesh)

    @property
    def unsharded_layout(self) -> BatchLayout:
        """The layout of batches that are not split over devices."""
        return self.corpus.layout(self.config.gradients.tokens_per_batch)

    @property
    def search_mesh(self) -> jax.sharding.Mesh | None:
        """The devices that this process searches on; None for one device."""
        mesh = self.trained.mesh
        # Process 0 searches alone, whichever devices the model is on.
        if not sharding.is_local(mesh):
            mesh = sharding.make_mesh(devices=jax.local_devices())
        return mesh if sharding.batch_devices(mesh) > 1 else None

    @property
    def groups(self) -> Groups:
        """The groups of rows that R and searches are computed in; files of an unfinished search."""
        group_bytes = _GROUP_SHARDS * self.config.store.shard_bytes
        return Groups(self.workdir / self.groups_folder, group_bytes, self.engine)

    def remove_groups(self) -> None:
        """Removes the files of groups, which only unfinished rankings need."""
        shutil.rmtree(self.workdir / self.groups_folder, ignore_errors=True)

    @property
    def hessian(self) -> HessianSettings:
        """The settings of R."""
        return HessianSettings(**dict(self.config.hessian))

    @property
    def query_texts(self) -> list[str]:
        """The text of each query: prompt and target."""
        data = self.config.data
        return [join(f.prompt(data.prompt), f.entity1, data.joiner) for f in self.corpus.queries]

    def table(self, name: str) -> tokens.TokenTable:
        """Returns the sequences of the "corpus" or of the "queries"."""
        return {"corpus": self.corpus.passages, "queries": self.corpus.prompts}[name]

    def projection(self, kind: GradientKind) -> Projection:
        """Returns the projection of a kind of gradients."""
        projection = projection_of(self.config)
        # Principal components of different matrices have no common axes to be added up along.
        if kind.curvature == "logra":
            projection = dataclasses.replace(projection, pooling="matrix")
        return projection

    def sites(self, kind: GradientKind) -> list[Site]:
        """Returns the parameters whose gradients are taken."""
        g = self.config.gradients
        chosen = find_sites(self.trained.model, g.include or None, g.exclude or None, g.untapped)
        return chosen if kind.curvature == "none" else kronecker.factored(chosen)

    def blocks(self, kind: GradientKind) -> tuple[str, ...]:
        """Returns the names of an encoding's blocks, in order."""
        return projections.layout(self.sites(kind), self.projection(kind)).blocks

    def block_shapes(self, kind: GradientKind) -> tuple[tuple[int, ...], ...]:
        """Returns the shapes of an encoding's blocks, in order (`Layout.shapes`)."""
        return projections.layout(self.sites(kind), self.projection(kind)).shapes

    def second_moments(self, step: int | None = None) -> str | dict:
        """Returns "optimizer", or a description of the batches that V is estimated from."""
        g = self.config.gradients
        step = self.trained.step if step is None else step
        # A pretrained model's checkpoint has parameters only.
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
        """Returns what decides the Kronecker factors of a checkpoint, as JSON values."""
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
        """Returns what decides the gradients of a kind, apart from the rows, as JSON values."""
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

    @property
    def store_root(self) -> str:
        """The directory of the run's stores, local or in object storage."""
        return self.config.store.root or str(self.workdir / "stores")

    @property
    def evaluated(self) -> np.ndarray:
        """The queries that figures are over, int64 [N], ascending."""
        config = self.config
        return draw(len(self.corpus.queries), config.eval.queries, config.data.seed)

    def store_path(self, name: str, kind: GradientKind, step: int | None = None) -> str:
        """Returns the directory of the store of the "corpus" or of the "queries"."""
        provenance = self.provenance(kind, step)
        label = kind.curvature if kind.curvature != "none" else provenance["correction"]
        rows = {name: self.corpus.fingerprint[name], "dtype": stored_as(self.config)}
        return f"{self.store_root}/{name}-{label}-{fingerprint(provenance | rows)}"
