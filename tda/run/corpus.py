"""The stage that reads, checks and tokenises the corpus and the queries of a config."""

import itertools
from collections.abc import Iterable, Iterator
from typing import TypeVar

import numpy as np

from tda.data import jsonl, tokenised, tokens
from tda.data.batches import buckets
from tda.data.documents import Document
from tda.data.pretrained_tokenizer import PretrainedTokenizer
from tda.data.tokenizer import Tokenizer
from tda.facts import features, files, labels, lama, statements
from tda.facts.records import Fact, Sentence
from tda.model import pretrained
from tda.run import learnt_tokenizer, plain_corpus, questions
from tda.run.defaults import check_values
from tda.run.run import Corpus
from tda.run.workdir import Workdir
from tda.runtime import preemption, processes, progress
from tda.runtime.engine import PROCESSES, Engine
from tda.runtime.fingerprint import fingerprint_parts, fingerprint_texts

T = TypeVar("T")


def load(config, workdir: Workdir, engine: Engine = PROCESSES) -> Corpus:
    """Reads the corpus and the queries that `config.data` names.

    Args:
        config: the config.
        workdir: where tokens and tokenizer are kept.
        engine: who tokenises which part of a corpus without labels.

    Raises:
        ValueError: a path is missing, a record is malformed, a query does not fit; the message
            names the file, the record or the key.
        tda.runtime.processes.ProcessError: processes read different files.
    """
    check_values(config)
    if config.data.corpus:
        return plain_corpus.load(config, workdir, engine)
    all_sentences, all_facts = sentences, facts = _records(config.data, workdir)
    # Checks all labels, even if only some facts are queried.
    labels.relevant_passages(sentences, facts)
    excluded = plain_corpus.excluded_relations(config.data)
    if config.data.pool == "clean":
        facts = labels.clean_pool(facts, sentences, excluded)
    else:
        facts = labels.without_relations(facts, excluded)
    sentences, facts = labels.select(
        sentences,
        facts,
        config.data.n_sentences or len(sentences),
        config.data.n_queries or len(facts),
        config.data.seed,
    )
    # Before the tokenizer is trained, which may take minutes.
    if not facts:
        raise ValueError("there are no queries: the facts file, or the pool of facts, is empty")
    texts = [Document(s.sentence_id, s.text) for s in sentences]
    more = _more_text(config.data, all_sentences, all_facts, sentences, facts)
    tokenizer: Tokenizer | PretrainedTokenizer
    if config.model.pretrained:
        tokenizer = pretrained.load_tokenizer(config.model.pretrained)
    else:
        read = list(map(plain_corpus.learnt_text, texts + more))
        tokenizer = learnt_tokenizer.load(config, workdir, fingerprint_texts(read), lambda: read)
    context = config.model.context
    passages = _passages("corpus", texts, tokenizer, context)
    training = passages
    if config.data.train_on == "rest":
        training = _passages("training text", more, tokenizer, context)
    elif more:
        training = _passages("training text", texts + more, tokenizer, context)
    print(f"{len(facts):,} queries")
    prompts = questions.tokenise(facts, config, tokenizer)
    correct = _correct(sentences, facts, passages)
    # Metrics depend on the labels; gradients do not.
    rows = repr({k: [r.tolist() for r in v] for k, v in correct.items()})
    tables = {"corpus": passages, "training": training, "queries": prompts, "tokenizer": tokenizer}
    fingerprint = {name: table.fingerprint() for name, table in tables.items()}
    fingerprint["labels"] = fingerprint_parts([rows])
    # Each process reads the files itself; different files would mix two corpora.
    processes.check_alike("corpus", fingerprint)
    return Corpus(
        sentences=sentences,
        queries=facts,
        tokenizer=tokenizer,
        passages=passages,
        training=training,
        prompts=prompts,
        correct=correct,
        buckets=buckets(context),
        fingerprint=fingerprint,
    )


def open_finished(config, workdir: Workdir) -> Corpus:
    """Opens the corpus of a finished run."""
    if config.data.corpus:
        return plain_corpus.open_finished(config, workdir)
    return load(config, workdir)


