"""Commands in messages are those that the user can type."""

import sys

import pytest

from tda.runtime import command


@pytest.mark.parametrize(
    ("words", "typed", "view"),
    [
        (
            [".venv/bin/python", "-m", "experiments.trace", "--workdir=a b"],
            ".venv/bin/python -m experiments.trace '--workdir=a b'",
            ".venv/bin/python -m experiments.view --workdir=w",
        ),
        (
            ["python", "-X", "dev", "-m", "tda.experiments.ask"],
            "python -X dev -m tda.experiments.ask",
            "python -X dev -m tda.experiments.view --workdir=w",
        ),
        (["/usr/bin/python3", "/home/me/bin/tda", "demo"], "tda demo", "tda view --workdir=w"),
        (
            ["python3", "-m", "tda", "trace", "--config=x"],
            "python3 -m tda trace --config=x",
            "python3 -m tda view --workdir=w",
        ),
        # A script of the user's own.
        (["python", "mine.py"], "python mine.py", "python -m experiments.view --workdir=w"),
    ],
)
def test_a_command_is_named_as_the_user_types_it(monkeypatch, words, typed, view):
    monkeypatch.setattr(sys, "orig_argv", words)
    assert command.typed() == typed
    assert command.of_main("view", "--workdir=w") == view
