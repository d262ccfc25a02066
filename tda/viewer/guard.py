"""Protects a viewer from other pages: response headers, a check of the host, a token for writes.

Corpus text may contain anything. It is shown as text, and the page may run only the package's own
scripts. Other sites that are open in the browser can neither read nor write here.
"""

import hmac

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'"
)
HEADERS = {
    "content-security-policy": POLICY,
    # No guessing of a file's type by its contents, which may be anyone's.
    "x-content-type-options": "nosniff",
    # A link in a passage does not tell its target where the viewer runs.
    "referrer-policy": "no-referrer",
    # Other sites can neither embed an answer nor hold on to the viewer's window.
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    # Browsers that do not know `frame-ancestors`.
    "x-frame-options": "DENY",
    # A browser's cache would keep texts after the viewer has ended.
    "cache-control": "no-store",
}
TOKEN_HEADER = "x-viewer-token"


class Guard:
    """Wraps an application and refuses requests that do not come from its own page.

    Every request must name a served host, so that a foreign name that an attacker makes resolve to
    this machine (DNS rebinding) is refused. Writes must come from the same origin, with the token
    that the page was served with.

    Args:
        app: the application.
        hosts: host names of the viewer, without port.
        token: the token.
    """

    def __init__(self, app, hosts: tuple[str, ...], token: str):
        self._app, self._hosts, self._token = app, {h.lower() for h in hosts}, token

    async def __call__(self, scope, receive, send):
        """Serves one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def with_headers(message):
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        refusal = self._refusal(scope)
        app = self._app if refusal is None else JSONResponse({"error": refusal}, 403)
        await app(scope, receive, with_headers)

    def _refusal(self, scope) -> str | None:
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if _without_port(host) not in self._hosts:
            return f"this viewer does not answer to the name {host!r}; add it with --names"
        if headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
            # A link from elsewhere may open the page, and nothing else.
            if headers.get("sec-fetch-mode") != "navigate" or scope["path"] != "/":
                return "only the viewer's own page may ask for this"
        if scope["method"] in ("GET", "HEAD"):
            return None
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2].lower() != host.lower():
            return f"writes from {origin} are refused"
        if not hmac.compare_digest(headers.get(TOKEN_HEADER, "").encode(), self._token.encode()):
            return "the page is of an earlier start of the viewer; reload it"
        return None


def _without_port(host: str) -> str:
    host = host.lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rpartition(":")[0] if ":" in host else host
