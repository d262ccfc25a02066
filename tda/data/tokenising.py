"""Tokenises the parts of a corpus in worker processes, one for each processor.

A worker is a program of its own (`python -m tda.data.tokenising`), since a fork would copy the
threads of jax, and a spawned process would run the caller's script again. It reads the job and then
one turn a line from its standard input, and writes answers, all as lines of JSON. It ends when its
caller does.
"""

import concurrent.futures
import contextlib
import dataclasses
import json
import os
import pathlib
import queue
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from typing import IO, cast

from tda.data.corpora import Corpus
from tda.data.file_states import FileState
from tda.data.folders import CorpusError
from tda.data.pieces import Job, Source, Turn, make_parts
from tda.data.pretrained_tokenizer import PretrainedTokenizer
from tda.data.tokenizer import Tokenizer
from tda.runtime import processes, progress
from tda.runtime.fingerprint import fingerprint

# Bytes, or documents, for which one more worker, which takes seconds to start, pays off.
_WORTH_A_WORKER = {"B": 16 << 20, "document": 20_000}


def count_workers(source: Source) -> int:
    """Returns how many workers this process starts for a corpus; all processes must call it."""
    if type(source) is not Corpus:  # no other source can be described to a worker
        return 1
    size = sum(piece.size for piece in source.pieces)
    processors = len(os.sched_getaffinity(0)) // processes.count_on_this_host()
    return max(1, min(processors, size // _WORTH_A_WORKER[source.unit]))


def make_all(job: Job, turns: Sequence[Turn], workers: int) -> None:
    """Makes the missing parts of some turns, and shows progress.

    Args:
        job: the corpus.
        turns: the turns of this process.
        workers: the number of worker processes; with one, this process does the work.

    Raises:
        CorpusError: a document cannot be used.
        Preempted: a notice came to a program of one process.
    """
    sizes = {t.piece: job.source.pieces[t.piece].size for t in turns}
    with progress.bar(sum(sizes.values()), "tokenise", job.source.unit) as bar:
        shown = _Shown(job.source, turns, bar.update)
        encoded = _describe_job(job) if min(workers, len(turns)) > 1 else None
        if encoded is not None:
            _make_by_workers(encoded, turns, min(workers, len(turns)), shown)
            return
        for turn in turns:
            make_parts(job, turn, lambda *part, turn=turn: shown.add(turn, *part))
            shown.finish(turn)


def _make_by_workers(job: str, turns: Sequence[Turn], count: int, shown: "_Shown") -> None:
    waiting: queue.SimpleQueue[Turn] = queue.SimpleQueue()
    for turn in turns:
        waiting.put(turn)
    reports: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
    # The stack is left first: it stops the workers, and then their threads end.
    with concurrent.futures.ThreadPoolExecutor(count) as pool, contextlib.ExitStack() as stack:
        running = []
        for _ in range(count):
            worker = _Worker(job)
            stack.callback(worker.stop)
            running.append(pool.submit(_drive, worker, waiting, reports, shown))
        # Progress is shown by this thread, where a notice of preemption ends the work.
        while not all(future.done() for future in running):
            _next_report(reports)
            # Also within a part, which may take longer than the time between notice and kill.
            processes.check_preemption()
            for future in running:
                if future.done():
                    future.result()
        for future in running:
            future.result()
        while not reports.empty():
            _next_report(reports)


def _next_report(reports: "queue.SimpleQueue[Callable[[], None]]") -> None:
    try:
        reports.get(timeout=0.2)()
    except queue.Empty:
        pass


class _Shown:
    """The progress of turns, in the unit of the pieces' sizes."""

    def __init__(self, source: Source, turns: Sequence[Turn], update: Callable[[int], object]):
        self._source, self._update = source, update
        self._left = {t.piece: source.pieces[t.piece].size for t in turns}
        self._turns = [t.piece for t in turns]

    def add(self, turn: Turn, documents: int, characters: int) -> None:
        """Counts a part."""
        amount = characters
        if self._source.unit == "document":
            amount = documents
        elif any(name.endswith((".gz", ".zst")) for name in self._source.pieces[turn.piece].files):
            amount = int(characters / 2.6)  # what gzip makes of English
        amount = min(amount, self._left[turn.piece])
        self._left[turn.piece] -= amount
        self._update(amount)
        processes.check_preemption()

    def finish(self, turn: Turn) -> None:
        """Counts the rest of a piece, when its last turn is done."""
        self._turns.remove(turn.piece)
        if turn.piece not in self._turns:
            self._update(self._left[turn.piece])


def _describe_job(job: Job) -> str | None:
    """Returns a job as a line of JSON; None if it has a source or a tokenizer of another class."""
    is_known = type(job.tokenizer) in (Tokenizer, PretrainedTokenizer)
    if not (is_known and type(job.source) is Corpus):
        return None
    fields = {
        "source": job.source.as_json(),
        "pieces": _identify_pieces(job.source),
        "tokenizer": job.tokenizer.as_json(),
        "context": job.context,
        "folder": os.path.abspath(job.folder),
        "states": {name: dataclasses.astuple(state) for name, state in job.states.items()},
    }
    return json.dumps(fields) + "\n"


def _identify_pieces(source: Source) -> str:
    return fingerprint([dataclasses.astuple(piece) for piece in source.pieces])


def _read_job(line: str | bytes) -> Job:
    """Returns the job that a line of JSON describes.

    Raises:
        CorpusError: the corpus's files have changed.
    """
    fields = json.loads(line)
    with warnings.catch_warnings(action="ignore"):  # the caller has shown them
        source = Corpus(**fields["source"])
    if _identify_pieces(source) != fields["pieces"]:
        raise CorpusError(f"the files of {source.source} were changed; repeat the command")
    tokenizer = PretrainedTokenizer.from_json(fields["tokenizer"])
    states = {name: FileState(*state) for name, state in fields["states"].items()}
    folder = pathlib.Path(fields["folder"])
    return Job(source, tokenizer, fields["context"], folder, states)


class _Worker:
    """A worker process, as its caller sees it."""

    def __init__(self, job: str):
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            # The workers share the processors; a worker computes nothing on a device.
            "TOKENIZERS_PARALLELISM": "false",
            "JAX_PLATFORMS": "cpu",
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tda.data.tokenising"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            # A terminal sends Ctrl-C to all of a group; the caller alone takes it, and ends its
            # workers. One that is still importing would print a traceback.
            process_group=0,
        )
        self._job = job

    def make(self, turn: Turn, on_part: Callable[[int, int], None]) -> None:
        """Makes the parts of a turn in the worker."""
        stdin, stdout = cast(IO, self._process.stdin), cast(IO, self._process.stdout)
        try:
            if self._job:
                stdin.write(self._job.encode())
                self._job = ""
            stdin.write(json.dumps(dataclasses.astuple(turn)).encode() + b"\n")
            stdin.flush()
        except BrokenPipeError:
            pass  # the worker has ended; its status is reported below
        for line in stdout:
            answer = json.loads(line)
            if "part" in answer:
                on_part(*answer["part"])
            elif "refused" in answer:
                raise CorpusError(answer["refused"])
            elif "failed" in answer:
                raise RuntimeError(f"a worker failed to tokenise: {answer['failed']}")
            else:
                return
        raise RuntimeError(
            f"a worker that tokenises ended with status {self._process.wait()}; repeat the "
            "command, which resumes (was it killed for memory?)"
        )

    def stop(self) -> None:
        """Ends the process, and thereby the thread that waits for its answers."""
        if self._process.poll() is None:
            self._process.terminate()
        self._process.wait()


def _drive(worker: _Worker, waiting, reports, shown: _Shown) -> None:
    """Gives turns to a worker until none is left."""
    while True:
        try:
            turn = waiting.get_nowait()
        except queue.Empty:
            return
        worker.make(turn, lambda *part, turn=turn: reports.put(lambda: shown.add(turn, *part)))
        reports.put(lambda turn=turn: shown.finish(turn))


def main() -> None:
    """Makes parts as a worker."""
    # The output of libraries goes to standard error, so that it does not mix with the answers.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    lock = threading.Lock()

    def answer(**values) -> None:
        with lock:
            print(json.dumps(values), file=answers, flush=True)

    job: Job | None = None
    description = sys.stdin.buffer.readline()
    for line in sys.stdin.buffer:
        try:
            job = job or _read_job(description)
            make_parts(job, Turn(*json.loads(line)), lambda *part: answer(part=part))
            answer(done=True)
        except ValueError as error:
            answer(refused=str(error))
        except Exception as error:  # of any kind: the caller shows it
            answer(failed=f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
