"""Rows of numbers of every passage that are no gradients: vectors of texts, and probabilities."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from tda import store as stores
from tda.data.tokens import TokenTable
from tda.evaluation.likelihood import Likelihood
from tda.retrieval import dense, hidden
from tda.run.run import Corpus, Trained
from tda.run.workdir import Workdir
from tda.runtime import processes, progress, sharding
from tda.runtime.fingerprint import fingerprint, plain

# Rows that are computed together; what a kill may lose.
_TOGETHER = 2048


def scored_tokens(table: TokenTable) -> np.ndarray:
    """Tokens of each sequence that carry a loss, int64 [N]."""
    before = np.concatenate([[0], np.cumsum(table.scored)])
    return np.diff(before[table.starts])


def probabilities(config, corpus: Corpus, trained: Trained, workdir: Workdir) -> np.ndarray:
    """The geometric mean probability of each passage's tokens, float64 [C]."""
    _check_local(trained, "probabilities of passages")
    likelihood = Likelihood(trained.model, corpus.layout(config.gradients.tokens_per_batch))

    def compute(rows):
        return likelihood(corpus.passages, rows).nats[:, None]

    table = corpus.passages
    made, text = made_of_nats(trained), corpus.fingerprint["corpus"]
    found = _kept(workdir, "nats", table.ids, 1, made, text, compute)
    return mean_probabilities(found, scored_tokens(table))


def made_of_nats(trained: Trained) -> dict:
    """What decides the nats of passages, apart from the rows."""
    return {"what": "nats", "checkpoint": fingerprint(trained.fingerprint), "step": trained.step}


def mean_probabilities(nats_Cx1: np.ndarray, lengths_C: np.ndarray) -> np.ndarray:
    """The geometric mean probability of each passage's tokens, float64 [C]."""
    return np.exp(-nats_Cx1[:, 0].astype(np.float64) / np.maximum(lengths_C, 1))


@dataclasses.dataclass(frozen=True)
class Vectors:
    """A vector for each query and passage: float32 [Q, D] and [C, D]."""

    queries: np.ndarray
    passages: np.ndarray


def of_hidden_states(
    config, corpus: Corpus, trained: Trained, workdir: Workdir, layer: str
) -> Vectors:
    """Mean hidden states of the traced model; of a query, those of prompt and target."""
    how = config, corpus, trained, workdir, layer
    return Vectors(*(hidden_states(*how, name) for name in ("queries", "corpus")))


def hidden_states(
    config,
    corpus: Corpus,
    trained: Trained,
    workdir: Workdir,
    layer: str,
    name: str,
    on_rows: Callable[[int], None] = lambda rows: None,
) -> np.ndarray:
    """Mean hidden states of the "queries" or of the "corpus", float32 [N, D].

    Args:
        config, corpus, trained, workdir: of the run.
        layer: of `hidden.LAYERS`.
        name: whose.
        on_rows: told how many rows are there, when more are.
    """
    _check_local(trained, "hidden states")
    table = {"queries": corpus.prompts, "corpus": corpus.passages}[name]
    pooler = make_pooler(trained, corpus.tokenizer, layer)
    layout = corpus.layout(config.gradients.tokens_per_batch)
    return _kept(
        workdir,
        f"hidden-{layer}-{name}",
        table.ids,
        pooler.width,
        made_of_hidden_states(trained, layer),
        corpus.fingerprint[name],
        lambda rows: pooler.rows(table, rows, layout),
        on_rows,
    )


def make_pooler(trained: Trained, tokenizer, layer: str) -> hidden.Pooler:
    """Takes the mean hidden states of the traced model, special tokens left out."""
    special = (*tokenizer.begin, *tokenizer.end, tokenizer.eos, tokenizer.pad)
    without = tuple(sorted({t for t in special if t is not None}))
    return hidden.Pooler(trained.model, layer, without)


def made_of_hidden_states(trained: Trained, layer: str) -> dict:
    """What decides hidden states, apart from the rows."""
    return {
        "what": f"hidden states, {layer}",
        "checkpoint": fingerprint(trained.fingerprint),
        "step": trained.step,
    }


def of_sentences(config, corpus: Corpus, workdir: Workdir, asked: Sequence[str]) -> Vectors:
    """Vectors of a sentence encoder; `asked` are the queries' texts."""
    encoder = dense.SentenceEncoder(config.dense.model)
    return Vectors(
        sentences(config, encoder, corpus, workdir, "queries", asked.__getitem__),
        sentences(config, encoder, corpus, workdir, "corpus", corpus.text_of),
    )


def sentences(
    config,
    encoder: dense.SentenceEncoder,
    corpus: Corpus,
    workdir: Workdir,
    name: str,
    text_of: Callable[[int], str],
    on_rows: Callable[[int], None] = lambda rows: None,
) -> np.ndarray:
    """A sentence encoder's vectors of the "queries" or of the "corpus", float32 [N, D].

    Args:
        config, corpus, workdir: of the run.
        encoder: that of `config.dense.model`.
        name: whose.
        text_of: gives the text of a row.
        on_rows: told how many rows are there, when more are.
    """
    return _kept(
        workdir,
        f"dense-{name}",
        {"queries": corpus.prompts, "corpus": corpus.passages}[name].ids,
        encoder.width,
        made_of_sentences(config),
        corpus.fingerprint[name],
        lambda rows: encoder.encode([text_of(int(i)) for i in rows]),
        on_rows,
    )


def made_of_sentences(config) -> dict:
    """What decides a sentence encoder's vectors, apart from the rows."""
    return {"what": "sentence encoder", "model": dense.identity(config.dense.model)}


def kept(path, name: str, made: dict, corpus: str) -> np.ndarray | None:
    """Rows that a workdir keeps, float32 [N, D]; None where they lack or are unfinished.

    Args:
        path: the workdir.
        name: of the vectors, such as "dense-corpus".
        made: what decides them.
        corpus: the fingerprint of the text that they are of.
    """
    there = _path(path, name, made, corpus)
    if not stores.finished(there):
        return None
    store = stores.open_store(there)
    return store.read(slice(0, store.rows))


def _path(workdir, name: str, made: dict, corpus: str):
    return workdir / "stores" / f"{name}-{fingerprint(plain([made, corpus]))}"


def _check_local(trained: Trained, what: str) -> None:
    if not sharding.is_local(trained.mesh):
        raise ValueError(
            f"{what} are computed by one process, and this model is spread over several; "
            "leave the methods out that need them"
        )


def _kept(
    workdir: Workdir,
    name: str,
    ids: Sequence[str],
    width: int,
    made: dict,
    corpus: str,
    compute: Callable[[np.ndarray], np.ndarray],
    on_rows: Callable[[int], None] = lambda rows: None,
) -> np.ndarray:
    """Rows that are computed a few at a time and kept: killed, it goes on where it stopped."""
    path = _path(workdir, name, made, corpus)

    def fill():
        store = stores.create(
            path,
            ids,
            {"vector": width},
            made,
            "float32",
            _TOGETHER * width * 4,
            corpus=corpus,
        )
        missing, shards = store.missing(), store.shards()
        if missing:
            with progress.bar(len(ids), name, "passage") as bar:
                bar.update(len(ids) - sum(shards[i].stop - shards[i].start for i in missing))
                for i in missing:
                    rows = np.arange(shards[i].start, shards[i].stop)
                    store.write(i, compute(rows))
                    bar.update(len(rows))
                    on_rows(bar.n)

    processes.on_first_process(f"compute {name}", fill)
    store = stores.open_store(path)
    return store.read(slice(0, store.rows))
