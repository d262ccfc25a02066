"""What a run keeps of its corpus for live questions, and the way back to all of it."""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Sequence

import numpy as np

from tda.run import corpus as corpora
from tda.run import defaults, vectors
from tda.run.run import Corpus
from tda.run.workdir import Workdir
from tda.runtime import atomic_file
from tda.runtime.atomic_file import write_json
from tda.runtime.progress import silent
from tda.store import Passage

# Written at the end of a run, so that questions are answered by its own settings.
CONFIG = "config.json"
# What it is called in a workdir.
FILE = "corpus.npz"


class LiveError(ValueError):
    """A workdir cannot answer live questions, or not this one."""


@dataclasses.dataclass(frozen=True)
class Known:
    """A run's own queries, and the passages that are correct for them.

    Attributes:
        ids: of the queries, in the run's order.
        prompts, targets: their text.
        correct: the correct passage rows of each, int64.
    """

    ids: Sequence[str] = ()
    prompts: Sequence[str] = ()
    targets: Sequence[str] = ()
    correct: Sequence[np.ndarray] = ()

    def number(self, prompt: str, target: str) -> int | None:
        """Which of the queries a question is, the first of those alike; None where it is none."""
        return self._numbers.get(_key(prompt, target))

    @functools.cached_property
    def _numbers(self) -> dict[tuple[str, str], int]:
        keys = [_key(*pair) for pair in zip(self.prompts, self.targets, strict=True)]
        return {key: q for q, key in reversed(list(enumerate(keys)))}


def _key(prompt: str, target: str) -> tuple[str, str]:
    # White space between them makes no other question: they are joined by one space.
    return prompt.rstrip(), target.strip()


@dataclasses.dataclass(frozen=True)
class Remembered:
    """What is known of a run's corpus without reading it.

    Attributes:
        fingerprint: as `Corpus.fingerprint`.
        known: the run's queries and their correct passages.
        lengths: scored tokens of every passage, int32 [C].
    """

    fingerprint: dict
    known: Known
    lengths: np.ndarray


def remember(config, corpus: Corpus, workdir: Workdir) -> None:
    """Writes a run's config into its workdir, and what live questions need of its corpus."""
    _write_corpus(config, corpus, workdir)
    write_json(workdir / CONFIG, config.to_dict())


def config_of(path: pathlib.Path) -> dict:
    """The run's config; a run of an older version left none, and had the defaults perhaps."""
    config = defaults.get_config().to_dict()
    if (path / CONFIG).exists():
        there = json.loads((path / CONFIG).read_text(encoding="utf-8"))
        config = {
            k: v | there.get(k, {}) if isinstance(v, dict) else there.get(k, v)
            for k, v in config.items()
        }
    return config


def _write_corpus(config, corpus: Corpus, workdir: Workdir) -> None:
    facts, correct = corpus.queries, corpus.correct["all"]
    told = {
        "fingerprint": corpus.fingerprint,
        "ids": [f.fact_id for f in facts],
        "prompts": [f.prompt(config.data.prompt) for f in facts],
        "targets": [f.entity1 for f in facts],
    }
    with atomic_file.open_atomic(workdir / FILE, "wb") as out:
        np.savez_compressed(
            out,
            told=np.frombuffer(json.dumps(told).encode(), np.uint8),
            lengths=vectors.scored_tokens(corpus.passages).astype(np.int32),
            correct=np.concatenate([*correct, np.zeros(0, np.int64)]),
            counts=np.asarray([len(rows) for rows in correct]),
        )


def read(path: pathlib.Path) -> Remembered | None:
    """What a workdir's run kept; None where one of an older version kept nothing."""
    if not (path / FILE).exists():
        return None
    with np.load(path / FILE, allow_pickle=False) as kept:
        told = json.loads(kept["told"].tobytes())
        correct = np.split(kept["correct"], np.cumsum(kept["counts"])[:-1])
        lengths = kept["lengths"]
    known = Known(told["ids"], told["prompts"], told["targets"], correct)
    return Remembered(told["fingerprint"], known, lengths)


class Reread:
    """A run's corpus, read again when something needs more of it than the workdir keeps.

    Also the passages of a run without a store (`tda.live.retrievers.Passages`).

    Args:
        config: of the run.
        path: its workdir.
        fingerprint: of the passages that must be found, or None where it is not known.
        rows: C, where it is known.
    """

    def __init__(self, config, path: pathlib.Path, fingerprint: str | None, rows: int = 0):
        self._config, self._path, self._fingerprint = config, path, fingerprint
        self._rows, self._corpus = rows, None
        self.withdrawn = np.zeros(0, np.int64)

    def get(self, on_progress: Callable[[str, int, int], None], why: str) -> Corpus:
        """The corpus.

        Args:
            on_progress: told that it is read.
            why: what it is needed for, to be told where it cannot be read.

        Raises:
            LiveError: the run's files are not there, or hold another corpus.
        """
        if self._corpus is None:
            on_progress("reading the run's corpus", 0, 0)
            try:
                found = corpora.load(self._config, Workdir(self._path))
            except (ValueError, OSError) as error:
                raise LiveError(
                    f"{why} needs the files that the run read its corpus from: {error}"
                ) from error
            if self._fingerprint not in (None, found.fingerprint["corpus"]):
                raise LiveError(
                    f"{why} needs the run's corpus, and the files that it was read from "
                    "(data.sentences, data.facts) hold another one by now"
                )
            self._corpus = found
        return self._corpus

    @property
    def rows(self) -> int:
        """C, the number of passages."""
        return self._rows or len(self._read().passages)

    def passages(self, numbers) -> list[Passage]:
        """Id, document and text of some rows."""
        found = self._read()
        table = found.passages
        return [Passage(table.ids[i], table.documents[i], found.text_of(i)) for i in numbers]

    def _read(self) -> Corpus:
        return self.get(silent, "a run without a store")
