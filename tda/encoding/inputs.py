"""The gradients of the texts of `tda.trace`: in a store if there is a directory, else in memory.

`tda.encoding.batch_inputs` does the same for batches of the user's own arrays.
"""

import contextlib
import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Iterator

import numpy as np

from tda import store as stores
from tda.data import tokenised, tokens
from tda.data.batches import BatchLayout
from tda.data.corpora import Corpus
from tda.data.passage_source import PassageSource, can_be_read_again
from tda.data.rows import Query, parse_passages, parse_queries
from tda.data.tokens import PassageTexts, TokenTable
from tda.encoding import checks, curvature, layouts, loss_identity
from tda.encoding import provenance as provenances
from tda.encoding import table as encoding
from tda.encoding.second_stage import WholeGradients
from tda.encoding.settings import TextSettings, TraceSettings
from tda.gradients import kronecker
from tda.gradients.encoder import Encoder, build_encoder, make_encoder
from tda.gradients.kronecker import Curvature
from tda.gradients.moments import kept_scales
from tda.gradients.moments.scales import Scale
from tda.methods import Method
from tda.retrieval import bm25
from tda.retrieval.ranked import Ranked
from tda.retrieval.sources import InMemory, Source
from tda.runtime import processes, progress
from tda.runtime.directory_lock import DirectoryLock
from tda.store.making import SHARD_BYTES

# The most bytes of gradients that are kept in memory if no directory is given.
_MEMORY = 8 << 30
# Approximate tokens of a shard: the most that a kill loses, a few minutes on slow machines. Batches
# are planned within a shard, so large batches need larger shards: each length's last batch is
# padded.
_SHARD_TOKENS, _SHARD_BATCHES = 1 << 15, 16
# Batches of prompts beyond which another program is compiled, for larger ones.
_MOST_PROMPT_BATCHES = 8
# The most shards of a store, each of which is a file, unless they would exceed `SHARD_BYTES`.
_MOST_SHARDS = 1 << 16


@dataclasses.dataclass(frozen=True)
class EncodedQueries:
    """Queries with their gradients."""

    queries: list[Query]
    """In order; without texts if they are batches."""
    gradients_QxE: np.ndarray
    """float32."""
    prompts: TokenTable | None = None
    """Their tokens; None for batches."""


def in_memory(
    gradients_CxE: np.ndarray, slices: list[slice], id_of: Callable[[int], str]
) -> InMemory:
    """Returns gradients as a source; rows that are not finite are never retrieved."""
    encoding.mark_invalid(gradients_CxE, id_of)
    return InMemory(gradients_CxE, slices)


class TextCorpus:
    """Passages that are texts, tokenised when they are first needed.

    Args:
        passages: as for `tda.trace`.
        reading: how they are read.
    """

    def __init__(self, passages, reading: TextSettings):
        if isinstance(passages, str | os.PathLike):
            field = reading.text_field or "text"
            passages = Corpus(passages, text_field=field, id_field=reading.id_field)
        self._passages, self.reading = passages, reading

    @property
    def read_labels(self) -> Callable[[str], dict[str, str]] | None:
        """Reads a field of the documents (`Corpus.labels`); None if they are not a corpus."""
        return self._passages.labels if isinstance(self._passages, Corpus) else None

    @functools.cached_property
    def table(self) -> TokenTable:
        """The passages' tokens."""
        with self.holding():
            return _tokenise(self._passages, self.reading)

    @functools.cached_property
    def words(self) -> bm25.Index:
        """The index of the passages' words."""
        return bm25.Index(PassageTexts(self.table, self.reading.tokenizer))

    @contextlib.contextmanager
    def holding(self) -> Iterator[None]:
        """Locks the directory, if there is one.

        Of several calls with one directory, in any processes, one works while the others wait, and
        then find their common work finished.
        """
        directory = self.reading.directory
        if directory is None:
            yield
            return
        directory.mkdir(parents=True, exist_ok=True)
        lock = DirectoryLock(directory, f"directory={directory}")
        processes.on_first_process("hold the directory", lock.wait)
        try:
            yield
        finally:
            lock.release()


