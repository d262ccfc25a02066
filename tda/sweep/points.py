"""Runs the points of a sweep; points that need the same training or stores share them."""

import contextlib
import dataclasses
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
from tda.run import board, capturing, defaults, evaluate, retrieve, stages, train
from tda.run.run import Run
from tda.run.workdir import Workdir
from tda.runtime import metrics, processes, progress
from tda.runtime.atomic_file import read_json, write_json
from tda.runtime.differences import as_text, differences
from tda.runtime.fingerprint import fingerprint, plain
from tda.sweep import digests
from tda.sweep.grid import Point

# Returns the command line that runs one point alone.
Command = Callable[[Point], list[str]]


def check(point: Point) -> None:
    """Checks a point's config before any point runs.

    Raises:
        ValueError: it is invalid, or a file is missing; the message names the point and the key.
    """
    try:
        # Without the sentence encoder, which the point itself loads.
        _check(point, encoder=False)
    except (ValueError, OSError) as error:
        raise ValueError(f"point {point.name}: {error}") from error


def _check(point: Point, encoder: bool = True) -> None:
    stages.check(point.config, encoder)
    # What a trace ranks by its own training has to keep; a bank's training is run again for it.
    (board if point.is_board else capturing).check(point.config)


def _made_from(point: Point) -> dict:
    config = point.config.to_dict() | {"train": train.options(point.config)}
    del config["metrics"]  # where figures are copied to does not affect them
    return plain({"config": config})


def _stamp(point: Point, directory: pathlib.Path) -> dict | None:
    """Returns the record of a finished point; None if there is none."""
    file = directory / "points" / point.name / "point.json"
    return read_json(file) if file.exists() else None


def _changes(point: Point, stamp: dict) -> list[str]:
    """Describes the keys of the config, and the files, that have changed since a point was run."""
    before, now = stamp["made_from"]["config"], _made_from(point)["config"]
    files = digests.differing(stamp["made_of"]["files"], digests.digests(point.config))
    return [*differences(before, now), *(f"{key}: the contents have changed" for key in files)]


def is_finished(point: Point, directory: pathlib.Path) -> bool:
    """Returns whether a point was run with exactly this config and with the present files."""
    stamp = _stamp(point, directory)
    return stamp is not None and not _changes(point, stamp)


def check_alike(points: list[Point], directory: pathlib.Path) -> None:
    """Checks that inputs with the same name had the same contents at every finished point.

    `is_finished` cannot check this if the files no longer exist.

    Raises:
        ValueError: the contents differed between two points.
    """
    first: dict[tuple[str, str], tuple[str, Any]] = {}
    for point in points:
        stamp = _stamp(point, directory)
        for title, name, contents in _inputs(point, stamp["made_of"]) if stamp else ():
            first_point, first_contents = first.setdefault((title, name), (point.name, contents))
            if first_contents != contents:
                raise ValueError(
                    f"points {first_point} and {point.name} were run from different contents of "
                    f"{title}, so their figures cannot be compared; remove {directory}/points/"
                    "POINT/point.json of the point to run again, and repeat the command"
                )


def _inputs(point: Point, made_of: dict) -> list[tuple[str, str, Any]]:
    """Returns (title, name in the config, digest of the contents) of all inputs of a point."""
    c, values = point.config, defaults.flat(point.config)
    files = [(key, values[key], digest) for key, digest in made_of["files"].items() if digest]
    text = plain([c.data.to_dict(), c.tokenizer.to_dict(), c.model.context, c.model.pretrained])
    return [
        *files,
        ("the corpus", fingerprint(text), made_of["corpus"]),
        ("the training", point.training, made_of["training"]),
    ]


def read(points: list[Point], directory: pathlib.Path) -> list[tuple[Point, dict, dict]]:
    """Returns (point, its metrics, a description of its run) for each finished point."""
    out = []
    for point in points:
        metrics, stamp = (
            read_json(directory / "points" / point.name / name)
            for name in ("metrics.json", "point.json")
        )
        out.append((point, metrics, stamp["about"]))
    return out


def run_all(
    points: list[Point], directory: pathlib.Path, parallel: int, command: Command
) -> dict[str, str]:
    """Runs every point that is not finished, `parallel` at a time, each by its `command`.

    Returns:
        The reason of each failure by the point's name.
    """
    waiting = [p for p in points if not is_finished(p, directory)]
    for point in waiting:
        if stamp := _stamp(point, directory):
            changes = as_text(_changes(point, stamp))
            print(f"{point.name} runs again; since it was run:{changes}", flush=True)
    running: dict[str, tuple[Point, subprocess.Popen]] = {}
    failed: dict[str, str] = {}
    with progress.bar(len(points), "sweep", "point", len(points) - len(waiting)) as bar:
        try:
            while waiting or running:
                processes.check_preemption_alone()
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
                            failed[name] = _failure(log, process.returncode)
                # Short compared with the seconds that a point takes to start.
                time.sleep(0.05)
        finally:
            # Also after Ctrl-C, which a terminal sends to the points too, but `kill` does not.
            for _, process in running.values():
                process.terminate()
    return failed


