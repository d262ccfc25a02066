"""Fetching a results file from an address."""

import http.client
import os
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator

from tda.runtime import atomic_file

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
    """Fetches a results file into a folder, whole or not at all; returns its path.

    Args:
        url: http or https.
        folder: where to put it, under the address's last name.
        limit: bytes that it may have.
        on_bytes: told bytes fetched and bytes in all (0: unknown).

    Raises:
        ValueError: not such an address, or the file is too large.
        OSError: it cannot be fetched, or breaks off.
    """
    if not is_url(url):
        raise ValueError(f"{url!r} is no http or https address")
    name = os.path.basename(urllib.parse.urlsplit(url).path) or "results.jsonl"
    path = os.path.join(folder, name)
    try:
        with urllib.request.urlopen(url, timeout=60) as found:
            if urllib.parse.urlsplit(found.url).scheme not in ("http", "https"):
                raise ValueError(f"{url} leads to {found.url}, which is not fetched")
            # Of a body in chunks no length is known, whatever the header says.
            total, done = found.length or 0, 0
            with atomic_file.open_atomic(path, "wb") as out:
                for part in _parts(found, url, total):
                    done += len(part)
                    if done > limit:
                        raise ValueError(f"{url} has more than {limit:,} bytes")
                    out.write(part)
                    on_bytes(done, total)
    except urllib.error.URLError as error:
        raise OSError(f"cannot fetch {url}: {error.reason}") from error
    except (http.client.HTTPException, ConnectionError, TimeoutError) as error:
        raise OSError(f"cannot fetch {url}: {error}") from error
    return path


def _parts(found: http.client.HTTPResponse, url: str, total: int) -> Iterator[bytes]:
    """The bytes of an answer in parts; an OSError where they end too early."""
    done, cause = 0, None
    try:
        # As the bytes come: of a larger read that fails, those that came would not be counted.
        while part := found.read1(_PART):
            done += len(part)
            yield part
    except (http.client.HTTPException, OSError) as error:
        cause = error
    # A connection that closes early looks like the end.
    if cause is not None or done < total:
        of = f" of {total:,}" if total else ""
        raise OSError(f"{url} broke off after {done:,}{of} bytes; fetch it again") from cause