class TextInputs:
    """The gradients of texts, in the corpus's directory or in memory, computed when first needed.

    Args:
        settings: the arguments of `tda.trace`.
        corpus: the passages.

    Raises:
        ValueError: tokenizer, context, model and loss do not fit each other.
    """

    def __init__(self, settings: TraceSettings, corpus: TextCorpus):
        self.settings, self.corpus = settings, corpus
        self.read_labels = corpus.read_labels
        checks.check_reading(settings, corpus.reading)
        self._prompt_layouts: list[BatchLayout] = []

    def encode_queries(self, queries, method: Method, joiner: str | None) -> EncodedQueries:
        """Encodes queries.

        Args:
            queries: as for `tda.trace`.
            method: the method that needs them.
            joiner: the text between prompt and target; None: `tda.data.joining.choose_joiner`.

        Raises:
            ValueError: a query does not fit, the corpus does not fit the model, or the directory
                holds other gradients.
        """
        settings, reading = self.settings, self.corpus.reading
        queries = parse_queries(queries)
        checks.check_queries(method, len(queries))
        if joiner is not None and all(q.tokens is not None for q in queries):
            raise ValueError(
                f"joiner={joiner!r} has no effect: every query has token ids, which need no "
                "joining; leave it out"
            )
        prompts = tokens.tokenise_queries(queries, reading.tokenizer, reading.context, joiner)
        checks.check_token_ids(settings, prompts, "queries")
        encoder, layout = self.encoder, self._layout_of(prompts)
        gradients_QxE = encoding.encode_rows(encoder, prompts, np.arange(len(prompts)), layout)
        checks.check_query_gradients(gradients_QxE, [q.id for q in queries])
        return EncodedQueries(queries, gradients_QxE, prompts)

    def first_by_words(self, queries: EncodedQueries, k: int) -> Ranked:
        """Returns BM25's first k passages."""
        assert queries.prompts is not None  # they are texts
        texts = PassageTexts(queries.prompts, self.corpus.reading.tokenizer)
        return self.corpus.words.search(list(texts), k)

    @functools.cached_property
    def whole_gradients(self) -> WholeGradients:
        """The passages' whole gradients, for scores without projection."""
        return WholeGradients(
            self.settings, self.corpus.table, self._layout, self._scales, self._curvature
        )

    def _layout_of(self, prompts: TokenTable) -> BatchLayout:
        """Returns a layout for prompts: an earlier one if they fit, so that nothing is compiled."""
        longest = int(prompts.lengths.max()) - 1
        needed = len(prompts) * (longest + 1)
        # The layout of one prompt would take many for as many batches.
        least = min(self.settings.tokens_per_batch, needed // _MOST_PROMPT_BATCHES)
        for layout in self._prompt_layouts:
            if longest <= layout.bucket_lengths[-1] and least <= layout.tokens_per_batch:
                return layout
        layout = layouts.make_layout(self.settings, prompts, self.corpus.reading.tokenizer.pad)
        # A few prompts would leave most of a batch of the passages' size as padding.
        layout = dataclasses.replace(layout, tokens_per_batch=min(layout.tokens_per_batch, needed))
        self._prompt_layouts.append(layout)
        return layout

    @functools.cached_property
    def _layout(self) -> BatchLayout:
        pad = self.corpus.reading.tokenizer.pad
        return layouts.make_layout(self.settings, self.corpus.table, pad)

    @functools.cached_property
    def _directory(self) -> pathlib.Path | None:
        """The folder of these gradients: each correction has its own, and all share the tokens."""
        if (directory := self.corpus.reading.directory) is None:
            return None
        scales = self.settings.known_scales()
        return directory / provenances.name_correction(self.settings, scales)

    @functools.cached_property
    def _provenance(self) -> dict:
        return provenances.describe_gradients(self.settings, self._directory)

    @functools.cached_property
    def _scales(self) -> dict[str, Scale] | None:
        settings, table = self.settings, self.corpus.table
        if not settings.needs_estimate:
            return settings.known_scales()
        batches = layouts.sample_passages(settings, table, self._layout)
        if self._directory is None:
            return settings.estimate_scales(batches)
        provenance = self._provenance | {
            "correction": settings.moments.correction,
            "sample": settings.moments.sample,
            "seed": settings.moments.seed,
            "tokens_per_batch": settings.tokens_per_batch,
            "corpus": table.fingerprint(),
        }
        with self.corpus.holding():
            file = self._directory / "scales.safetensors"
            scales = kept_scales.load(file, provenance)
            if scales is None:
                scales = settings.estimate_scales(batches)
                file.parent.mkdir(parents=True, exist_ok=True)
                kept_scales.save(file, scales, provenance)
        return scales

    @functools.cached_property
    def _curvature(self) -> dict[str, Curvature] | None:
        """EK-FAC's factors by path, from a sample of the passages; None for other gradients."""
        settings, table = self.settings, self.corpus.table
        if settings.curvature == "none":
            return None
        if self._directory is None:
            return curvature.fit(settings, table, self._layout)
        provenance, holding = self._provenance, self.corpus.holding
        return curvature.load_or_fit(
            settings, table, self._layout, self._directory, provenance, holding
        )

    @functools.cached_property
    def encoder(self) -> Encoder:
        """The encoder of queries and passages."""
        settings, directory = self.settings, self._directory
        settings.print_coverage()
        checks.check_token_ids(settings, self.corpus.table, "passages")
        if directory is not None and (directory / "gradients" / "manifest.json").exists():
            # Refuses another model's store before second moments are estimated again.
            stores.open_store(directory / "gradients", self._provenance)
        if self._curvature is not None:
            projection = settings.projection
            by_site = kronecker.ekfac_taps(settings.sites(), projection, self._curvature)
            return build_encoder(
                settings.model, [(projection, by_site)], settings.loss, settings.mesh
            )
        return make_encoder(
            settings.model,
            settings.projection,
            self._scales,
            settings.loss,
            **settings.scope,
            mesh=settings.mesh,
            tell=False,
        )

    @functools.cached_property
    def source(self) -> Source:
        """The passages' gradients."""
        encoder, table = self.encoder, self.corpus.table
        if self._directory is None:
            return _encode_in_memory(encoder, table, self._layout)
        with self.corpus.holding():
            return self._fill_store(encoder, table, self._directory)

    def _fill_store(
        self, encoder: Encoder, table: TokenTable, directory: pathlib.Path
    ) -> stores.GradientStore:
        settings, tokenizer = self.settings, self.corpus.reading.tokenizer
        provenance = self._provenance | provenances.describe_correction(settings, self._scales)
        store = stores.create(
            directory / "gradients",
            table.ids,
            dict.fromkeys(encoder.layout.blocks, settings.projection.side**2),
            provenance | {"tokenizer": tokenizer.fingerprint()},
            shard_bytes=_shard_bytes(table, encoder.layout.width, settings.tokens_per_batch),
            documents=table.documents,
            texts=PassageTexts(table, tokenizer),
            corpus=table.fingerprint(),
        )
        if len(store.missing()) == len(store.shards()):
            _check_longest_passage(encoder, table, self._layout)
        loss_identity.save(provenance["loss"], directory)
        encoding.fill_stores([store], encoder, table, self._layout, "encode passages")
        return store

    def passage_of(self, row: int) -> tuple[str, str]:
        """Returns the id and the text of a row's passage."""
        if isinstance(self.source, stores.GradientStore):
            (passage,) = self.source.passages([row])
            return passage.id, passage.text
        table = self.corpus.table
        return table.ids[row], PassageTexts(table, self.corpus.reading.tokenizer)[row]


def _check_longest_passage(encoder: Encoder, table: TokenTable, layout: BatchLayout) -> None:
    """Checks the gradient of the longest passage before the others are encoded."""
    _check_finite_passages(
        table, lambda row: encoding.encode_rows(encoder, table, np.array([row]), layout)
    )


def _check_finite_passages(table: TokenTable, encode: Callable[[int], np.ndarray]) -> None:
    """Checks that the longest passage has a finite gradient.

    A look-up beyond a table of positions gives NaN, and such passages would never be retrieved.

    Args:
        table: the passages.
        encode: returns the gradient of a row.

    Raises:
        ValueError: it has not, and the shortest one has.
    """
    longest, shortest = table.longest, table.shortest
    for row in (longest, shortest):
        if np.isfinite(encode(row)).all():
            break
    if row != longest:
        positions = [len(table.sequence(row)[0]) - 1 for row in (longest, shortest)]
        raise ValueError(
            f"the gradient of a passage of {positions[0]} positions is not finite, and that of one "
            f"of {positions[1]} is; if the model has a table of positions, give its length as "
            "context="
        )


def _shard_bytes(table: TokenTable, width: int, tokens_per_batch: int) -> int:
    tokens = max(
        _SHARD_TOKENS, _SHARD_BATCHES * tokens_per_batch, table.token_count // _MOST_SHARDS
    )
    rows = max(1, int(tokens / max(1.0, table.token_count / len(table))))
    return min(SHARD_BYTES, rows * 4 * width)


def _tokenise(passages, reading: TextSettings) -> TokenTable:
    """Tokenises the corpus, on disk if it can be read again and there is a directory."""
    fields = reading.text_field, reading.id_field
    is_corpus, directory = isinstance(passages, Corpus), reading.directory
    arguments = reading.tokenizer, reading.context
    if directory is not None and (is_corpus or can_be_read_again(passages)):
        source = passages if is_corpus else PassageSource(passages, *fields)
        table, counts = tokenised.tokenise_on_disk(directory / "tokens", source, *arguments)
    else:
        documents = passages if is_corpus else parse_passages(passages, *fields)
        table, counts = tokenised.tokenise_in_memory(documents, *arguments)
    progress.tell(
        f"{counts.documents:,} documents ({counts.blank:,} of them blank and left out), "
        f"{len(table):,} passages, {table.count_scored():,} tokens"
    )
    return table


def _encode_in_memory(encoder: Encoder, table: TokenTable, layout: BatchLayout) -> InMemory:
    needed = 4 * len(table) * encoder.layout.width
    if needed > _MEMORY:
        raise ValueError(
            f"the gradients of {len(table):,} passages take {needed / 2**30:.0f} GiB; give a "
            "directory to keep them in, or a smaller projection.side"
        )
    is_small = layouts.is_small(table)
    if not is_small:
        _check_longest_passage(encoder, table, layout)
    total = table.count_scored()
    with progress.bar(total, "encode passages", "token") as bar:
        rows = np.arange(len(table))
        gradients_CxE = encoding.encode_rows(encoder, table, rows, layout, bar.update)
    if is_small:
        # Afterwards: a batch of one passage would take a good part of the time of all of these.
        _check_finite_passages(table, lambda row: gradients_CxE[row])
    return in_memory(gradients_CxE, encoder.layout.slices, table.ids.__getitem__)