def check_files(config) -> None:
    """Checks that the files of the corpus and of the queries exist.

    Raises:
        ValueError: only one of the two is named, or a corpus without labels has keys that need
            them.
        FileNotFoundError: a file does not exist, or a pattern has no match.
    """
    data = config.data
    if data.corpus:
        plain_corpus.check(config)
        return
    if data.pool == "named":
        raise ValueError(
            "data.pool=named is for data.corpus, which has no labels; use clean, or all"
        )
    if data.also_train_on:
        plain_corpus.documents_of(data, "also_train_on")
    if data.queries:
        raise ValueError(
            f"data.queries={data.queries} is for data.corpus, which is not set; give the queries "
            "of a corpus with labels as data.facts"
        )
    if bool(data.sentences) != bool(data.facts):
        raise ValueError("give both --config.data.sentences and --config.data.facts, or neither")
    if data.sentences:
        jsonl.expand(data.sentences)
        jsonl.expand(data.facts)
    elif data.name == "lama" and not data.dir:
        raise ValueError(
            "data.name=lama reads LAMA's own files, and data.dir is not set; give "
            "--config.data.dir=DATA, the folder that LAMA's data.zip unpacks to"
        )


def _records(data, workdir: Workdir) -> tuple[list[Sentence], list[Fact]]:
    if data.sentences:
        sentences = _heeding(files.iter_sentences(data.sentences))
        return processes.together(lambda: (list(sentences), list(files.iter_facts(data.facts))))
    if data.name == "lama":
        return processes.together(lambda: lama.read(data.dir))
    directory = data.dir or str(workdir / "data")
    records: list = []
    # Process 0 prepares the files before the others read them.
    processes.on_first_process(
        f"prepare {data.name}",
        lambda: records.extend(preemption.heed(lambda: features.load_tfds(data.name, directory))),
    )
    sentences, facts = records or features.load_tfds(data.name, directory)
    return sentences, facts


def _heeding(items: Iterable[T]) -> Iterator[T]:
    """Yields the items until a notice of preemption comes."""
    for item in items:
        preemption.check()
        yield item


def _more_text(data, all_sentences, all_facts, sentences, queries) -> list[Document]:
    """Returns the documents that the model is trained on besides the corpus."""
    more = []
    if data.train_on != "corpus":
        selected = {s.sentence_id for s in sentences}
        more = [
            Document(s.sentence_id, s.text) for s in all_sentences if s.sentence_id not in selected
        ]
    if data.also_train_on:
        others = plain_corpus.documents_of(data, "also_train_on")
        pieces = map(others.read, range(len(others.pieces)))
        more += _heeding(itertools.chain.from_iterable(pieces))
    if data.train_on == "rest" and not more:
        raise ValueError(
            "data.train_on=rest trains on the sentences outside the corpus, and there are none; "
            "give a smaller data.n_sentences, data.also_train_on, or data.train_on=corpus"
        )
    if not data.statements:
        return more
    facts = all_facts
    if data.statements_of == "corpus":
        stated = labels.relevant_passages(sentences, all_facts, may_lack_sentences=True)
        facts = [f for f in all_facts if stated[f.fact_id]]
        if not facts:
            raise ValueError(
                "data.statements_of=corpus: no passage is annotated with a fact (fact_triples, "
                "or a fact's trex_sentences); use data.statements_of=all, or data.statements=0"
            )
    stated_facts = list(statements.statements(facts, queries, data.statements, data.joiner))
    if not stated_facts:
        print(f"no fact is stated besides the corpus: all {len(facts):,} answer a query")
    return more + [Document(*pair) for pair in stated_facts]


def _passages(
    label: str, documents: list[Document], tokenizer: Tokenizer, context: int
) -> tokens.TokenTable:
    with progress.hidden():
        table, counts = processes.together(
            lambda: tokenised.tokenise_in_memory(_heeding(documents), tokenizer, context)
        )
    print(
        f"{label}: {counts.documents:,} documents, {len(table):,} passages "
        f"({counts.split:,} documents longer than {context} tokens were split), "
        f"{table.count_scored():,} tokens"
    )
    return table


def _correct(sentences, facts, passages) -> dict[str, list[np.ndarray]]:
    """Returns the correct passage rows of each query, for all labels and for strict ones."""
    # All passages of a document that states a fact are correct: labels do not say where it does. A
    # document without a token to predict has no passage.
    rows: dict[str, list[int]] = {}
    for row, document in enumerate(passages.documents):
        rows.setdefault(document, []).append(row)
    out = {}
    for label, strict in (("all", False), ("strict", True)):
        by_fact = labels.relevant_passages(sentences, facts, strict=strict)
        out[label] = [
            np.asarray(sorted(r for s in by_fact[f.fact_id] for r in rows.get(s, ())), np.int64)
            for f in facts
        ]
    return out
