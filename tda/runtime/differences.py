"""Lists for messages: how two descriptions of work differ, and the first of many names."""

import os
from collections.abc import Iterable, Iterator, Sequence

# Another model differs in every parameter, so the first lines are enough.
_LINES = 8


def differences(before, now, name: str = "") -> Iterator[str]:
    """Yields a line "name: before → now" for each value that differs between two JSON trees.

    Args:
        before, now: trees of dicts, lists and values.
        name: dotted name of the two trees.
    """
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        before, now = dict(enumerate(before)), dict(enumerate(now))
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted(before.keys() | now.keys()):
            inner = f"{name}.{key}" if name else str(key)
            yield from differences(before.get(key), now.get(key), inner)
    elif before != now:
        yield f"{name}: {_shown(before)} → {_shown(now)}"


def as_text(lines: Iterable[str]) -> str:
    """Returns the first lines, indented, and the number of the others."""
    lines = list(lines)
    more = [f"… and {len(lines) - _LINES} more"] * (len(lines) > _LINES)
    return "".join(f"\n  {line}" for line in lines[:_LINES] + more)


def check_same(path: str | os.PathLike, before, now, error: type[Exception]) -> None:
    """Raises `error`, with a line for each difference, unless two JSON values are the same.

    Args:
        path: the finished work that `before` describes.
        before, now: as for `differences`.
        error: class of the exception.
    """
    if lines := list(differences(before, now)):
        raise error(
            f"{path} was built with other settings:{as_text(lines)}\n"
            "remove it, or use the settings that it was built with"
        )


def shorten(names: Sequence[str], limit: int = 6) -> str:
    """Lists names: the first few, and the number of the others."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _shown(value) -> str:
    if value is None:
        return "absent"
    return value if isinstance(value, str) and value else repr(value)
