"""What a run reads from outside its workdir, and digests that tell whether it is still the same."""

import functools
import hashlib
import json
import os

from tda import methods
from tda.data import corpora, jsonl
from tda.model import pretrained
from tda.retrieval import dense
from tda.runtime.fingerprint import fingerprint


def digests(config) -> dict[str, str | None]:
    """A digest of what each key of a config names; None where it is no file that is there now.

    By contents: a file that was copied or touched is the same.
    """
    d, chosen = config.data, methods.parse(config.methods).values()
    encoder = config.dense.model if any(m.retriever == "dense" for m in chosen) else ""
    named = {
        "data.sentences": (d.sentences, _of_files),
        "data.facts": (d.facts, _of_files),
        "model.pretrained": (config.model.pretrained, _of_model),
        "dense.model": (encoder, _of_encoder),
    }
    return {key: _digest(digest, name) for key, (name, digest) in named.items() if name}


def differing(there: dict[str, str | None], now: dict[str, str | None]) -> list[str]:
    """The keys of two `digests` that name other contents; what is not there cannot be compared."""
    both = [k for k, digest in there.items() if None not in (digest, now.get(k))]
    return [k for k in both if there[k] != now[k]]


def _digest(digest, name: str) -> str | None:
    try:
        return _kept(digest, name, json.dumps(corpora.describe_files(name)))
    except (OSError, pretrained.PretrainedError):
        return None


@functools.cache
def _kept(digest, name: str, state: str) -> str | None:
    # The points of a sweep name the same files, which are read once as long as nothing stirs them.
    return digest(name)


def _of_files(name: str) -> str:
    found = hashlib.sha256()
    for file in jsonl.expand(name):
        with open(file, "rb") as opened:
            found.update(hashlib.file_digest(opened, "sha256").digest())
    return found.hexdigest()[:16]


def _of_model(name: str) -> str:
    return fingerprint(pretrained.state_of(name))


def _of_encoder(name: str) -> str | None:
    # A name on the hub tells nothing that the config does not.
    return dense.identity(name) if os.path.isdir(name) else None
