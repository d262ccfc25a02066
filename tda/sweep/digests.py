"""Digests of the files that a run reads from outside its workdir."""

import json
import os
from collections.abc import Callable

from ml_collections import ConfigDict

from tda import methods
from tda.data import corpora, jsonl
from tda.facts import lama
from tda.model import pretrained
from tda.retrieval import dense
from tda.run import defaults, plain_corpus
from tda.runtime.fingerprint import fingerprint, fingerprint_files

# Keys that name documents, several with commas.
_DOCUMENTS = ("data.corpus", "data.also_train_on")


def _files_of(key: str) -> Callable[[ConfigDict], str | None]:
    return lambda config: fingerprint_files(jsonl.expand(defaults.flat(config)[key]))


def _documents_of(key: str) -> Callable[[ConfigDict], str | None]:
    name = key.removeprefix("data.")
    return lambda c: fingerprint_files(plain_corpus.documents_of(c.data, name).files.values())


def _encoder_of(key: str) -> Callable[[ConfigDict], str | None]:
    def digest(config: ConfigDict) -> str | None:
        name = defaults.flat(config)[key]
        # The name of a model on the hub is in the config already.
        return dense.identity(name) if os.path.isdir(name) else None

    return digest


_DIGESTS: dict[str, Callable[[ConfigDict], str | None]] = {
    "data.sentences": _files_of("data.sentences"),
    "data.facts": _files_of("data.facts"),
    "data.queries": _files_of("data.queries"),
    **{key: _documents_of(key) for key in _DOCUMENTS},
    "data.dir": lambda c: fingerprint_files(lama.list_files(c.data.dir)),
    "model.pretrained": lambda c: fingerprint(pretrained.state_of(c.model.pretrained)),
    "dense.model": _encoder_of("dense.model"),
    "judge.model": _encoder_of("judge.model"),
}
# By key, value and the states of the files: all points of a sweep name the same files, and they are
# read once for each state (sizes and times of modification), which is cheap to look up.
_digests: dict[tuple[str, str, str], str | None] = {}


def digests(config: ConfigDict) -> dict[str, str | None]:
    """Returns a digest of the files that each key of a config names, by key.

    The digest is None if the key names no existing file. It depends on the contents alone, so a
    copied or touched file keeps it.
    """
    data = config.data
    names = {key: value for key, value in defaults.flat(config).items() if key in _DIGESTS}
    if not any(m.retriever == "dense" for m in methods.parse(config.methods).values()):
        del names["dense.model"]
    if not config.judge.name:
        del names["judge.model"]
    if data.name != "lama" or data.sentences or data.corpus:
        del names["data.dir"]  # of TFDS, whose datasets have versions
    return {key: _digest(key, name, config) for key, name in names.items() if name}


def differing(before: dict[str, str | None], now: dict[str, str | None]) -> list[str]:
    """Returns the keys whose digests differ; keys without a digest on either side are skipped."""
    return [
        key
        for key, digest in before.items()
        if None not in (digest, now.get(key)) and digest != now[key]
    ]


def _digest(key: str, name: str, config: ConfigDict) -> str | None:
    sources = plain_corpus.sources_of(name) if key in _DOCUMENTS else [name]
    try:
        state = key, name, json.dumps([corpora.describe_files(source) for source in sources])
        if state not in _digests:
            _digests[state] = _DIGESTS[key](config)
        return _digests[state]
    except (OSError, pretrained.PretrainedError):
        return None
