"""The gradients of what `tda.trace` is given: texts with a tokenizer, or batches of arrays.

Texts take the path of the package docstring: documents, a token table, batches, the encoder, and
a store (with a directory) or memory (without). Batches of the user's own arrays have no tokens and
stay in memory.
"""

import dataclasses
import itertools
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from tda import store as stores
from tda.data import tokenised, tokens
from tda.data.batches import BatchLayout
from tda.data.corpora import Corpus
from tda.data.rows import Query, parse_passages, parse_queries
from tda.data.tokens import PassageTexts, TokenTable
from tda.encoding import checks, layouts, loss_identity
from tda.encoding import provenance as provenances
from tda.encoding import table as encoding
from tda.encoding.settings import TextSettings, TraceSettings
from tda.gradients import per_example
from tda.gradients import projection as projections
from tda.gradients.encoder import Encoder, make_encoder
from tda.gradients.moments import kept_scales
from tda.gradients.moments.second_moments import Scale
from tda.gradients.unseen import count_examples
from tda.retrieval.sources import InMemory, Source
from tda.runtime import processes, progress
from tda.runtime.directory_lock import DirectoryLock
from tda.store.making import SHARD_BYTES

# Bytes of gradients that are held in memory if no directory is given.
_MEMORY = 8 << 30
# Tokens of a shard, about: what a kill loses at most, a few minutes on slow machines.
_SHARD_TOKENS = 1 << 15
# Shards of a store at most, as long as they are no larger than `SHARD_BYTES`: each is a file.
_MOST_SHARDS = 1 << 16


@dataclasses.dataclass(frozen=True)
class TraceGradients:
    """Gradients of passages and queries, with their texts."""

    source: Source
    """The passages' gradients."""
    gradients_QxE: np.ndarray
    """The queries' gradients, float32."""
    passage_of: Callable[[int], tuple[str, str]]
    """Maps a row to the id and the text of its passage."""
    queries: list[Query]
    """The queries, in order; without texts if they are batches."""


def encode_batches(settings: TraceSettings, passages, queries, texts) -> TraceGradients:
    """Encodes batches of arrays in memory.

    Args:
        settings: the arguments of `tda.trace`.
        passages, queries: iterables of batches, trees of arrays with the examples first.
        texts: the passages' texts, to show; None if there are none.

    Raises:
        ValueError: there are no batches, or another number of texts than passages.
    """
    for label, batches in (("passages", passages), ("queries", queries)):
        checks.check_batches(label, batches)
    if isinstance(texts, str):
        raise ValueError("texts is a single string; give a list of the passages' texts")
    queries = list(queries)
    # A list is looked at as a whole; of others, which may be read from disk as they are asked for,
    # the first batch now, and each when it comes.
    if isinstance(passages, list | tuple):
        first = passages
    elif isinstance(passages, Sequence):
        first = [passages[0]] if len(passages) else []
    else:
        passages = iter(passages)
        first = list(itertools.islice(passages, 1))
        passages = itertools.chain(first, passages)
    for label, batches in (("passages", first), ("queries", queries)):
        if not batches:
            raise ValueError(f"there are no {label}: the iterable of batches is empty")
        for _ in _checked(batches, settings, label):
            pass
    checks.check_queries(settings, sum(map(count_examples, queries)))
    settings.print_coverage()
    sample, passages = _sample_batches(passages, settings)
    scales = settings.known_scales()
    if settings.needs_estimate:
        sample = _checked(sample, settings, "the sample of passages")
        scales = settings.estimate_scales(sample)

    def encode(batches, description):
        encoded = []
        with progress.bar(None, description, "example", quiet=settings.quiet) as bar:
            for x_BxE in per_example(
                settings.model,
                settings.example_losses,
                batches,
                settings.projection,
                scales,
                **settings.scope,
                tell=False,
            ):
                encoded.append(x_BxE)
                bar.update(len(x_BxE))
        return np.concatenate(encoded)

    gradients_QxE = encode(queries, "encode queries")
    checks.check_query_gradients(gradients_QxE, list(map(str, range(len(gradients_QxE)))))
    if passages is not first:
        passages = _checked(passages, settings, "passages")
    gradients_CxE = encode(passages, "encode passages")
    if texts is not None and len(texts) != len(gradients_CxE):
        raise ValueError(f"there are {len(texts)} texts of {len(gradients_CxE)} passages")
    layout = projections.layout(settings.sites(), settings.projection)
    return TraceGradients(
        _in_memory(gradients_CxE, layout.slices),
        gradients_QxE,
        lambda row: (str(row), "" if texts is None else texts[row]),
        [Query(str(i), "", "") for i in range(len(gradients_QxE))],
    )


