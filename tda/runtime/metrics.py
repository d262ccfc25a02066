"""Metrics in TensorBoard and Weights & Biases, beside the files of a run.

A series is a section ("train") with values by step; figures are those of a finished table. Any code
calls `log`, `log_figures` and `log_plot`, which do nothing while no writers are open. A resumed run
logs a step again only if the writer does not have it yet.
"""

import contextlib
import importlib
import json
import os
import pathlib
import shutil
import struct
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from tda.runtime import processes
from tda.runtime.atomic_file import write_json


class Writer(Protocol):
    """A place that metrics are written to. A finished call's values survive a kill."""

    def write(self, section: str, step: int, values: Mapping[str, float]) -> None:
        """Adds the values of a step of a section, unless it has that step already."""

    def write_figures(self, step: int, figures: Mapping[str, float]) -> None:
        """Replaces the figures of the table of the checkpoint at `step`."""

    def write_plot(self, name: str, png: pathlib.Path) -> None:
        """Shows a picture in the place of the last one of that name."""

    def close(self) -> None:
        """Ends the writing."""


_MODULES = {"tensorboard": "tensorboardX", "wandb": "wandb"}


def _import(name: str) -> Any:
    try:
        return importlib.import_module(_MODULES[name])
    except ImportError as error:
        raise ValueError(
            f"metrics.writers={name} needs {_MODULES[name]}, which is not installed; "
            f"pip install 'tda-jax[{name}]'"
        ) from error


class TensorBoard:
    """Event files under DIRECTORY/tensorboard, a folder for each section.

    Raises:
        ValueError: tensorboardX is not installed; the message names the extra.
    """

    def __init__(self, directory: pathlib.Path, config: Mapping):
        _import("tensorboard")
        self._root = directory / "tensorboard"
        self._sections: dict[str, tuple[Any, int]] = {}  # the files' writer, and the last step

    def write(self, section: str, step: int, values: Mapping[str, float]) -> None:
        """See `Writer`."""
        if section not in self._sections:
            folder = self._root / section
            last = max((event.step for event in self.read_events(folder)), default=-1)
            self._sections[section] = self._make_writer(folder), last
        writer, last = self._sections[section]
        if step > last:
            self._add(writer, step, self._scalars(section, values))
            self._sections[section] = writer, step

    def write_figures(self, step: int, figures: Mapping[str, float]) -> None:
        """See `Writer`."""
        self._replace("table", step, self._scalars("table", figures))

    def write_plot(self, name: str, png: pathlib.Path) -> None:
        """See `Writer`."""
        summary = importlib.import_module("tensorboardX.proto.summary_pb2").Summary
        content = png.read_bytes()
        # A PNG file begins with 8 bytes of its own, and the length and name of its first chunk.
        width, height = struct.unpack_from(">II", content, 16)
        image = summary.Image(
            width=width, height=height, colorspace=4, encoded_image_string=content
        )
        self._replace(f"plots/{name}", 0, [summary.Value(tag=f"plots/{name}", image=image)])

    def close(self) -> None:
        """See `Writer`."""
        for writer, _ in self._sections.values():
            writer.close()

    def _replace(self, section: str, step: int, values: list) -> None:
        shutil.rmtree(self._root / section, ignore_errors=True)
        writer = self._make_writer(self._root / section)
        self._add(writer, step, values)
        writer.close()

    def _make_writer(self, folder: pathlib.Path) -> Any:
        # Not SummaryWriter: after its `flush`, a kill still loses events that wait in its thread.
        files = importlib.import_module("tensorboardX.event_file_writer")
        folder.mkdir(parents=True, exist_ok=True)
        # Files are named by the time in seconds: the number keeps two of one second apart.
        number = len(list(folder.glob("*")))
        return files.EventsWriter(str(folder / "events"), f".{number:06d}")

    @staticmethod
    def _scalars(section: str, values: Mapping[str, float]) -> list:
        value_of = importlib.import_module("tensorboardX.proto.summary_pb2").Summary.Value
        return [value_of(tag=f"{section}/{n}", simple_value=v) for n, v in values.items()]

    @staticmethod
    def _add(writer, step: int, values: list) -> None:
        event, summary = (
            importlib.import_module(f"tensorboardX.proto.{name}_pb2")
            for name in ("event", "summary")
        )
        summary = summary.Summary(value=values)
        writer.write_event(event.Event(wall_time=time.time(), step=step, summary=summary))
        writer.flush()

    @staticmethod
    def read_events(folder: pathlib.Path) -> Iterator[Any]:
        """Yields the events with values of a folder's files; ends a file where a kill cut it.

        A record is its length (uint64, little endian), a checksum of 4 bytes, the event as a
        protocol buffer, and another checksum (TensorFlow's TFRecord).
        """
        proto = importlib.import_module("tensorboardX.proto.event_pb2")
        for file in sorted(folder.glob("events.out.tfevents.*")):
            data, start = file.read_bytes(), 0
            while start + 12 <= len(data):
                (length,) = struct.unpack_from("<Q", data, start)
                if start + 16 + length > len(data):
                    break
                event = proto.Event.FromString(data[start + 12 : start + 12 + length])
                start += 16 + length
                if event.HasField("summary"):
                    yield event


