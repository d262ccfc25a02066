"""Compiles regular expressions that a user gives, and says what is wrong with one."""

import re


def compile_pattern(name: str, text: str) -> re.Pattern[str]:
    """Compiles a regular expression.

    Args:
        name: the flag, key or argument that holds it, for the error.
        text: the expression.

    Raises:
        ValueError: it is not a regular expression; the message says what is wrong with it.
    """
    try:
        return re.compile(text)
    # OverflowError is of a count that is too large, such as a{99999999999}.
    except (re.error, TypeError, OverflowError) as error:
        raise ValueError(
            f"{name}={text!r} is not a regular expression ({error}); correct it, and put a "
            r"backslash before a sign that stands for itself, such as \( or \+"
        ) from error
