"""Digests of the files that a run reads from outside its workdir."""

import functools
import json
import os
from collections.abc import Callable

from tda import methods
from tda.data import corpora, jsonl
from tda.model import pretrained
from tda.retrieval import dense
from tda.run import defaults
from tda.runtime.fingerprint import fingerprint, fingerprint_files

_DIGESTS: dict[str, Callable[[str], str | None]] = {
    "data.sentences": lambda name: fingerprint_files(jsonl.expand(name)),
    "data.facts": lambda name: fingerprint_files(jsonl.expand(name)),
    "data.queries": lambda name: fingerprint_files(jsonl.expand(name)),
    "data.corpus": lambda name: fingerprint_files(corpora.Corpus(name).files.values()),
    "model.pretrained": lambda name: fingerprint(pretrained.state_of(name)),
    # The name of a model on the hub is in the config already.
    "dense.model": lambda name: dense.identity(name) if os.path.isdir(name) else None,
}


def digests(config) -> dict[str, str | None]:
    """Returns a digest of the files that each key of a config names, by key.

    The digest is None if the key names no existing file. It depends on the contents alone, so a
    copied or touched file keeps it.
    """
    names = {key: value for key, value in defaults.flat(config).items() if key in _DIGESTS}
    if not any(m.retriever == "dense" for m in methods.parse(config.methods).values()):
        del names["dense.model"]
    return {key: _digest(key, name) for key, name in names.items() if name}


def differing(before: dict[str, str | None], now: dict[str, str | None]) -> list[str]:
    """Returns the keys whose digests differ; keys without a digest on either side are skipped."""
    return [
        key
        for key, digest in before.items()
        if None not in (digest, now.get(key)) and digest != now[key]
    ]


def _digest(key: str, name: str) -> str | None:
    try:
        return _cached_digest(key, name, json.dumps(corpora.describe_files(name)))
    except (OSError, pretrained.PretrainedError):
        return None


@functools.cache
def _cached_digest(key: str, name: str, state: str) -> str | None:
    # All points of a sweep name the same files. They are read once for each `state` (sizes and
    # times of modification), which is cheap to look up.
    return _DIGESTS[key](name)
