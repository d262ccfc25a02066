"""Lists how the description of finished work differs from that of the requested work."""

import os
from collections.abc import Iterator


def differences(stored, expected, place: str, name: str = "") -> Iterator[str]:
    """Yields a line for each value that differs between two trees of dicts and lists.

    Args:
        stored, expected: JSON values.
        place: where `stored` comes from, such as "the store"; named in each line.
        name: dotted name of the two values.
    """
    if isinstance(stored, list) and isinstance(expected, list) and len(stored) == len(expected):
        stored, expected = dict(enumerate(stored)), dict(enumerate(expected))
    if isinstance(stored, dict) and isinstance(expected, dict):
        for key in sorted(stored.keys() | expected.keys()):
            inner = f"{name}.{key}" if name else str(key)
            yield from differences(stored.get(key), expected.get(key), place, inner)
    elif stored != expected:
        yield f"{name}: {stored} in {place}, {expected} wanted"


def check_same(
    path: str | os.PathLike, stored, expected, place: str, error: type[Exception]
) -> None:
    """Raises `error`, with a line for each difference, unless two JSON values are the same.

    Args:
        path: the finished work that `stored` describes.
        stored, expected, place: as for `differences`.
        error: class of the exception.
    """
    if lines := list(differences(stored, expected, place)):
        raise error(
            "\n  ".join([f"{path} was built with other settings:", *lines])
            + "\nremove it, or use the settings that it was built with"
        )
