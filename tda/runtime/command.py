"""The command line of this program, as the user typed it, for messages that name a command."""

import pathlib
import shlex
import sys


def typed() -> str:
    """Returns the command that started this program, for the user to type again."""
    prefix, rest = _split()
    return shlex.join([*prefix, *rest])


def of_main(main: str, *arguments) -> str:
    """Returns the command of one of the mains, called as the user called this program.

    Args:
        main: the main's name, such as "view".
        arguments: its arguments.
    """
    prefix, _ = _split()
    if prefix[-1:] == ["tda"]:  # the installed command, or python -m tda
        words = [*prefix, main]
    else:
        is_main = prefix[-2:-1] == ["-m"] and ".experiments." in f".{prefix[-1]}"
        python, package = ["python", "-m"], "experiments"
        if is_main:
            python, package = prefix[:-1], prefix[-1].rpartition(".")[0]
        words = [*python, f"{package}.{main}"]
    return shlex.join([*words, *map(str, arguments)])


def _split() -> tuple[list[str], list[str]]:
    """Returns the words that name the program, and its arguments."""
    words = sys.orig_argv
    if "-m" in words[:-1]:
        end = words.index("-m") + 2
        return words[:end], words[end:]
    # A console script: the user typed `tda`, not the interpreter that its first line names.
    for i, word in enumerate(words):
        if pathlib.Path(word).name == "tda":
            return ["tda"], words[i + 1 :]
    return words[:1], words[1:]
