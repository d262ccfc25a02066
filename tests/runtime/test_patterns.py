"""A regular expression that is none is refused by the name of what holds it."""

import pytest

from tda.runtime.patterns import compile_pattern


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("(", "missing ), unterminated subpattern at position 0"),
        ("a{99999999999}", "the repetition number is too large"),
    ],
)
def test_what_is_wrong_with_a_pattern_is_said(text, reason):
    with pytest.raises(ValueError) as refused:
        compile_pattern("--keep", text)
    assert str(refused.value) == (
        f"--keep={text!r} is not a regular expression ({reason}); correct it, and put a backslash "
        r"before a sign that stands for itself, such as \( or \+"
    )
    assert compile_pattern("--keep", r"\(").search("f(x)")
