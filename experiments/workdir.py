"""A run's directory: stages leave a stamp of what made them, and are skipped where it fits."""

import hashlib
import json
import os
import pathlib


class WorkdirError(ValueError):
    """A workdir cannot be written, or holds another run."""


class Workdir:
    """The directory of one run."""

    def __init__(self, path):
        self.path = pathlib.Path(path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe = self.path / ".writable"
            probe.write_text("")
            probe.unlink()
        except OSError as error:
            raise WorkdirError(
                f"cannot write to --workdir={path}: {error.strerror or error}; "
                "choose another directory"
            ) from error

    def __truediv__(self, name: str) -> pathlib.Path:
        return self.path / name

    def _stamp(self, stage: str) -> pathlib.Path:
        return self.path / "stages" / f"{stage}.json"

    def finished(self, stage: str, made_from: dict) -> bool:
        """Whether `stage` was finished from just this."""
        stamp = self._stamp(stage)
        if not stamp.exists():
            return False
        there = json.loads(stamp.read_text(encoding="utf-8"))
        return there["finished"] and there["made_from"] == plain(made_from)

    def claim(self, stage: str, made_from: dict) -> None:
        """Says that `stage` is being made from this.

        Raises:
            WorkdirError: it was begun from something else; the message says what differs.
        """
        stamp, wanted = self._stamp(stage), plain(made_from)
        if stamp.exists():
            there = json.loads(stamp.read_text(encoding="utf-8"))["made_from"]
            differing = [
                f"{k}: {there.get(k)} there, {wanted.get(k)} asked for"
                for k in sorted(there.keys() | wanted.keys())
                if there.get(k) != wanted.get(k)
            ]
            if differing:
                raise WorkdirError(
                    f"{self.path} holds another run; its {stage} differs in\n  "
                    + "\n  ".join(differing)
                    + "\nuse another --workdir, or remove this one"
                )
        self._write(stage, wanted, finished=False)

    def finish(self, stage: str, made_from: dict) -> None:
        """Says that `stage` is done."""
        self._write(stage, plain(made_from), finished=True)

    def _write(self, stage: str, made_from: dict, finished: bool) -> None:
        stamp = self._stamp(stage)
        stamp.parent.mkdir(exist_ok=True)
        write_json(stamp, {"finished": finished, "made_from": made_from})


def write_json(path, value) -> None:
    """Writes JSON to `path`; the file appears whole or not at all."""
    part = f"{path}.part"
    with open(part, "w", encoding="utf-8") as out:
        json.dump(value, out, indent=1, ensure_ascii=False)
        out.write("\n")
    os.replace(part, path)


def plain(value):
    """A value as JSON gives it back, so that it compares equal to what was read."""
    return json.loads(json.dumps(value))


def fingerprint(value) -> str:
    """A short hash of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]
