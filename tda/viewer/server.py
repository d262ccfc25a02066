"""The viewer's server: the page, pieces of data, notes, uploads, and live tracing."""

import functools
import importlib.resources
import json
import os
import secrets
import tempfile
from collections.abc import Callable
from typing import Protocol

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from tda.data.rows import Question
from tda.viewer import download
from tda.viewer.collection import Collection
from tda.viewer.guard import Guard
from tda.viewer.jobs import Jobs
from tda.viewer.results_file import to_json

_BODY_LIMIT = 1 << 20
# Bytes of an upload at most, and of a download.
UPLOAD_LIMIT = 4 << 30
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
}
# An SVG that is opened as a page of its own could run scripts; a workdir may hold anyone's files.
_PLOT_POLICY = {"content-security-policy": "default-src 'none'; style-src 'unsafe-inline'"}


class Live(Protocol):
    """Answers live questions.

    Each method calls `progress(work, done, total)` as it advances and returns JSON values. Invalid
    input raises a ValueError.

    Attributes:
        heat_methods: names of the methods whose scores `heat` can split.
    """

    heat_methods: tuple[str, ...]

    def describe(self, progress: Callable) -> dict:
        """Opens the model and its stores; returns the methods and the sizes of model and corpus."""

    def complete(self, progress: Callable, prompt: str, tokens: int) -> dict:
        """Returns the model's own completion of a prompt, and whole words that it may say."""

    def trace(self, progress: Callable, query: Question, methods: list[str], k: int) -> dict:
        """Returns the passages of each method, as results records."""

    def context(self, progress: Callable, passage: str) -> dict:
        """Returns the texts before and after a passage in its document."""

    def heat(self, progress: Callable, query: Question, method: str, passage: str) -> dict:
        """Returns the share of a passage's score that each of its positions carries."""


def static_files() -> dict[str, bytes]:
    """Returns the page's static files by name."""
    folder = importlib.resources.files("tda.viewer") / "static"
    files = {f.name: f.read_bytes() for f in folder.iterdir()}
    return {n: f for n, f in files.items() if os.path.splitext(n)[1] in _TYPES}


def create_app(
    collection: Collection,
    live: Live | None = None,
    hosts: tuple[str, ...] = ("127.0.0.1", "localhost", "::1"),
    allow_urls: bool = False,
):
    """Returns the viewer as an ASGI application.

    Args:
        collection: the results to show.
        live: answers live questions; None if there is no model to ask.
        hosts: host names of the viewer; requests under other names are refused.
        allow_urls: whether the page may fetch results from a URL; otherwise no request leaves the
            machine.
    """
    return _App(collection, live, hosts, allow_urls).asgi()


