"""The corpus of a run without labels: `data.corpus`, tokenised by file and part, and mapped."""

import itertools
import pathlib
from collections.abc import Iterator

from tda import methods
from tda.data import jsonl, tokenised, tokens
from tda.data.batches import buckets
from tda.data.corpora import Corpus as Documents
from tda.data.documents import Document
from tda.data.file_states import read_states
from tda.evaluation import frequency
from tda.facts import files, labels, query_sets
from tda.facts.records import Fact
from tda.model import pretrained
from tda.run import learnt_tokenizer, questions
from tda.run.defaults import KEYS, flat
from tda.run.run import Corpus
from tda.run.workdir import Workdir
from tda.runtime import processes, progress
from tda.runtime.atomic_file import read_json, write_json
from tda.runtime.engine import PROCESSES, Engine
from tda.runtime.fingerprint import fingerprint

# The folder of the tokens in a workdir.
FOLDER = "tokens"
# Characters at most that a tokenizer is learnt from, an equal share of every file: more of them
# change few merges, and take hours to count.
_LEARNT_CHARACTERS = 1 << 30
# Keys without a meaning for a corpus without labels, and for queries that are not facts.
_LABELLED = (
    *("data.sentences", "data.n_sentences", "data.train_on", "data.also_train_on"),
    "data.statements",
)
_OF_FACTS = ("data.facts", "data.exclude_relations", "data.prompt", "data.pool")


def check(config) -> None:
    """Checks that the keys of a config fit a corpus without labels, and that its files exist.

    Raises:
        ValueError: a key does not fit; the message names it.
        FileNotFoundError: a file does not exist, or a pattern has no match.
    """
    data, values = config.data, flat(config)
    if bool(data.facts) == bool(data.queries):
        raise ValueError(
            "data.corpus needs queries: give --config.data.queries (JSON lines with prompt and "
            "target) or --config.data.facts, and not both"
        )
    if data.pool == "clean":
        raise ValueError(
            f"data.pool=clean does not go with data.corpus={data.corpus}, which has no labels; use "
            "named (facts whose subject and target a passage names), or all"
        )
    for key in _LABELLED + (_OF_FACTS if data.queries else ()):
        if values[key] != KEYS[key][0]:
            given = f"data.corpus={data.corpus}, which has no labels"
            if key not in _LABELLED:
                given = f"data.queries={data.queries}, which holds no facts"
            raise ValueError(f"{key}={values[key]} does not go with {given}; leave one of them out")
    for method in methods.parse(config.methods).values():
        if method.retriever == "annotated":
            raise ValueError(
                f"{method.title} needs labels, which data.corpus={data.corpus} does not have; "
                "leave it out of methods"
            )
    documents_of(data)
    jsonl.expand(data.queries or data.facts)


def load(config, workdir: Workdir, engine: Engine = PROCESSES) -> Corpus:
    """Tokenises the corpus that `config.data.corpus` names, or finds it tokenised.

    Raises:
        ValueError: a file is missing, a record is malformed, a query does not fit.
        tda.runtime.processes.ProcessError: processes read different files.
    """
    documents = documents_of(config.data)
    facts = _facts(config.data)
    if config.model.pretrained:
        tokenizer = pretrained.load_tokenizer(config.model.pretrained)
    else:
        sizes = {name: state.size for name, state in read_states(documents.files).items()}
        identity = fingerprint([documents.describe(), sizes])
        tokenizer = learnt_tokenizer.load(config, workdir, identity, lambda: _texts(documents))
    # Checked before the corpus is tokenised, which may take days.
    candidates = facts if config.data.pool == "named" else _drawn(config, facts)
    questions.tokenise(candidates, config, tokenizer)
    passages, counts = tokenised.tokenise_on_disk(
        workdir / FOLDER, documents, tokenizer, config.model.context, engine=engine
    )
    print(
        f"corpus: {counts.documents:,} documents, {counts.blank:,} of them blank; "
        f"{len(passages):,} passages ({counts.split:,} documents longer than "
        f"{config.model.context} tokens were split), {passages.count_scored():,} tokens"
    )
    corpus = _corpus(config, facts, tokenizer, passages, workdir)
    print(f"{len(corpus.queries):,} queries")
    processes.check_alike("corpus", corpus.fingerprint)
    return corpus


