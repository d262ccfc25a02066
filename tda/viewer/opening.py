"""Opens the files that the viewer's flags name, and serves them."""

import contextlib
import json
import os
import pathlib
import re
import tempfile

import uvicorn

from tda.runtime import progress
from tda.runtime.command import of_main
from tda.viewer import download
from tda.viewer.collection import Collection
from tda.viewer.notes import Notes
from tda.viewer.results_file import open_unpacked
from tda.viewer.server import UPLOAD_LIMIT, create_app


def collect(
    workdir: str | None, results: list[str], notes: str | None, folder: str, queries: int = 0
) -> Collection:
    """Opens a run's directory, results and notes: everything that the flags name.

    Args:
        workdir, notes: paths, or None.
        results: paths or URLs, each optionally preceded by `LABEL=`.
        folder: the folder for downloads and shortened files.
        queries: how many queries of each file to show, evenly spaced; 0 for all.

    Raises:
        ValueError, OSError: there is nothing to show, or a file cannot be read.
    """
    sources = [_named(r) for r in results]
    if workdir is not None:
        if not pathlib.Path(workdir).is_dir():
            raise ValueError(f"--workdir={workdir} is not a directory; give that of a run")
        if notes is None:
            notes = str(pathlib.Path(workdir) / "notes.jsonl")
        if not sources:
            paths = [*_results_of(workdir), *_answers_of(workdir)]
            # A bank has its methods' passages in its own folder.
            paths = paths or _results_of(os.path.join(workdir, "counterfactual"))
            sources = [("", str(p)) for p in paths]
            if not sources and not (pathlib.Path(workdir) / "board.json").is_file():
                raise ValueError(
                    f"{workdir} holds no results: finish its run ({of_main('trace')}), ask a "
                    f"question ({of_main('ask')}), or name files with --results"
                )
    if not sources and workdir is None:
        raise ValueError("nothing to show: give --workdir=DIR or --results=FILE,FILE")
    collection = Collection(workdir, None if notes is None else Notes(notes))
    for label, name in sources:
        path = _fetched(name, folder) if download.is_url(name) else name
        path = _shortened(path, queries, folder) if queries else path
        size = pathlib.Path(path).stat().st_size
        is_small = size < 64 << 20
        with progress.hidden(is_small), progress.bar(size, f"open {name}", "B") as bar:
            collection.add(path, label, on_bytes=bar.update)
    return collection


def _named(text: str) -> tuple[str, str]:
    label, equals, path = text.partition("=")
    return (label, path) if equals and label.replace("_", "").isalnum() else ("", text)


def _results_of(workdir: str) -> list[pathlib.Path]:
    """Returns the results of a run's last evaluation, in the config's order of methods.

    Raises:
        ValueError: the last evaluation did not finish.
    """
    path = pathlib.Path(workdir)
    files = list((path / "results").glob("*.jsonl"))
    if files and not (path / "metrics.json").exists():
        raise ValueError(
            f"{workdir} has results but no metrics.json: the evaluation did not finish, and they "
            "may be of different runs; run the same command again, or name files with --results"
        )
    measured = _read_metrics(path / "metrics.json") if files else {}
    # Results of an earlier evaluation may have other queries, or another model.
    outdated = sorted(p.name for p in files if p.stem not in measured)
    if outdated:
        print(
            f"left out: {', '.join(outdated)} in {workdir}/results, from an earlier evaluation; to "
            "show them, name them with --results=FILE,FILE"
        )
    shown = {p.stem: p for p in files}
    return [shown[name] for name in measured if name in shown]


def _read_metrics(path: pathlib.Path) -> dict:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{path} is damaged ({error}); run the same command again, which writes it anew, or "
            "name files with --results"
        ) from error


def _answers_of(workdir: str) -> list[pathlib.Path]:
    """Returns what `experiments.ask` wrote: results.jsonl, results-2.jsonl, …, in this order."""
    numbered = {
        int(match[1] or 1): path
        for path in pathlib.Path(workdir).glob("results*.jsonl")
        if (match := re.fullmatch(r"results(?:-(\d+))?\.jsonl", path.name))
    }
    return [path for _, path in sorted(numbered.items())]


def _shortened(path: str, queries: int, folder: str) -> str:
    """Returns a file with some lines of a results file, evenly spaced, under the same name."""
    with open_unpacked(str(path)) as file:
        lines = [line for line in file if line.strip()]
    out = pathlib.Path(tempfile.mkdtemp(dir=folder)) / pathlib.Path(path).name.removesuffix(".gz")
    count = min(queries, len(lines))
    out.write_bytes(b"".join(lines[i * len(lines) // count] for i in range(count)))
    return str(out)


def _fetched(url: str, folder: str) -> str:
    with progress.bar(0, f"fetch {url}", "B") as bar:

        def on_bytes(done: int, total: int) -> None:
            bar.total = total or None
            bar.update(done - bar.n)

        own_folder = tempfile.mkdtemp(dir=folder)
        return download.fetch(url, own_folder, UPLOAD_LIMIT, on_bytes)


def serve(
    collection: Collection, answers, host: str, port: int, names: list[str], allow_urls: bool
) -> None:
    """Serves until interrupted; prints the address once it answers."""
    hosts = ("127.0.0.1", "localhost", "::1", host, *names)
    application = create_app(collection, answers, hosts, allow_urls)
    # Without a limit the server would wait at its end for connections that browsers keep open.
    config = uvicorn.Config(
        application, host=host, port=port, log_level="warning", timeout_graceful_shutdown=1
    )
    server = uvicorn.Server(config)
    # Bound before the server runs: port 0 stands for a free port, which the address must name.
    socket = config.bind_socket()
    # Requests that come before the server runs wait in the socket's queue.
    socket.listen()
    bound = socket.getsockname()[1]
    shown = f"[{host}]" if ":" in host else host
    count = sum(len(f) for f in collection.files)
    print(f"{count:,} records of {len(collection.files)} files")
    if host not in ("127.0.0.1", "localhost", "::1"):
        print(f"served on {host}: whoever can reach it can read everything and write notes")
    print(f"viewer at http://{shown}:{bound}/  (Ctrl-C ends it)", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        server.run(sockets=[socket])
