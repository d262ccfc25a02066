"""The points of a sweep: which are finished, how they are run, and what they share."""

import contextlib
import json
import pathlib
import subprocess
import time
from collections.abc import Callable
from typing import Any

import filelock
import jax

from tda.gradients import projection as projections
from tda.methods import GradientKind
from tda.model import functional
from tda.reports import plots
from tda.run import corpus, evaluate, measures, retrieve, stages, train
from tda.run.run import Run
from tda.run.workdir import Workdir
from tda.runtime import progress
from tda.runtime.atomic_file import write_json
from tda.runtime.fingerprint import fingerprint, plain
from tda.sweep import digests
from tda.sweep.grid import Point

# The command line that runs a point alone.
Command = Callable[[Point], list[str]]


def check(point: Point) -> None:
    """Tells before any point's work what is wrong with one."""
    try:
        # To load a sentence encoder is the point's own work.
        stages.check(point.config, encoder=False)
    except ValueError as error:
        raise ValueError(f"point {point.name}: {error}") from error


def check_plots() -> None:
    """Tells before hours of work, not after, that plots cannot be drawn."""
    try:
        plots.check()
    except ImportError as error:
        raise ValueError(f"{error}, or run with --noplots") from error


def _made_from(point: Point) -> dict:
    return plain({"config": point.config.to_dict()})


def _stamp(point: Point, directory: pathlib.Path) -> dict | None:
    """What a point left when it was run from just this config; None where it did not."""
    stamp = directory / "points" / point.name / "point.json"
    if not stamp.exists():
        return None
    told = json.loads(stamp.read_text(encoding="utf-8"))
    return told if told["made_from"] == _made_from(point) else None


def _changed(point: Point, told: dict) -> list[str]:
    """The keys whose files are others than those that a point was run from."""
    # Points of older versions do not say what they were run from.
    return digests.differing(
        told.get("made_of", {}).get("files", {}), digests.digests(point.config)
    )


def is_finished(point: Point, directory: pathlib.Path) -> bool:
    """Whether a point was run from just this config, and from the files that it names now."""
    told = _stamp(point, directory)
    return told is not None and not _changed(point, told)


def check_alike(points: list[Point], directory: pathlib.Path) -> None:
    """Nothing, where points whose configs name the same were made of the same.

    Raises:
        ValueError: two were not; they cannot be compared with files that are gone.
    """
    first: dict[tuple[str, str], tuple[str, Any]] = {}
    for point in points:
        made_of = (_stamp(point, directory) or {}).get("made_of")
        for what, named, value in _named(point, made_of) if made_of else ():
            name, there = first.setdefault((what, named), (point.name, value))
            if there != value:
                raise ValueError(
                    f"points {name} and {point.name} were run from different contents of {what}, "
                    f"and their figures do not belong together; remove {directory}/points/POINT/"
                    "point.json of the one that is to be run anew, and run the same command again"
                )


def _named(point: Point, made_of: dict) -> list[tuple[str, str, Any]]:
    """What a point was made of: what it is, by which name, and what tells its contents."""
    c = point.config
    files = [(k, c[k.split(".")[0]][k.split(".")[1]], x) for k, x in made_of["files"].items() if x]
    text = plain([c.data.to_dict(), c.tokenizer.to_dict(), c.model.context, c.model.pretrained])
    return [
        *files,
        ("the corpus", fingerprint(text), made_of["corpus"]),
        ("the training", point.training, made_of["training"]),
    ]


def read(points: list[Point], directory: pathlib.Path) -> list[tuple[Point, dict, dict]]:
    """Each point with its metrics and what is told of it."""
    out = []
    for point in points:
        own = directory / "points" / point.name
        metrics, told = (
            json.loads((own / name).read_text(encoding="utf-8"))
            for name in ("metrics.json", "point.json")
        )
        out.append((point, metrics, told["about"]))
    return out


def run_all(
    points: list[Point],
    directory: pathlib.Path,
    parallel: int,
    command: Command,
) -> dict[str, str]:
    """Runs every point that is not finished, `parallel` at a time.

    Args:
        points: of the sweep.
        directory: the sweep's.
        parallel: how many processes run at a time.
        command: the command line that runs a point.

    Returns:
        By the names of the points that failed, why.
    """
    waiting = [p for p in points if not is_finished(p, directory)]
    for point in waiting:
        if told := _stamp(point, directory):
            others = " and ".join(_changed(point, told))
            print(f"{point.name} was run from another {others}; it is run anew", flush=True)
    running: dict[str, tuple[Point, subprocess.Popen]] = {}
    failed: dict[str, str] = {}
    with progress.bar(len(points), "sweep", "point", len(points) - len(waiting)) as bar:
        try:
            while waiting or running:
                while waiting and len(running) < parallel:
                    point = _next(waiting, [p for p, _ in running.values()], directory)
                    waiting.remove(point)
                    running[point.name] = point, _start(point, directory, command)
                for name, (_, process) in list(running.items()):
                    if process.poll() is not None:
                        del running[name]
                        bar.update(1)
                        if process.returncode:
                            log = directory / "points" / name / "log.txt"
                            failed[name] = _why(log, process.returncode)
                time.sleep(0.05)
        finally:
            for _, process in running.values():
                process.terminate()
    return failed