class _App:
    def __init__(self, collection, live, hosts, allow_urls):
        self._collection, self._live = collection, live
        self._hosts, self._allow_urls = hosts, allow_urls
        # 192 random bits, which nobody can guess.
        self._token = secrets.token_urlsafe(24)
        self._static = static_files()
        self._jobs = Jobs()

    def asgi(self):
        post = dict(methods=["POST"])
        routes = [
            Route("/", self._page),
            Route("/static/{name}", self._static_file),
            Route("/data/{name:path}.json", self._piece),
            Route("/plots/{name}", self._plot),
            Route("/api/notes", self._note, **post),
            Route("/api/upload", self._upload, **post),
            Route("/api/open", self._open, **post),
            Route("/api/live/{action}", self._live_job, **post),
            Route("/api/jobs/{number:int}", self._job, methods=["GET", "DELETE"]),
        ]
        app = Starlette(
            routes=routes,
            exception_handlers={HTTPException: _error_response},
            middleware=[
                Middleware(Guard, hosts=self._hosts, token=self._token),
                Middleware(GZipMiddleware, minimum_size=4096, compresslevel=1),
            ],
        )
        app.state.jobs = self._jobs
        return app

    async def _page(self, request: Request) -> Response:
        page = self._static["index.html"].decode()
        return Response(
            page.replace('data-token=""', f'data-token="{self._token}"', 1),
            media_type=_TYPES[".html"],
        )

    async def _static_file(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name not in self._static:
            raise HTTPException(404, f"there is no {name}")
        kind = _TYPES[os.path.splitext(name)[1]]
        headers = {"cache-control": "private, max-age=60"}
        return Response(self._static[name], media_type=kind, headers=headers)

    async def _piece(self, request: Request) -> Response:
        name = request.path_params["name"]
        # Another page may have read the index since, which reopens changed files.
        if not self._collection.digests().issuperset(request.query_params.getlist("digest")):
            raise HTTPException(409, "the results have changed; reload the page")

        def make() -> bytes:
            if name != "index":
                return to_json(self._collection.piece(name))
            self._collection.refresh()
            abilities = {
                "live": self._live is not None,
                "heat_methods": [] if self._live is None else list(self._live.heat_methods),
                "upload": True,
                "urls": self._allow_urls,
            }
            return to_json(self._collection.index() | abilities)

        try:
            body = await run_in_threadpool(make)
        except KeyError as error:
            raise HTTPException(404, f"there are no data {name!r}") from error
        return Response(body, media_type="application/json")

    async def _plot(self, request: Request) -> Response:
        try:
            path = self._collection.plot(request.path_params["name"])
        except KeyError as error:
            raise HTTPException(404, "there is no such plot") from error
        return FileResponse(path, media_type=_TYPES[path.suffix], headers=_PLOT_POLICY)

    async def _note(self, request: Request) -> Response:
        body = await _body(request)
        notes = self._collection.notes
        if notes is None:
            raise HTTPException(
                409, "notes need a file: start the viewer with --workdir or --notes"
            )
        await _run(notes.add, body)
        piece = await run_in_threadpool(self._collection.piece, "notes")
        return Response(to_json(piece), media_type="application/json")

    async def _upload(self, request: Request) -> Response:
        name = os.path.basename(request.query_params.get("name", "")) or "upload.jsonl"
        # The browser chooses the name, so no path is made of it; its ending says if it is packed.
        suffix = ".jsonl.gz" if name.endswith(".gz") else ".jsonl"
        with tempfile.NamedTemporaryFile(suffix=suffix) as upload:
            size = 0
            try:
                async for part in request.stream():
                    size += len(part)
                    if size > UPLOAD_LIMIT:
                        raise HTTPException(413, f"the file is larger than {UPLOAD_LIMIT:,} bytes")
                    await run_in_threadpool(upload.write, part)
            except ClientDisconnect as error:
                raise HTTPException(400, "the upload was broken off") from error
            upload.flush()
            label = name.split(".")[0]
            return await self._added(upload.name, label)

    async def _open(self, request: Request) -> Response:
        body = await _body(request)
        if not self._allow_urls:
            raise HTTPException(403, "start the viewer with --allow_urls to open URLs")
        url = _text(body, "url")
        with tempfile.TemporaryDirectory() as folder:
            path = await _run(download.fetch, url, folder, UPLOAD_LIMIT)
            return await self._added(path, "")

    async def _added(self, path: str, label: str) -> Response:
        label = "".join(c if c.isalnum() else "_" for c in label)[:80].strip("_")
        file = await _run(self._collection.add, path, label)
        return JSONResponse({"label": file.label})

    async def _live_job(self, request: Request) -> Response:
        body, live = await _body(request), self._live
        if live is None:
            raise HTTPException(409, "there is no model to ask: start the viewer with --workdir")
        action = request.path_params["action"]
        if action not in _LIVE_ARGUMENTS:
            raise HTTPException(404, f"there is no {action}; use {', '.join(_LIVE_ARGUMENTS)}")
        arguments = [read(body, name) for name, read in _LIVE_ARGUMENTS[action].items()]
        job = self._jobs.start(lambda progress: getattr(live, action)(progress, *arguments))
        return JSONResponse(job.describe())

    async def _job(self, request: Request) -> Response:
        number = request.path_params["number"]
        try:
            act = self._jobs.cancel if request.method == "DELETE" else self._jobs.get
            return Response(to_json(act(number).describe()), media_type="application/json")
        except KeyError as error:
            raise HTTPException(404, f"there is no job {number}; ask again") from error


async def _error_response(request: Request, error: HTTPException) -> Response:
    return JSONResponse({"error": error.detail}, error.status_code)


async def _run(call, *arguments):
    """Runs a call in a thread; its error becomes an answer to the page."""
    try:
        return await run_in_threadpool(call, *arguments)
    except (ValueError, OSError) as error:
        raise HTTPException(400, str(error)) from error


async def _body(request: Request) -> dict:
    # Another site's page can post a form without asking; for JSON the browser asks here first.
    if request.headers.get("content-type", "").partition(";")[0] != "application/json":
        raise HTTPException(415, "send application/json")
    raw = b""
    async for part in request.stream():
        raw += part
        if len(raw) > _BODY_LIMIT:
            raise HTTPException(413, f"more than {_BODY_LIMIT:,} bytes")
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, f"not JSON: {error}") from error
    if not isinstance(body, dict):
        raise HTTPException(400, "send an object")
    return body


def _text(body: dict, field: str) -> str:
    value = body.get(field)
    if not isinstance(value, str):
        raise HTTPException(400, f"{field!r} must be a text")
    return value


def _texts(body: dict, field: str) -> list[str]:
    values = body.get(field)
    if not isinstance(values, list) or not all(isinstance(v, str) for v in values):
        raise HTTPException(400, f"{field!r} must be a list of names")
    return values


def _integer(body: dict, field: str, most: int) -> int:
    value = body.get(field)
    # bool is an int in Python.
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise HTTPException(400, f"{field!r} must be a whole number from 1 to {most}")
    return value


def _query(body: dict, field: str) -> Question:
    """Reads a question: its texts, and its tokens if the model itself produced it."""
    value = body.get(field)
    if not isinstance(value, dict):
        raise HTTPException(400, f"{field!r} must be an object")
    tokens = value.get("tokens")
    if tokens is not None:
        is_pair = isinstance(tokens, list) and len(tokens) == 2
        if not is_pair or not all(isinstance(part, list) for part in tokens):
            raise HTTPException(400, "'tokens' must be the ids of prompt and target")
        if not all(type(i) is int for part in tokens for i in part):
            raise HTTPException(400, "'tokens' must hold whole numbers")
        tokens = tuple(map(tuple, tokens))
    texts = _text(value, "prompt"), _text(value, "target")
    contrast = _text(value, "contrast") if "contrast" in value else ""
    return Question("question", *texts, tokens, contrast.strip())


# The arguments of each method of `Live`, in order, and the function that reads each from a request.
_LIVE_ARGUMENTS: dict[str, dict[str, Callable]] = {
    "describe": {},
    "complete": {"prompt": _text, "tokens": functools.partial(_integer, most=64)},
    "trace": {"query": _query, "methods": _texts, "k": functools.partial(_integer, most=100)},
    "context": {"passage": _text},
    "heat": {"query": _query, "method": _text, "passage": _text},
}
