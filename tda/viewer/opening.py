"""Opening the viewer: which results are shown, and the server that shows them."""

import contextlib
import json
import pathlib
import tempfile

import uvicorn

from tda.runtime import progress
from tda.viewer import download
from tda.viewer.collection import Collection
from tda.viewer.notes import Notes
from tda.viewer.server import UPLOAD_LIMIT, create_app


def collect(workdir: str | None, results: list[str], notes: str | None, folder: str) -> Collection:
    """Everything that the flags name, opened.

    Args:
        workdir: a run's directory, or None.
        results: paths or addresses, each maybe behind `LABEL=`.
        notes: file of notes, or None.
        folder: where downloads go.

    Raises:
        ValueError, OSError: there is nothing to show, or something of it cannot be read.
    """
    found = [_named(r) for r in results]
    if workdir is not None:
        if not pathlib.Path(workdir).is_dir():
            raise ValueError(f"--workdir={workdir} is no directory")
        if notes is None:
            notes = str(pathlib.Path(workdir) / "notes.jsonl")
        if not found:
            found = [("", str(p)) for p in _results_of(workdir)]
            if not found:
                raise ValueError(
                    f"{workdir}/results has no .jsonl file: finish the run "
                    "(python -m experiments.trace), or name files with --results"
                )
    if not found:
        raise ValueError("nothing to show: give --workdir=DIR or --results=FILE,FILE")
    collection = Collection(workdir, None if notes is None else Notes(notes))
    for label, name in found:
        path = _fetched(name, folder) if download.is_url(name) else name
        size = pathlib.Path(path).stat().st_size
        with progress.bar(size, f"open {name}", "B", quiet=size < 64 << 20) as bar:
            collection.add(path, label, on_bytes=bar.update)
    return collection


def _named(text: str) -> tuple[str, str]:
    label, equals, path = text.partition("=")
    return (label, path) if equals and label.replace("_", "").isalnum() else ("", text)


def _results_of(workdir: str) -> list[pathlib.Path]:
    """The results of a run's last evaluation, in the order that its config names the methods in.

    Raises:
        ValueError: an evaluation was begun and did not end.
    """
    path = pathlib.Path(workdir)
    files = list((path / "results").glob("*.jsonl"))
    if files and not (path / "metrics.json").exists():
        raise ValueError(
            f"{workdir} has results and no metrics.json: its evaluation did not end, and which run "
            "they are of is not known; run the same command again, or name files with --results"
        )
    measured = json.loads((path / "metrics.json").read_text(encoding="utf-8")) if files else {}
    # Another evaluation asked other queries perhaps, or another model.
    others = sorted(p.name for p in files if p.stem not in measured)
    if others:
        print(
            f"left out, for they are not of the last evaluation: {', '.join(others)} in {workdir}/"
            "results; --results=FILE,FILE shows the files that it names"
        )
    shown = {p.stem: p for p in files}
    return [shown[name] for name in measured if name in shown]


def _fetched(url: str, folder: str) -> str:
    with progress.bar(0, f"fetch {url}", "B") as bar:

        def on_bytes(done: int, total: int) -> None:
            bar.total = total or None
            bar.update(done - bar.n)

        own = tempfile.mkdtemp(dir=folder)
        return download.fetch(url, own, UPLOAD_LIMIT, on_bytes)


def serve(
    collection: Collection, answers, host: str, port: int, names: list[str], allow_urls: bool
) -> None:
    """Serves until it is interrupted; prints the address when it answers."""
    hosts = ("127.0.0.1", "localhost", "::1", host, *names)
    application = create_app(collection, answers, hosts, allow_urls)
    config = uvicorn.Config(
        application, host=host, port=port, log_level="warning", timeout_graceful_shutdown=1
    )
    server = uvicorn.Server(config)
    socket = config.bind_socket()
    socket.listen()  # who asks before the server runs is answered when it does
    bound = socket.getsockname()[1]
    shown = f"[{host}]" if ":" in host else host
    count = sum(len(f) for f in collection.files)
    print(f"{count:,} records of {len(collection.files)} files")
    if host not in ("127.0.0.1", "localhost", "::1"):
        print(f"served on {host}: whoever reaches it reads all, and may write notes")
    print(f"viewer at http://{shown}:{bound}/  (Ctrl-C ends it)", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        server.run(sockets=[socket])
