"""Digests of the files that a run reads from outside its workdir."""

import functools
import json
import os

from tda import methods
from tda.data import corpora, jsonl
from tda.model import pretrained
from tda.retrieval import dense
from tda.runtime.fingerprint import fingerprint, fingerprint_files


def digests(config) -> dict[str, str | None]:
    """Returns a digest of the files that each key of a config names, by key.

    The digest is None if the key names no file that exists now. A copied or touched file keeps its
    digest, which depends on the contents alone.
    """
    data = config.data
    uses_encoder = any(m.retriever == "dense" for m in methods.parse(config.methods).values())
    sources = {
        "data.sentences": (data.sentences, _digest_files),
        "data.facts": (data.facts, _digest_files),
        "model.pretrained": (config.model.pretrained, _digest_model),
        "dense.model": (config.dense.model if uses_encoder else "", _digest_encoder),
    }
    return {key: _digest(function, name) for key, (name, function) in sources.items() if name}


def differing(before: dict[str, str | None], now: dict[str, str | None]) -> list[str]:
    """Returns the keys whose digests differ; keys without a digest on either side are skipped."""
    return [
        key
        for key, digest in before.items()
        if None not in (digest, now.get(key)) and digest != now[key]
    ]


def _digest(function, name: str) -> str | None:
    try:
        return _cached_digest(function, name, json.dumps(corpora.describe_files(name)))
    except (OSError, pretrained.PretrainedError):
        return None


@functools.cache
def _cached_digest(function, name: str, state: str) -> str | None:
    # All points of a sweep name the same files. They are read once for each `state` (sizes and
    # times of modification), which is cheap to look up.
    return function(name)


def _digest_files(name: str) -> str:
    return fingerprint_files(jsonl.expand(name))


def _digest_model(name: str) -> str:
    return fingerprint(pretrained.state_of(name))


def _digest_encoder(name: str) -> str | None:
    # The name of a model on the hub is in the config already.
    return dense.identity(name) if os.path.isdir(name) else None
