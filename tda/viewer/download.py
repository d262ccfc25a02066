"""Fetching a results file from an address."""

import os
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable

_PART = 1 << 20


def is_url(name: str) -> bool:
    """Whether `name` is an address and not a path."""
    return urllib.parse.urlsplit(name).scheme in ("http", "https")


def fetch(
    url: str,
    folder: str,
    limit: int,
    on_bytes: Callable[[int, int], None] = lambda done, total: None,
) -> str:
    """Fetches a results file into a folder; returns its path.

    Args:
        url: http or https.
        folder: where to put it, under the address's last name.
        limit: bytes that it may have.
        on_bytes: told bytes fetched and bytes in all (0: unknown).

    Raises:
        ValueError: not such an address, or the file is too large.
        OSError: it cannot be fetched.
    """
    if not is_url(url):
        raise ValueError(f"{url!r} is no http or https address")
    name = os.path.basename(urllib.parse.urlsplit(url).path) or "results.jsonl"
    path = os.path.join(folder, name)
    try:
        with urllib.request.urlopen(url, timeout=60) as found, open(f"{path}.part", "wb") as out:
            if urllib.parse.urlsplit(found.url).scheme not in ("http", "https"):
                raise ValueError(f"{url} leads to {found.url}, which is not fetched")
            total, done = int(found.headers.get("content-length") or 0), 0
            while part := found.read(_PART):
                done += len(part)
                if done > limit:
                    raise ValueError(f"{url} has more than {limit:,} bytes")
                out.write(part)
                on_bytes(done, total)
    except urllib.error.URLError as error:
        raise OSError(f"cannot fetch {url}: {error.reason}") from error
    os.replace(f"{path}.part", path)
    return path
