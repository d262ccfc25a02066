"""Checks whether files are still those that a corpus was tokenised from.

A file is the same if its contents have the same SHA-256. One with the same size and time of change
is not read; one with another time, such as a copy, is read and compared.
"""

import concurrent.futures
import dataclasses
import hashlib
import os
from collections.abc import Mapping

from tda.data.folders import CorpusError


@dataclasses.dataclass(frozen=True)
class FileState:
    """The state of a file."""

    size: int
    mtime_ns: int
    """When it was last changed."""
    digest: str = ""
    """SHA-256 of its contents; empty if not computed."""

    def check_unchanged(self, before: "FileState", path: str) -> None:
        """Checks that a file was not written to meanwhile.

        Raises:
            CorpusError: it was.
        """
        if (self.size, self.mtime_ns) != (before.size, before.mtime_ns):
            raise CorpusError(f"{path} was changed while it was read; repeat the command")


def read_states(files: Mapping[str, str], with_digests: bool = False) -> dict[str, FileState]:
    """Returns the state of files, by name.

    Args:
        files: paths by name.
        with_digests: whether to read the files.
    """
    stats = {name: os.stat(path) for name, path in files.items()}
    digests = _digests(files) if with_digests else dict.fromkeys(files, "")
    return {n: FileState(s.st_size, s.st_mtime_ns, digests[n]) for n, s in stats.items()}


def check_same(
    before: Mapping[str, FileState], files: Mapping[str, str], place: str
) -> dict[str, FileState]:
    """Checks that files are those that a corpus was tokenised from; returns their states.

    Raises:
        CorpusError: they are not; the message names one that differs.
    """
    states = read_states(files)
    differing = sorted(before.keys() ^ states.keys())
    differing += [n for n in states if n in before and states[n].size != before[n].size]
    moved = [
        name
        for name, state in states.items()
        if not differing and state.mtime_ns != before[name].mtime_ns
    ]
    digests = _digests({name: files[name] for name in moved})
    differing += [name for name in moved if digests[name] != before[name].digest]
    if differing:
        shown = ", ".join(differing[:3]) + (", …" if len(differing) > 3 else "")
        raise CorpusError(
            f"{place} was made from another corpus; it differs in its files: {shown}; remove it, "
            "or use another directory"
        )
    return {n: dataclasses.replace(s, digest=before[n].digest) for n, s in states.items()}


def _digests(files: Mapping[str, str]) -> dict[str, str]:
    def digest(path: str) -> str:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    # hashlib releases Python's lock, so that threads compute hashes in parallel.
    with concurrent.futures.ThreadPoolExecutor(min(16, len(os.sched_getaffinity(0)))) as pool:
        return dict(zip(files, pool.map(digest, files.values()), strict=True))