def _next(waiting: list[Point], running: list[Point], directory: pathlib.Path) -> Point:
    """Returns the point to start next: if possible, one that does not wait for a running one."""
    files = {p.name: digests.digests(p.config) for p in (*waiting, *running)}
    # A point whose training or stores another one is computing would only wait for its lock.
    for attribute in ("training", "stores"):
        in_progress = {_marker(p, attribute, files[p.name]) for p in running} - {
            m.name for m in (directory / "runs").glob(f"*/*.{attribute}")
        }
        free = [p for p in waiting if _marker(p, attribute, files[p.name]) not in in_progress]
        waiting = free or waiting
    return waiting[0]


def _marker(point: Point, attribute: str, files: dict) -> str:
    """Returns the name of the file that marks a shared "training" or "stores" as finished.

    The name holds a digest of the input files, so that a changed file has no marker yet.
    """
    return f"{getattr(point, attribute)}-{fingerprint(plain(files))}.{attribute}"


def _start(point: Point, directory: pathlib.Path, command: Command) -> subprocess.Popen:
    point_directory = directory / "points" / point.name
    point_directory.mkdir(parents=True, exist_ok=True)
    with open(point_directory / "log.txt", "w", encoding="utf-8") as log:
        return subprocess.Popen(command(point), stdout=log, stderr=subprocess.STDOUT, text=True)


def _failure(log: pathlib.Path, code: int) -> str:
    """Returns why a process ended: the signal that killed it, or the error line of its log."""
    if code < 0:
        return f"killed by signal {-code} ({log})"
    # The log of a killed point may end in the middle of a character.
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    errors = [line for line in lines if line.startswith("error")] or lines[-1:]
    return f"{errors[-1] if errors else f'exit status {code}'} ({log})"


def run_point(point: Point, directory: pathlib.Path) -> None:
    """Traces one point, or holds it against retraining, unless it is finished.

    Of the points that share a training or stores, one computes them and the others wait.
    """
    point_directory = directory / "points" / point.name
    point_directory.mkdir(parents=True, exist_ok=True)
    config = point.config
    with (
        filelock.FileLock(point_directory / "lock"),
        metrics.writing(config.metrics.writers, point_directory, config.to_dict()),
    ):
        if is_finished(point, directory):
            return
        _check(point)
        # Before the files are read: if one changes later, its digest no longer matches, and the
        # point runs again.
        files = digests.digests(config)
        shared = Workdir(directory / "runs" / point.training)
        with _once(shared / _marker(point, "training", files), shared / "training.lock"):
            run = stages.prepare(config, shared)
        if point.is_board:
            notes: dict = {}
            _hold_against_retraining(run, point_directory)
        else:
            notes = _trace(point, run, files, point_directory)
        about = _about(run) | {"notes": notes}
        made_of = {"files": files, "corpus": run.corpus.fingerprint}
        made_of["training"] = fingerprint(plain(run.trained.fingerprint))
        stamp = {"made_from": _made_from(point), "made_of": made_of, "about": about}
        write_json(point_directory / "point.json", stamp)


def _trace(point: Point, run: Run, files: dict, out: pathlib.Path) -> dict:
    """Retrieves and measures, and writes the metrics; returns notes by method."""
    # A point removes its groups' results at the end, maybe while another writes its own.
    run = dataclasses.replace(run, groups_folder=f"groups-{point.name}")
    marker = run.workdir / _marker(point, "stores", files)
    with _once(marker, run.workdir / f"{point.encoding}.lock"):
        rankings, notes = retrieve.retrieve(run)
    # The point is unfinished until the new figures are complete.
    (out / "point.json").unlink(missing_ok=True)
    evaluate.evaluate(run, rankings, out)
    return notes


def _hold_against_retraining(run: Run, out: pathlib.Path) -> None:
    """Retrains and scores, and writes the board and the metrics."""
    # Points that train alike share the bank, and what they score alike.
    with filelock.FileLock(run.workdir / "board.lock"):
        scored = board.score(run)
        (out / "point.json").unlink(missing_ok=True)
        metrics = scored.write(out, out)[1]
    scored.add_lds(metrics)
    write_json(out / "metrics.json", plain(metrics))


@contextlib.contextmanager
def _once(marker: pathlib.Path, lock_file: pathlib.Path):
    """Runs the body under a lock in the first process that succeeds, then without a lock.

    The body is a stage of a run: after the first success it only loads files.
    """
    if not marker.exists():
        lock = filelock.FileLock(lock_file)
        try:
            # First without waiting, so that the log says what a point waits for.
            lock.acquire(blocking=False)
        except filelock.Timeout:
            print(f"another point is computing {marker}; waiting for it", flush=True)
            lock.acquire()
        try:
            # Another process may have finished while this one waited.
            if not marker.exists():
                yield
                marker.touch()
                return
        finally:
            lock.release()
    yield


def _about(run: Run) -> dict:
    """Returns the figures of a run that, like the swept keys, may be a plot's x."""
    trained, kind = run.trained, GradientKind()
    layout = projections.layout(run.sites(kind), run.projection(kind))
    _, params = functional.split(trained.model)
    # A pretrained model may be traced without any training step.
    share = trained.step / max(1, trained.fingerprint["steps"])
    return {
        "parameters": sum(x.size for x in jax.tree.leaves(params)),
        "dimensions": layout.width,
        "training_tokens": round(
            float(run.config.train.epochs) * share * run.corpus.training.count_scored()
        ),
        "training_step": trained.step,
    }