def _checked(batches: Iterable, settings: TraceSettings, label: str) -> Iterator:
    """Yields batches, each after its checks."""
    check = checks.BatchChecks(settings, label)
    for batch in batches:
        check(batch)
        yield batch


def _sample_batches(batches, settings: TraceSettings) -> tuple[list, Iterable]:
    """Returns batches to estimate second moments from, and all batches."""
    if not settings.needs_estimate:
        return [], batches
    count = settings.moments.sample
    if isinstance(batches, Sequence):
        rng = np.random.default_rng(settings.moments.seed)
        drawn = np.sort(rng.choice(len(batches), min(count, len(batches)), replace=False))
        return [batches[i] for i in drawn], batches
    # An iterator can be read once only: its first batches are the sample.
    batches = iter(batches)
    first = list(itertools.islice(batches, count))
    return first, itertools.chain(first, batches)


def _in_memory(gradients_CxE: np.ndarray, slices) -> InMemory:
    # Infinite rows are never retrieved.
    gradients_CxE[~np.isfinite(gradients_CxE).all(axis=1)] = np.inf
    return InMemory(gradients_CxE, slices)


def encode_texts(
    settings: TraceSettings, reading: TextSettings, passages, queries
) -> TraceGradients:
    """Encodes texts into a store in `reading.directory`, or in memory.

    Of several calls with one directory, in whatever processes, one works and the others wait; what
    they have in common they then find finished.

    Args:
        settings: the arguments of `tda.trace`.
        reading: how texts are read.
        passages, queries: as `tda.trace` takes them.

    Raises:
        ValueError: tokenizer and model differ in tokens, a query does not fit, the gradients do not
            fit in memory, or `directory` holds other gradients.
    """
    checks.check_reading(settings, reading)
    if reading.directory is None:
        return _encode_texts(settings, reading, passages, queries)
    reading.directory.mkdir(parents=True, exist_ok=True)
    lock = DirectoryLock(reading.directory, f"directory={reading.directory}")
    processes.on_first_process("hold the directory", lock.wait)
    try:
        return _encode_texts(settings, reading, passages, queries)
    finally:
        lock.release()


def _encode_texts(
    settings: TraceSettings, reading: TextSettings, passages, queries
) -> TraceGradients:
    tokenizer, directory = reading.tokenizer, reading.directory
    queries = parse_queries(queries)
    checks.check_queries(settings, len(queries))
    settings.print_coverage()
    if reading.joiner is not None and all(q.tokens is not None for q in queries):
        raise ValueError(
            f"joiner={reading.joiner!r} has no effect: every query has token ids, which are taken "
            "as they are; leave it out"
        )
    prompts = tokens.tokenise_queries(queries, tokenizer, reading.context, reading.joiner)
    checks.check_token_ids(settings, prompts, "queries")
    table = _tokenise(passages, reading, settings.quiet)
    checks.check_token_ids(settings, table, "passages")
    layout = layouts.make_layout(settings, table, tokenizer.pad)
    scales = settings.known_scales()
    if directory is not None:
        # Every correction has its own gradients; the tokens are shared.
        directory = directory / provenances.name_correction(settings, scales)
    provenance = None if directory is None else provenances.describe_gradients(settings, directory)
    if directory is not None and (directory / "gradients" / "manifest.json").exists():
        # Refuses another model's store before second moments are estimated again.
        stores.open_store(directory / "gradients", provenance)
    if settings.needs_estimate:
        scales = _load_or_estimate_scales(settings, table, layout, directory, provenance)
    encoder = make_encoder(
        settings.model,
        settings.projection,
        scales,
        settings.loss,
        **settings.scope,
        mesh=settings.mesh,
        tell=False,
    )
    prompt_layout = layouts.make_layout(settings, prompts, tokenizer.pad)
    gradients_QxE = _encode_prompts(encoder, prompts, prompt_layout)
    checks.check_query_gradients(gradients_QxE, [q.id for q in queries])
    texts = PassageTexts(table, tokenizer)
    if directory is None:
        source = _encode_in_memory(encoder, table, layout, settings.quiet)
        return TraceGradients(
            source, gradients_QxE, lambda row: (table.ids[row], texts[row]), queries
        )
    provenance |= provenances.describe_correction(settings, scales) | {
        "tokenizer": tokenizer.fingerprint()
    }
    store = stores.create(
        directory / "gradients",
        table.ids,
        dict.fromkeys(encoder.layout.blocks, settings.projection.side**2),
        provenance,
        shard_bytes=_shard_bytes(table, encoder.layout.width),
        documents=table.documents,
        texts=texts,
        corpus=table.fingerprint(),
    )
    if len(store.missing()) == len(store.shards()):
        _check_longest_passage(encoder, table, layout)
    loss_identity.save(provenance["loss"], directory)
    encoding.fill_store(store, encoder, table, layout, "encode passages", settings.quiet)

    def passage_of(row):
        (passage,) = store.passages([row])
        return passage.id, passage.text

    return TraceGradients(store, gradients_QxE, passage_of, queries)