def open_finished(config, workdir: Workdir | pathlib.Path) -> Corpus:
    """Opens the corpus that a run has tokenised; the documents may be gone.

    Raises:
        FileNotFoundError: tokens, tokenizer or queries are not there.
    """
    if config.model.pretrained:
        tokenizer = pretrained.load_tokenizer(config.model.pretrained)
    else:
        tokenizer = learnt_tokenizer.open_learnt(workdir)
    passages, _ = tokenised.open_tokens(workdir / FOLDER)
    return _corpus(config, _facts(config.data), tokenizer, passages, workdir)


def _corpus(config, facts, tokenizer, passages, workdir: Workdir | pathlib.Path) -> Corpus:
    data = config.data
    if data.pool == "named":
        facts = _named(facts, passages, tokenizer, workdir)
    facts = _drawn(config, facts)
    prompts = questions.tokenise(facts, config, tokenizer)
    tables = {"corpus": passages, "training": passages, "queries": prompts, "tokenizer": tokenizer}
    return Corpus(
        sentences=[],
        queries=facts,
        tokenizer=tokenizer,
        passages=passages,
        training=passages,
        prompts=prompts,
        correct={},
        buckets=buckets(config.model.context),
        fingerprint={name: table.fingerprint() for name, table in tables.items()},
    )


def documents_of(data, key: str = "corpus") -> Documents:
    """Returns the documents that a key of the section `data` of a config names."""
    options = {"data_dir": data.dir} if data.dir else {}
    if data.share != 1:
        options["share"] = data.share
    names = sources_of(data[key])
    source = names if len(names) > 1 else names[0]
    return Documents(source, text_field=data.text_field, id_field=data.id_field or None, **options)


def sources_of(value: str) -> list[str]:
    """Returns the names in a key's value, such as that of `data.corpus`."""
    return value.split(",")


def learnt_text(document: Document) -> str:
    """Returns what a tokenizer learns from a document."""
    return f"{document.prompt} {document.text}" if document.prompt else document.text


def _texts(documents: Documents) -> Iterator[str]:
    """Yields the texts that a tokenizer is learnt from."""
    share = _LEARNT_CHARACTERS // len(documents.pieces)
    for piece in range(len(documents.pieces)):
        texts = map(learnt_text, documents.read(piece))
        pairs = ((text, len(text)) for text in texts)
        totals = itertools.accumulate(pairs, lambda a, b: (b[0], a[1] + b[1]))
        for text, total in totals:
            processes.check_preemption()
            yield text
            if total >= share:
                break


def _drawn(config, facts: list[Fact]) -> list[Fact]:
    """Returns the sample of facts to ask."""
    data = config.data
    return labels.select([], facts, 0, data.n_queries or len(facts), data.seed)[1]


def _named(facts: list[Fact], passages, tokenizer, workdir) -> list[Fact]:
    """Returns the facts with a passage that names subject and target; keeps the counts on disk."""
    names = [[f.fact_id, f.entity0, *f.entity0_alias, f.entity1, *f.entity1_alias] for f in facts]
    file = pathlib.Path(workdir / f"named-{fingerprint([passages.fingerprint(), names])}.json")

    def count() -> list[int]:
        if not file.exists():
            texts = tokens.PassageTexts(passages, tokenizer)
            with progress.bar(len(passages), "names of the facts", "passage") as bar:
                read = (texts[row] for row in range(len(passages)))
                write_json(file, frequency.counts(facts, read, bar.update).tolist())
        return read_json(file)

    counts = processes.on_first_process("look for the names of the facts", count)
    named = [f for f, n in zip(facts, counts, strict=True) if n]
    if not named:
        raise ValueError(
            f"data.pool=named: no passage names subject and target of any of {len(facts):,} facts; "
            "give other facts or a larger corpus, or use data.pool=all"
        )
    return named


def excluded_relations(data) -> list[str]:
    """Returns the relations that `data.exclude_relations` names."""
    return [r.strip() for r in data.exclude_relations.split(",") if r.strip()]


def _facts(data) -> list[Fact]:
    """Returns the facts to sample from; queries that are only prompt and target have no names."""
    if data.facts:
        facts = labels.without_relations(
            list(files.iter_facts(data.facts)), excluded_relations(data)
        )
    else:
        facts = query_sets.read(data.queries)
    if not facts:
        raise ValueError(
            f"there are no queries in {data.facts or data.queries}, or data.exclude_relations "
            "leaves none; give other facts"
        )
    return facts