def _next(waiting: list[Point], running: list[Point], directory: pathlib.Path) -> Point:
    """The point to start: one that need not wait for what another is making, if there is one."""
    files = {p.name: digests.digests(p.config) for p in (*waiting, *running)}
    for attribute in ("training", "stores"):
        made = {_marker(p, attribute, files[p.name]) for p in running} - {
            m.name for m in (directory / "runs").glob(f"*/*.{attribute}")
        }
        free = [p for p in waiting if _marker(p, attribute, files[p.name]) not in made]
        waiting = free or waiting
    return waiting[0]


def _marker(point: Point, attribute: str, files: dict) -> str:
    """The file that says that what points share, their "training" or "stores", is made.

    It says so of the contents with these digests alone.
    """
    return f"{getattr(point, attribute)}-{fingerprint(plain(files))}.{attribute}"


def _start(point: Point, directory: pathlib.Path, command: Command) -> subprocess.Popen:
    own = directory / "points" / point.name
    own.mkdir(parents=True, exist_ok=True)
    with open(own / "log.txt", "w", encoding="utf-8") as log:
        return subprocess.Popen(command(point), stdout=log, stderr=subprocess.STDOUT, text=True)


def _why(log: pathlib.Path, code: int) -> str:
    """Why a process ended: the signal that killed it, or the line of its log that tells."""
    if code < 0:
        return f"killed by signal {-code} ({log})"
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    told = [line for line in lines if line.startswith("error")] or lines[-1:]
    return f"{told[-1] if told else f'exit status {code}'} ({log})"


def run_point(point: Point, directory: pathlib.Path) -> None:
    """Traces one point; what it shares with others is made by one of them, the rest wait."""
    own = directory / "points" / point.name
    own.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(own / "lock"):
        if is_finished(point, directory):
            return
        config = point.config
        stages.check(config)
        # Before they are read: what changes meanwhile is another file afterwards.
        files = digests.digests(config)
        shared = Workdir(directory / "runs" / point.training)
        with _once(shared / _marker(point, "training", files), shared / "training.lock"):
            data = corpus.load(config, shared)
            run = Run(config, shared, data, train.train(config, data, shared))
        measures.check_step(run)
        with _once(shared / _marker(point, "stores", files), shared / f"{point.encoding}.lock"):
            rankings, notes = retrieve.retrieve(run)
        # What was measured before is finished no more once its figures are written over.
        (own / "point.json").unlink(missing_ok=True)
        evaluate.evaluate(run, rankings, own)
        about = _about(run) | {"notes": notes}
        made_of = {"files": files, "corpus": data.fingerprint}
        made_of["training"] = fingerprint(plain(run.trained.fingerprint))
        told = {"made_from": _made_from(point), "made_of": made_of, "about": about}
        write_json(own / "point.json", told)


@contextlib.contextmanager
def _once(marker: pathlib.Path, lock_file: pathlib.Path):
    """Lets one process at a time in, until one has come through; then all at once."""
    if not marker.exists():
        lock = filelock.FileLock(lock_file)
        try:
            lock.acquire(blocking=False)
        except filelock.Timeout:
            print(f"another point makes {marker}; waiting for it", flush=True)
            lock.acquire()
        try:
            if not marker.exists():
                yield
                marker.touch()
                return
        finally:
            lock.release()
    yield


def _about(run: Run) -> dict:
    """The figures of a point that a plot may have on its x axis, beside the swept keys."""
    trained, kind = run.trained, GradientKind()
    layout = projections.layout(run.sites(kind), run.projection(kind))
    _, params = functional.split(trained.model)
    # A pretrained model may be traced as it is, without a step.
    share = trained.step / max(1, trained.fingerprint["steps"])
    return {
        "parameters": sum(x.size for x in jax.tree.leaves(params)),
        "dimensions": layout.width,
        "training_tokens": round(
            float(run.config.train.epochs) * share * int(run.corpus.training.scored.sum())
        ),
        "training_step": trained.step,
    }
