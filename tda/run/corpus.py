"""The stage that reads, checks and tokenises the corpus and the queries of a config."""

import numpy as np

from tda.data import tokens
from tda.data.batches import buckets
from tda.data.pretrained_tokenizer import PretrainedTokenizer
from tda.data.tokenizer import Tokenizer
from tda.facts import features, files, labels, statements
from tda.facts.records import Fact, Sentence
from tda.model import pretrained
from tda.run.run import Corpus
from tda.run.workdir import Workdir
from tda.runtime import processes
from tda.runtime.fingerprint import fingerprint_parts, fingerprint_texts


def load(config, workdir: Workdir) -> Corpus:
    """Reads the corpus and the queries that `config.data` names.

    Raises:
        ValueError: a path is missing, a record is malformed, a query does not fit; the message
            names the file, the record or the key.
        tda.runtime.processes.ProcessError: processes read different files.
    """
    all_sentences, all_facts = sentences, facts = _records(config.data, workdir)
    # Checks all labels, even if only some facts are queried.
    labels.relevant_passages(sentences, facts)
    excluded = [r.strip() for r in config.data.exclude_relations.split(",") if r.strip()]
    if config.data.pool == "clean":
        facts = labels.clean_pool(facts, sentences, exclude_relations=tuple(excluded))
    elif config.data.pool == "all":
        facts = labels.without_relations(facts, excluded)
    else:
        raise ValueError(f"unknown data.pool={config.data.pool!r}; use all or clean")
    sentences, facts = labels.select(
        sentences,
        facts,
        config.data.n_sentences or len(sentences),
        config.data.n_queries or len(facts),
        config.data.seed,
    )
    if not facts:
        raise ValueError("there are no queries: the facts file, or the pool of facts, is empty")
    prompts_of = {f.fact_id: f.prompt(config.data.prompt) for f in facts}
    texts = [(s.sentence_id, s.text) for s in sentences]
    more = _more_text(config.data, all_sentences, all_facts, sentences, facts)
    tokenizer = _tokenizer(config, workdir, [text for _, text in texts + more])
    context = config.model.context
    passages = _passages("corpus", texts, tokenizer, context)
    training = _passages("training text", texts + more, tokenizer, context) if more else passages
    print(f"{len(facts):,} queries")
    prompts = tokens.tokenise_queries(
        ((f.fact_id, prompts_of[f.fact_id], f.entity1) for f in facts), tokenizer, context
    )
    correct = _correct(sentences, facts, passages)
    fingerprint = _fingerprint(passages, training, prompts, tokenizer, correct)
    processes.check_alike("corpus", fingerprint)
    return Corpus(
        sentences,
        facts,
        tokenizer,
        passages,
        training,
        prompts,
        correct,
        buckets(context),
        fingerprint,
    )


def _records(data, workdir: Workdir) -> tuple[list[Sentence], list[Fact]]:
    if bool(data.sentences) != bool(data.facts):
        raise ValueError("give both --config.data.sentences and --config.data.facts, or neither")
    if data.sentences:
        return list(files.iter_sentences(data.sentences)), list(files.iter_facts(data.facts))
    directory = data.dir or str(workdir / "data")
    records: list = []
    # Process 0 prepares the files, and the others then read them.
    processes.on_first_process(
        f"prepare {data.name}", lambda: records.extend(features.load_tfds(data.name, directory))
    )
    sentences, facts = records or features.load_tfds(data.name, directory)
    return sentences, facts


def _more_text(data, all_sentences, all_facts, sentences, queries) -> list[tuple[str, str]]:
    """Returns the text that the model is trained on beside the corpus, as (id, text)."""
    more = []
    if data.train_on == "all":
        selected = {s.sentence_id for s in sentences}
        more = [(s.sentence_id, s.text) for s in all_sentences if s.sentence_id not in selected]
    elif data.train_on != "corpus":
        raise ValueError(f"unknown data.train_on={data.train_on!r}; use corpus or all")
    if data.statements_of not in ("all", "corpus"):
        raise ValueError(f"unknown data.statements_of={data.statements_of!r}; use all or corpus")
    if data.statements:
        facts = all_facts
        if data.statements_of == "corpus":
            stated = labels.relevant_passages(sentences, all_facts, may_lack_sentences=True)
            facts = [f for f in all_facts if stated[f.fact_id]]
            if not facts:
                raise ValueError(
                    "data.statements_of=corpus: no passage is annotated with a fact (fact_triples, "
                    "or a fact's trex_sentences); use data.statements_of=all, or data.statements=0"
                )
        stated_facts = list(statements.statements(facts, queries, data.statements))
        if not stated_facts:
            print(f"no fact is stated beside the corpus: all {len(facts):,} answer a query")
        more += stated_facts
    return more


def _passages(label: str, texts, tokenizer: Tokenizer, context: int) -> tokens.TokenTable:
    table, counts = tokens.tokenise_passages(texts, tokenizer, context)
    print(
        f"{label}: {counts['documents']:,} documents, {counts['passages']:,} passages "
        f"({counts['split']:,} documents longer than {context} tokens were split), "
        f"{int(table.scored.sum()):,} tokens"
    )
    return table


def _tokenizer(config, workdir: Workdir, texts: list[str]) -> Tokenizer | PretrainedTokenizer:
    if config.model.pretrained:
        return pretrained.load_tokenizer(config.model.pretrained)
    made_from = {"texts": fingerprint_texts(texts), "vocab_size": config.tokenizer.vocab_size}
    path = workdir / "model" / "tokenizer.json"
    if not workdir.finished("tokenizer", made_from):
        workdir.claim("tokenizer", made_from)

        def train():
            path.parent.mkdir(exist_ok=True)
            Tokenizer.train(texts, config.tokenizer.vocab_size).save(path)

        processes.on_first_process("train the tokenizer", train)
        workdir.finish("tokenizer", made_from)
    return Tokenizer.load(path)


def _correct(sentences, facts, passages) -> dict[str, list[np.ndarray]]:
    rows: dict[str, list[int]] = {}
    for row, document in enumerate(passages.documents):
        rows.setdefault(document, []).append(row)
    out = {}
    for label, strict in (("all", False), ("strict", True)):
        by_fact = labels.relevant_passages(sentences, facts, strict=strict)
        out[label] = [
            np.asarray(sorted(r for s in by_fact[f.fact_id] for r in rows[s]), np.int64)
            for f in facts
        ]
    return out


def _fingerprint(passages, training, prompts, tokenizer, correct) -> dict:
    rows = repr({k: [r.tolist() for r in v] for k, v in correct.items()})
    return {
        "corpus": passages.fingerprint(),
        "training": training.fingerprint(),
        "queries": prompts.fingerprint(),
        "tokenizer": tokenizer.fingerprint(),
        "labels": fingerprint_parts([rows]),
    }
