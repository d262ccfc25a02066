"""Several processes of one run (`jax.distributed`): what the first alone does, what all agree on.

Process 0 writes the small files and takes the decisions that hang on what is on disk, so that no
process enters a collective alone. Another asks for a file only when process 0 has made it: some
shared file systems remember for a while that there was none.
"""

import hashlib
import json
import threading
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

# Between CPUs a collective fails that one process enters half an hour after another.
_SIGN_OF_LIFE = 300.0  # seconds
_BUSY, _FAILED = -1, -2


class ProcessError(RuntimeError):
    """Another process failed or differs, and this one cannot go on without it."""


def is_first() -> bool:
    """Whether this is process 0; true where there is one process."""
    return jax.process_index() == 0


def wait_for_all(what: str) -> None:
    """Returns when every process has come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def on_first_process(what: str, work: Callable[[], Any]) -> Any:
    """What `work` returns in process 0, in every process; the others wait and never call it.

    They wait however long it takes. Process 0 calls it in another thread, where no mesh is set.

    Args:
        what: name of the work, an infinitive, for the error.
        work: returns a JSON value.

    Raises:
        ProcessError: in the others, where `work` fails in process 0, which raises its own error.
    """
    if jax.process_count() == 1:
        return work()
    text, error, length = b"", None, _BUSY

    def run():
        nonlocal text, error
        try:
            text = json.dumps(work()).encode()
        except Exception as e:  # the others must hear of it, whatever it is
            error = e

    thread = threading.Thread(target=run, daemon=True)
    if is_first():
        thread.start()
    while length == _BUSY:
        if is_first():
            thread.join(_SIGN_OF_LIFE)
            if not thread.is_alive():
                length = _FAILED if error else len(text)
        length = int(multihost_utils.broadcast_one_to_all(np.int32(length)))
    if error:
        raise error
    if length == _FAILED:
        raise ProcessError(f"process 0 failed to {what}; its own message says why")
    # Few lengths, since each is compiled for.
    buffer = np.zeros(1 << max(6, (length - 1).bit_length()), np.uint8)
    buffer[: len(text)] = np.frombuffer(text, np.uint8)
    return json.loads(multihost_utils.broadcast_one_to_all(buffer)[:length].tobytes())


def where(flag: bool) -> list[int]:
    """The processes that say yes, by number; the same list in every process."""
    if jax.process_count() == 1:
        return [0] if flag else []
    return np.flatnonzero(multihost_utils.process_allgather(np.bool_(flag))).tolist()


def check_alike(what: str, value: Any) -> None:
    """Nothing, where every process has the same JSON value: else they would mix two runs.

    Raises:
        ProcessError: in all of them; the message names one that has another `what`.
    """
    if jax.process_count() == 1:
        return
    mine = np.frombuffer(hashlib.sha256(json.dumps(value).encode()).digest(), np.uint8)
    apart = where((multihost_utils.broadcast_one_to_all(mine) != mine).any())
    if apart:
        raise ProcessError(
            f"process {apart[0]} has another {what} than process 0; start all with the same "
            "command, on the same files"
        )