class WeightsAndBiases:
    """A run of Weights & Biases, whose id a resumed run finds in DIRECTORY/wandb.json.

    `WANDB_MODE=offline` and the like hold as for every program that calls wandb.

    Raises:
        ValueError: wandb is not installed; the message names the extra.
    """

    def __init__(self, directory: pathlib.Path, config: Mapping):
        wandb = _import("wandb")
        directory.mkdir(parents=True, exist_ok=True)
        self._file = directory / "wandb.json"
        self._state: dict[str, Any] = {"id": uuid.uuid4().hex[:12], "last_steps": {}}
        if self._file.exists():
            self._state = json.loads(self._file.read_text(encoding="utf-8"))
        self._defined: set[str] = set()
        self._run = wandb.init(
            project="tda",
            name=directory.resolve().name,
            dir=str(directory),
            id=self._state["id"],
            resume="allow",
            config=dict(config),
        )

    def write(self, section: str, step: int, values: Mapping[str, float]) -> None:
        """See `Writer`."""
        last_steps = self._state["last_steps"]
        if step <= last_steps.get(section, -1):
            return
        if section not in self._defined:
            # wandb's own step must grow over all sections; each here has one of its own.
            self._run.define_metric(f"{section}/*", step_metric=f"{section}/step")
            self._defined.add(section)
        # Noted first: a kill between the two loses a point, and never doubles one.
        last_steps[section] = step
        write_json(self._file, self._state)
        self._run.log({f"{section}/{n}": v for n, v in ({"step": step} | dict(values)).items()})

    def write_figures(self, step: int, figures: Mapping[str, float]) -> None:
        """See `Writer`."""
        self._run.summary.update({f"table/{n}": v for n, v in ({"step": step} | figures).items()})

    def write_plot(self, name: str, png: pathlib.Path) -> None:
        """See `Writer`."""
        self._run.log({f"plots/{name}": _import("wandb").Image(str(png))})

    def close(self) -> None:
        """See `Writer`."""
        self._run.finish()


WRITERS: dict[str, Callable[[pathlib.Path, Mapping], Writer]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
}
_open: list[Writer] = []


def check(names: str) -> list[str]:
    """Returns the writers that a comma-separated list names.

    Raises:
        ValueError: a name is unknown or twice there, or its library is not installed.
    """
    listed = [name.strip() for name in names.split(",") if name.strip()]
    for name in listed:
        if name not in WRITERS:
            raise ValueError(
                f"unknown metrics.writers={name!r}; use {' or '.join(WRITERS)}, or both with a "
                "comma"
            )
        if listed.count(name) > 1:
            raise ValueError(f"metrics.writers={names!r} names {name} twice; name it once")
        _import(name)
    return listed


@contextlib.contextmanager
def writing(names: str, directory: pathlib.Path, config: Mapping) -> Iterator[None]:
    """Opens writers for everything logged inside the context, in process 0 only.

    Args:
        names: comma-separated names of `WRITERS`; empty for none.
        directory: the run's directory.
        config: JSON values that describe the run.

    Raises:
        ValueError: as `check`.
    """
    listed = check(names)
    with contextlib.ExitStack() as stack:
        for name in listed if processes.is_first() else ():
            writer = WRITERS[name](directory, config)
            stack.callback(writer.close)
            _open.append(writer)
            stack.callback(_open.remove, writer)
        yield


def log(section: str, step: int, values: Mapping[str, float]) -> None:
    """Writes values of a step to all open writers."""
    for writer in _open:
        writer.write(section, step, values)


def log_figures(step: int, figures: Mapping[str, float]) -> None:
    """Writes the figures of a table to all open writers."""
    for writer in _open:
        writer.write_figures(step, figures)


def log_plot(png: str | os.PathLike) -> None:
    """Shows a PNG file, by its name without the suffix, in all open writers."""
    path = pathlib.Path(png)
    for writer in _open:
        writer.write_plot(path.stem, path)
