"""Long work over rows in groups, each with a small result file: a kill costs one group at most.

A group is a range of rows, and its result depends on the rows alone, not on the process that
computed it or on other groups. Results are reduced in the order of the groups, so that every sum
has the same bits on any number of processes, however often they were killed.
"""

import dataclasses
import io
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import google_crc32c
import numpy as np

from tda.runtime import processes
from tda.runtime.atomic_file import open_atomic
from tda.runtime.engine import PROCESSES, Engine, Work

# A scan reads this in 10 s to a minute, the most that a kill may cost.
_GROUP_BYTES = 4 << 30
# The least ratio of a group's row bytes to its result bytes, so that results, which are written and
# read again, add little to the time and the disk.
_ROWS_PER_RESULT = 16

Result = dict[str, np.ndarray]


class GroupError(RuntimeError):
    """A group's file is damaged or cannot be read."""


@dataclasses.dataclass(frozen=True)
class Groups:
    """How work over rows is cut into groups, and where their results are kept."""

    directory: pathlib.Path | None = None
    """The directory of the result files; None computes all rows as one group, and keeps nothing."""

    group_bytes: int = _GROUP_BYTES
    """The least bytes of a group's rows."""

    engine: Engine = PROCESSES
    """Assigns groups to processes."""

    is_joint: bool = False
    """Whether all processes compute every group together, on devices that they share."""

    def ranges(self, rows: int, row_bytes: int, result_bytes: int = 0) -> list[range]:
        """Returns the rows of each group.

        Args:
            rows: the number of rows.
            row_bytes: bytes of a row.
            result_bytes: bytes of a group's result.
        """
        if self.directory is None or not rows:
            return [range(rows)]
        least = max(self.group_bytes, _ROWS_PER_RESULT * result_bytes)
        # A power of two, as the rows of a store's chunks are, so that no chunk is read twice.
        length = 1 << max(0, (-(-least // row_bytes) - 1).bit_length())
        return [range(i, min(rows, i + length)) for i in range(0, rows, length)]

    def reduce(
        self,
        name: str,
        ranges: list[range],
        work: Callable[[range], Result],
        reduction: Callable[[Iterator[Result]], Any],
        on_rows: Callable[[int], None] = lambda rows: None,
    ) -> Any:
        """Computes the groups that have no result yet, and returns the reduction of all results.

        Every process of a run calls it. The engine says which of the groups this process computes;
        process 0 reduces.

        Args:
            name: the name of the work, a folder in `directory`; identifies all that results depend
                on.
            ranges: the rows of each group, from `ranges`.
            work: returns the arrays that are a group's result.
            reduction: is called with an iterator over the results, in the order of the groups.
            on_rows: called with the number of rows of each group that this call need not compute;
                `work` reports the others.

        Returns:
            The reduction; None in all processes but the first.

        Raises:
            GroupError: a file was damaged after this call had checked it.
        """
        if self.directory is None:
            return reduction(map(work, ranges))
        # By process 0's name: its hash may differ between hosts, with the last bits of arrays.
        name = processes.on_first_process(f"name the work {name}", lambda: name)
        folder = self.directory / name

        def compute(numbers: Sequence[int]) -> None:
            for i in set(range(len(ranges))) - set(numbers):
                on_rows(len(ranges[i]))
            for i in numbers:
                result = work(ranges[i])
                if processes.is_first() or not self.is_joint:
                    _write(folder, i, result)
                processes.check_preemption(self.is_joint)

        def find_missing() -> list[int]:
            return _missing(folder, ranges)

        def list_missing() -> list[int]:
            return sorted(set(range(len(ranges))) - set(_paths(folder)))

        self.engine.compute(Work(name, compute, find_missing, list_missing, self.is_joint))
        results = []

        def reduce_all():
            paths = _paths(folder)
            results.append(reduction(_read(paths[i]) for i in range(len(ranges))))

        # The other processes wait here, however long it takes.
        processes.on_first_process(f"reduce {name}", reduce_all)
        return results[0] if results else None


# All rows as one group, without result files.
ONE_GROUP = Groups()


def _missing(folder: pathlib.Path, ranges: list[range]) -> list[int]:
    """Returns the numbers of the groups without a result; removes damaged files."""
    folder.mkdir(parents=True, exist_ok=True)
    intact = set()
    for i, path in _paths(folder).items():
        try:
            _read(path)
            intact.add(i)
        except FileNotFoundError:
            continue  # another task of an array has removed it, since it was damaged
        except GroupError:
            path.unlink(missing_ok=True)
    return [i for i in range(len(ranges)) if i not in intact]


def _paths(folder: pathlib.Path) -> dict[int, pathlib.Path]:
    """Returns the result files by the group's number."""
    matches = ((re.fullmatch(r"(\d+)-[0-9a-f]{8}\.npz", p.name), p) for p in folder.iterdir())
    return {int(match[1]): path for match, path in matches if match}


def _write(folder: pathlib.Path, number: int, result: Result) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, **result)
    # The checksum is in the name, so that file and checksum appear at the same moment.
    checksum = google_crc32c.value(buffer.getvalue())
    with open_atomic(folder / f"{number:06d}-{checksum:08x}.npz", "wb") as out:
        out.write(buffer.getvalue())


def _read(path: pathlib.Path) -> Result:
    content = path.read_bytes()
    if f"{google_crc32c.value(content):08x}" != path.stem.partition("-")[2]:
        raise GroupError(f"{path} is damaged; repeat the command, which computes this group again")
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        return dict(arrays)
