"""Rows of numbers of every passage that are no gradients: vectors of texts, and probabilities."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from experiments.corpus import Corpus
from experiments.training import Trained
from experiments.workdir import Workdir, fingerprint, plain
from tda import likelihood, processes, progress, sharding
from tda import store as stores
from tda.data.tokens import TokenTable
from tda.retrieval import dense, hidden

# Rows that are computed together; what a kill may lose.
_TOGETHER = 2048


def scored_tokens(table: TokenTable) -> np.ndarray:
    """Tokens of each sequence that carry a loss, int64 [N]."""
    before = np.concatenate([[0], np.cumsum(table.scored)])
    return np.diff(before[table.starts])


def probabilities(config, corpus: Corpus, trained: Trained, workdir: Workdir) -> np.ndarray:
    """The geometric mean probability of each passage's tokens, float64 [C]."""
    _check_local(trained, "probabilities of passages")
    nats = likelihood.Likelihood(trained.model, corpus.tokenizer.pad)
    made = {"what": "nats", "checkpoint": fingerprint(trained.fingerprint), "step": trained.step}
    layout = (corpus.buckets, config.gradients.tokens_per_batch)

    def compute(rows):
        return nats.rows(corpus.passages, rows, *layout)[:, None]

    table = corpus.passages
    found = _kept(workdir, "nats", table.ids, 1, made, corpus.fingerprint["corpus"], compute)
    return np.exp(-found[:, 0].astype(np.float64) / np.maximum(scored_tokens(table), 1))


@dataclasses.dataclass(frozen=True)
class Vectors:
    """A vector for each query and passage: float32 [Q, D] and [C, D]."""

    queries: np.ndarray
    passages: np.ndarray


def of_hidden_states(
    config, corpus: Corpus, trained: Trained, workdir: Workdir, layer: str
) -> Vectors:
    """Mean hidden states of the traced model; of a query, those of prompt and target."""
    _check_local(trained, "hidden states")
    t = corpus.tokenizer
    pooler = hidden.Pooler(trained.model, layer, (t.bos, t.eos, t.pad), t.pad)
    made = {
        "what": f"hidden states, {layer}",
        "checkpoint": fingerprint(trained.fingerprint),
        "step": trained.step,
    }
    layout = (corpus.buckets, config.gradients.tokens_per_batch)
    tables = {"queries": corpus.prompts, "corpus": corpus.passages}
    return Vectors(
        *(
            _kept(
                workdir,
                f"hidden-{layer}-{name}",
                table.ids,
                pooler.width,
                made,
                corpus.fingerprint[name],
                lambda rows, table=table: pooler.rows(table, rows, *layout),
            )
            for name, table in tables.items()
        )
    )


def of_sentences(config, corpus: Corpus, workdir: Workdir, asked: Sequence[str]) -> Vectors:
    """Vectors of a sentence encoder; `asked` are the queries' texts."""
    encoder = dense.SentenceEncoder(config.dense.model)
    made = {"what": "sentence encoder", "model": dense.identity(config.dense.model)}

    def passages(rows):
        return encoder.encode([corpus.text_of(int(i)) for i in rows])

    def queries(rows):
        return encoder.encode([asked[i] for i in rows])

    ids = {"queries": corpus.prompts.ids, "corpus": corpus.passages.ids}
    work = {"queries": queries, "corpus": passages}
    return Vectors(
        *(
            _kept(
                workdir,
                f"dense-{name}",
                ids[name],
                encoder.width,
                made,
                corpus.fingerprint[name],
                work[name],
            )
            for name in ("queries", "corpus")
        )
    )


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
) -> np.ndarray:
    """Rows that are computed a few at a time and kept: killed, it goes on where it stopped."""
    path = workdir / "stores" / f"{name}-{fingerprint(plain([made, corpus]))}"

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

    processes.by_first(f"compute {name}", fill)
    store = stores.open_store(path)
    return store.read(slice(0, store.rows))
