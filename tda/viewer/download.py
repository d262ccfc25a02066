"""Downloads a results file from a URL."""

import http.client
import os
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator

from tda.runtime import atomic_file

_PART = 1 << 20


def is_url(name: str) -> bool:
    """Returns whether `name` is a URL, not a path."""
    return urllib.parse.urlsplit(name).scheme in ("http", "https")


def fetch(
    url: str,
    folder: str,
    limit: int,
    on_bytes: Callable[[int, int], None] = lambda done, total: None,
) -> str:
    """Downloads a results file into a folder, named by the URL's last part; returns its path.

    The file is written atomically, with at most `limit` bytes; `on_bytes` is called with the bytes
    so far and in all (0: unknown).

    Raises:
        ValueError: the URL has another scheme, or the file is too large.
        OSError: the download fails or ends early.
    """
    if not is_url(url):
        raise ValueError(f"{url!r} is not an http or https URL")
    name = os.path.basename(urllib.parse.urlsplit(url).path) or "results.jsonl"
    path = os.path.join(folder, name)
    try:
        # Seconds without a byte, not of the whole download.
        with urllib.request.urlopen(url, timeout=60) as response:
            if urllib.parse.urlsplit(response.url).scheme not in ("http", "https"):
                raise ValueError(f"{url} redirects to {response.url}, which is not http or https")
            # The length of a chunked body is unknown, whatever the header says.
            total, done = response.length or 0, 0
            with atomic_file.open_atomic(path, "wb") as out:
                for part in _parts(response, url, total):
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


def _parts(response: http.client.HTTPResponse, url: str, total: int) -> Iterator[bytes]:
    """Yields a response's bytes in parts; raises OSError if it ends early."""
    done, cause = 0, None
    try:
        # read1 returns bytes as they arrive: a failed larger read would lose count of them.
        while part := response.read1(_PART):
            done += len(part)
            yield part
    except (http.client.HTTPException, OSError) as error:
        cause = error
    # A connection that closes early looks like the end of the file.
    if cause is not None or done < total:
        of = f" of {total:,}" if total else ""
        raise OSError(f"{url} broke off after {done:,}{of} bytes; fetch it again") from cause
