"""A run: its corpus and its trained model."""

import dataclasses

import jax
import numpy as np
import optax
from flax import nnx

from tda.data import tokens
from tda.data.batches import BatchLayout
from tda.data.pretrained_tokenizer import PretrainedTokenizer
from tda.data.tokenizer import Tokenizer
from tda.facts.records import Fact, Sentence


@dataclasses.dataclass(frozen=True)
class Trained:
    """A trained model.

    Attributes:
        model: with the checkpoint's parameters.
        root: the directory of its checkpoints.
        step: the checkpoint.
        tx: the optimizer that trained it.
        mesh: the devices it is on: of several processes each has a whole copy where it fits.
        fingerprint: tells this checkpoint from others.
    """

    model: nnx.Module
    root: str
    step: int
    tx: optax.GradientTransformation
    mesh: jax.sharding.Mesh
    fingerprint: dict


@dataclasses.dataclass(frozen=True)
class Corpus:
    """What a run is about.

    Attributes:
        sentences: the corpus's documents.
        queries: the facts that are asked.
        tokenizer: trained on the training text, or the pretrained model's.
        passages: tokenised documents, long ones split.
        training: what the model is trained on: the passages, or more than them.
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

    def text_of(self, row: int, table: tokens.TokenTable | None = None) -> str:
        """The text of a passage, or of a row of another table."""
        table = self.passages if table is None else table
        begin, end = table.starts[row], table.starts[row + 1]
        return self.tokenizer.decode(table.tokens[begin:end]).strip()

    def layout(self, tokens_per_batch: int, mesh: jax.sharding.Mesh | None = None) -> BatchLayout:
        """Returns how sequences of the corpus and its queries are batched."""
        return BatchLayout(self.buckets, tokens_per_batch, self.tokenizer.pad, mesh)

    def answers(self, query: int) -> list[str]:
        """What counts as the query's target: the target itself first, and its aliases."""
        fact = self.queries[query]
        return [fact.entity1, *(a for a in fact.entity1_alias if a.strip())]
