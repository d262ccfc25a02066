"""The losses of a training as it goes: in a file, beside the progress bar and to `metrics`."""

import json
import os
import time

import jax
import optax

from tda.runtime import atomic_file, metrics

# Reading the loss waits for the device, so not every step's is read.
_EVERY = 10


class LossLog:
    """Reads the loss of every tenth step and of the last one.

    Args:
        path: a file that gets a JSON line {"step", "epoch", "loss", "tokens"} for each; None reads
            no loss and writes nothing.
        first: the step that the training starts or resumes at.
        steps: the steps of the training in all.
        schedule: the optimizer's learning rate by step, for `tda.runtime.metrics` alone.
        bar: the progress bar that shows the loss.
    """

    def __init__(self, path, first: int, steps: int, schedule: optax.Schedule | None, bar):
        _drop_lines(path, first)
        self._file = open(path, "a", encoding="utf-8") if path else None
        self._last, self._schedule, self._bar = steps - 1, schedule, bar
        self._tokens, self._since = 0, time.perf_counter()

    def __enter__(self) -> "LossLog":
        return self

    def __exit__(self, *error) -> None:
        if self._file:
            self._file.close()

    def add(self, step: int, epoch: int, loss: jax.Array, tokens: int) -> None:
        """Takes a step's loss before the step, and the number of its batch's scored tokens."""
        self._tokens += tokens
        if self._file is None or (step % _EVERY and step != self._last):
            return
        record = {"step": step, "epoch": epoch, "loss": float(loss), "tokens": tokens}
        self._bar.set_postfix_str(f"loss {record['loss']:.3f}", refresh=False)
        self._file.write(json.dumps(record) + "\n")
        now = time.perf_counter()
        values = {"loss": record["loss"], "tokens_per_second": self._tokens / (now - self._since)}
        if self._schedule is not None:
            values["learning_rate"] = float(self._schedule(step))
        metrics.log("train", step, values)
        self._tokens, self._since = 0, now

    def flush(self) -> None:
        """Writes the lines to the file at once."""
        if self._file:
            self._file.flush()


def _drop_lines(path, step: int) -> None:
    """Drops the log lines at or past `step`, where a resumed run starts, and a torn last line."""
    if not path or not os.path.exists(path):
        return
    earlier = []
    with open(path, encoding="utf-8") as lines:
        for line in lines:
            try:
                if json.loads(line)["step"] < step:
                    earlier.append(line)
            except json.JSONDecodeError:
                break  # a kill cut this line off, and nothing valid follows
    with atomic_file.open_atomic(path) as out:
        out.writelines(earlier)
