"""Short hashes of JSON values."""

import hashlib
import json


def plain(value):
    """A value as JSON gives it back, so that it compares equal to what was read."""
    return json.loads(json.dumps(value))


def fingerprint(value) -> str:
    """A short hash of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]
