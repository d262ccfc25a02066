"""The gradients of a user's own batches of arrays, which have no tokens and stay in memory."""

import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from tda.data.rows import Query
from tda.encoding import checks
from tda.encoding.inputs import EncodedQueries, in_memory
from tda.encoding.settings import TraceSettings
from tda.gradients import argument_checks
from tda.gradients.encoder import Encoder, make_encoder
from tda.gradients.examples import encode_each
from tda.gradients.unseen import count_examples
from tda.methods import Method
from tda.retrieval.sources import Source
from tda.runtime import progress


class BatchCorpus:
    """Passages that are batches of arrays.

    Args:
        passages: an iterable of batches, trees of arrays with the examples first.
        texts: the passages' texts, to show; None if there are none.

    Raises:
        ValueError: there are no batches.
    """

    def __init__(self, passages, texts: Sequence[str] | None):
        argument_checks.check_batches("passages", passages)
        if isinstance(texts, str):
            raise ValueError("texts is a single string; give a list of the passages' texts")
        self.texts = texts
        # A list is checked as a whole. Other iterables may read from disk: their first batch is
        # checked now, and each of the others when it is read.
        self.is_list = isinstance(passages, list | tuple)
        if self.is_list:
            self.first = passages
        elif isinstance(passages, Sequence):
            self.first = [passages[0]] if len(passages) else []
        else:
            passages = iter(passages)
            self.first = list(itertools.islice(passages, 1))
            passages = itertools.chain(self.first, passages)
        if not self.first:
            raise ValueError("there are no passages: the iterable of batches is empty")
        self._batches = passages

    def read(self) -> Iterable:
        """Returns all batches.

        Raises:
            ValueError: they came from an iterator that was read before.
        """
        batches = self._batches
        if batches is None:
            raise ValueError(
                "the passages are an iterator of batches that was read already, for other "
                "gradients; give a list of batches, or all methods at once"
            )
        if not isinstance(batches, Sequence):
            self._batches = None
        return batches

    def sample(self, count: int, seed: int) -> list:
        """Returns batches to estimate second moments from."""
        if isinstance(self._batches, Sequence):
            rng = np.random.default_rng(seed)
            total = len(self._batches)
            drawn = np.sort(rng.choice(total, min(count, total), replace=False))
            return [self._batches[i] for i in drawn]
        # An iterator can be read once only: its first batches are the sample.
        batches = iter(self.read())
        first = list(itertools.islice(batches, count))
        self._batches = itertools.chain(first, batches)
        return first


class BatchInputs:
    """The gradients of batches of arrays, in memory, each computed when it is first needed.

    Args:
        settings: the arguments of `tda.trace`.
        corpus: the passages.

    Raises:
        ValueError: a batch is not a tree of arrays, or does not fit the loss.
    """

    def __init__(self, settings: TraceSettings, corpus: BatchCorpus):
        self.settings, self.corpus = settings, corpus
        self.read_labels = None  # arrays have no fields
        for _ in _checked(corpus.first, settings, "passages"):
            pass

    def encode_queries(self, queries, method: Method, joiner: str | None) -> EncodedQueries:
        """Encodes batches of queries; `joiner` is for texts."""
        argument_checks.check_batches("queries", queries)
        queries = list(queries)
        if not queries:
            raise ValueError("there are no queries: the iterable of batches is empty")
        for _ in _checked(queries, self.settings, "queries"):
            pass
        checks.check_queries(method, sum(map(count_examples, queries)))
        gradients_QxE = self._encode(queries, "encode queries")
        names = list(map(str, range(len(gradients_QxE))))
        checks.check_query_gradients(gradients_QxE, names)
        return EncodedQueries([Query(name, "", "") for name in names], gradients_QxE)

    @functools.cached_property
    def encoder(self) -> Encoder:
        """The encoder of the batches."""
        settings = self.settings
        settings.print_coverage()
        scales = settings.known_scales()
        if settings.needs_estimate:
            sample = self.corpus.sample(settings.moments.sample, settings.moments.seed)
            scales = settings.estimate_scales(_checked(sample, settings, "the sample of passages"))
        return make_encoder(
            settings.model,
            settings.projection,
            scales,
            settings.example_losses,
            **settings.scope,
            tell=False,
        )

    @functools.cached_property
    def source(self) -> Source:
        """The passages' gradients."""
        encoder, batches = self.encoder, self.corpus.read()
        if not self.corpus.is_list:
            batches = _checked(batches, self.settings, "passages")
        gradients_CxE = self._encode(batches, "encode passages")
        texts = self.corpus.texts
        if texts is not None and len(texts) != len(gradients_CxE):
            raise ValueError(
                f"there are {len(texts)} texts and {len(gradients_CxE)} passages; give a text for "
                "each passage"
            )
        return in_memory(gradients_CxE, encoder.layout.slices, str)

    def passage_of(self, row: int) -> tuple[str, str]:
        """Returns the id and the text of a row's passage."""
        texts = self.corpus.texts
        return str(row), "" if texts is None else texts[row]

    def _encode(self, batches, description: str) -> np.ndarray:
        encoder, encoded = self.encoder, []
        with progress.bar(None, description, "example") as bar:
            for x_BxE in encode_each(encoder, batches):
                encoded.append(x_BxE)
                bar.update(len(x_BxE))
        return np.concatenate(encoded)


def _checked(batches: Iterable, settings: TraceSettings, label: str) -> Iterator:
    """Yields batches after checking them."""
    check = checks.BatchChecks(settings, label)
    for batch in batches:
        check(batch)
        yield batch