def _encode_prompts(encoder: Encoder, prompts: TokenTable, layout: BatchLayout) -> np.ndarray:
    # A few prompts would fill only a corner of a batch that is padded to the size for passages.
    needed = len(prompts) * int(prompts.lengths.max())
    layout = dataclasses.replace(layout, tokens_per_batch=min(layout.tokens_per_batch, needed))
    return encoding.encode_rows(encoder, prompts, np.arange(len(prompts)), layout)


def _check_longest_passage(encoder: Encoder, table: TokenTable, layout: BatchLayout) -> None:
    """Checks the gradient of the longest passage before the others are encoded."""
    _check_finite_passages(
        table, lambda row: encoding.encode_rows(encoder, table, np.array([row]), layout)
    )


def _check_finite_passages(table: TokenTable, encode: Callable[[int], np.ndarray]) -> None:
    """Checks that the model has a finite gradient at as many positions as passages have.

    A look-up beyond a table of positions gives NaN, and such passages would never be retrieved.

    Args:
        table: the passages.
        encode: returns the gradient of a row.

    Raises:
        ValueError: the gradient of the longest passage is not finite, that of the shortest is.
    """
    longest, shortest = table.longest, table.shortest
    for row in (longest, shortest):
        if np.isfinite(encode(row)).all():
            break
    if row != longest:
        positions = [len(table.sequence(row)[0]) - 1 for row in (longest, shortest)]
        raise ValueError(
            f"the gradient of a passage of {positions[0]} positions is not finite, that of one of "
            f"{positions[1]} is: if the model has a table of "
            "positions, say context= with its length"
        )


def _shard_bytes(table: TokenTable, width: int) -> int:
    tokens = max(_SHARD_TOKENS, table.token_count // _MOST_SHARDS)
    rows = max(1, int(tokens / max(1.0, table.token_count / len(table))))
    return min(SHARD_BYTES, rows * 4 * width)


def _load_or_estimate_scales(
    settings: TraceSettings,
    table: TokenTable,
    layout: BatchLayout,
    directory: pathlib.Path | None,
    provenance: dict | None,
) -> dict[str, Scale]:
    """Returns 1/√V, estimated from the passages; saved in `directory`, if there is one."""
    batches = layouts.sample_passages(settings, table, layout)
    if directory is None:
        return settings.estimate_scales(batches)
    provenance = provenance | {
        "correction": settings.moments.correction,
        "sample": settings.moments.sample,
        "seed": settings.moments.seed,
        "tokens_per_batch": settings.tokens_per_batch,
        "corpus": table.fingerprint(),
    }
    file = directory / "scales.safetensors"
    scales = kept_scales.load(file, provenance)
    if scales is None:
        scales = settings.estimate_scales(batches)
        file.parent.mkdir(parents=True, exist_ok=True)
        kept_scales.save(file, scales, provenance)
    return scales


def _tokenise(passages, reading: TextSettings, quiet: bool) -> TokenTable:
    """Tokenises the corpus, on disk if it is a file and there is a directory, else in memory."""
    fields = reading.text_field, reading.id_field
    if isinstance(passages, str | os.PathLike):
        passages = Corpus(passages, text_field=fields[0] or "text", id_field=fields[1])
    is_corpus = isinstance(passages, Corpus)
    documents = passages if is_corpus else parse_passages(passages, *fields)
    if is_corpus and reading.directory is not None:
        table, counts = tokenised.tokenise_on_disk(
            reading.directory / "tokens", passages, reading.tokenizer, reading.context, quiet
        )
    else:
        table, counts = tokenised.tokenise_in_memory(
            documents, reading.tokenizer, reading.context, quiet
        )
    if not quiet:
        print(
            f"{counts.documents:,} documents ({counts.blank:,} of them blank and left out), "
            f"{len(table):,} passages, {table.count_scored():,} tokens"
        )
    return table


def _encode_in_memory(
    encoder: Encoder, table: TokenTable, layout: BatchLayout, quiet: bool
) -> InMemory:
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
    with progress.bar(total, "encode passages", "token", quiet=quiet) as bar:
        rows = np.arange(len(table))
        gradients_CxE = encoding.encode_rows(encoder, table, rows, layout, bar.update)
    if is_small:
        # One passage fills a batch with padding, a good part of the time that all of these take.
        _check_finite_passages(table, lambda row: gradients_CxE[row])
    return _in_memory(gradients_CxE, encoder.layout.slices)
