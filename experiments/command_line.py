"""The command line of a main: `--help`, packaged configs by name, errors about unknown keys."""

import difflib
import pathlib
import runpy
import sys
import textwrap

from absl import app, flags
from ml_collections import ConfigDict

from tda.run import defaults
from tda.runtime import command

# Beside this folder both in a checkout and in an installed package.
_CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
# Modules whose flags belong to every main that imports them.
_SHARED = [f"{__package__}.{name}" for name in ("engine_flags", "launch")]
# The column of the explanations in `--help`.
_COLUMN = 38


def parse(argv: list[str], takes_config: bool) -> list[str]:
    """Parses flags as absl does; returns the other arguments.

    `--help` prints what `describe` returns and ends the program; `--config` may be a packaged
    config's name. An unknown config key ends the program with the keys that it resembles.
    """
    options = argv[: argv.index("--")] if "--" in argv else argv
    if {"-h", "-help", "--help", "--helpshort"} & set(options[1:]):
        print(describe(takes_config))
        sys.exit(0)
    argv = _with_config_path(argv)
    try:
        return app.parse_flags_with_usage(argv)
    except (AttributeError, KeyError) as error:
        keys = list(defaults.flat(_read_config(argv)))
        for argument in argv[1:]:
            name = argument.lstrip("-").split("=")[0]
            if name.startswith("config.") and name[len("config.") :] not in keys:
                sys.exit(f"error: {_describe_unknown(name[len('config.') :], keys)}")
        raise error


def find_packaged(path: str, folder: str = "") -> str:
    """Returns a config file's path: `path` itself if it exists, else that of a packaged config.

    Args:
        path: such as configs/world_facts.py or world_facts, with an argument of its `get_config`
            after a colon.
        folder: of the packaged configs, such as "sweeps".
    """
    file, colon, argument = path.partition(":")
    packaged = _CONFIGS / folder / f"{pathlib.Path(file).stem}.py"
    # A file of the caller's own that is not there is no packaged one of the same name.
    is_named = pathlib.Path(file).parent in map(pathlib.Path, ("", "configs", f"configs/{folder}"))
    if pathlib.Path(file).is_file() or not (is_named and packaged.is_file()):
        return path
    return f"{packaged}{colon}{argument}"


def _with_config_path(argv: list[str]) -> list[str]:
    """Returns the arguments with a packaged config's path in place of its name."""
    argv = list(argv)
    for i, argument in enumerate(argv[1:], 1):
        name, equals, value = argument.partition("=")
        if name in ("-config", "--config"):
            if equals:
                argv[i] = f"{name}={find_packaged(value)}"
            elif i + 1 < len(argv):
                argv[i + 1] = find_packaged(argv[i + 1])
    return argv


def describe(takes_config: bool) -> str:
    """Returns the help of the main that runs: its docstring, its flags and the config's keys."""
    main = sys.modules["__main__"]
    text = (main.__doc__ or "").strip()
    text = text.replace("python -m experiments.", command.of_main("trace").removesuffix("trace"))
    names = {flag.name: flag for flag in flags.FLAGS.get_key_flags_for_module(sys.argv[0])}
    for module in _SHARED if takes_config else ():
        names |= {flag.name: flag for flag in flags.FLAGS.get_key_flags_for_module(module)}
    lines = [text, "", "Flags (all of them, those of libraries too: --helpfull):"]
    for name, flag in names.items():
        default = "" if flag.default in (None, "", []) else f" (default: {flag.default})"
        lines += _entry(f"--[no]{name}" if flag.boolean else f"--{name}=", flag.help + default)
    if takes_config:
        lines += ["", "Keys of the config (--config.KEY=VALUE; the config may set other defaults):"]
        for key, (default, meaning, *_) in defaults.KEYS.items():
            value = "" if isinstance(default, type) else default
            lines += _entry(f"{key}={value}", meaning)
    return "\n".join(lines)


def _entry(name: str, meaning: str) -> list[str]:
    """Returns a name and its meaning in two columns, or one below the other if the name is long."""
    meaning = " ".join(meaning.split())
    wrapped = textwrap.wrap(meaning, 100 - _COLUMN, break_long_words=False) or [""]
    name = f"  {name}"
    name = name if len(name) <= 100 else f"{name[:99]}…"
    first = [f"{name:<{_COLUMN}}{wrapped.pop(0)}"] if len(name) < _COLUMN else [name]
    return first + [" " * _COLUMN + line for line in wrapped]


def _read_config(argv: list[str]) -> ConfigDict:
    """Returns the config that `--config` names, before any key is overridden."""
    for argument, following in zip(argv, [*argv[1:], ""], strict=True):
        name, _, value = argument.lstrip("-").partition("=")
        if name == "config":
            file, *argument = (value or following).split(":", 1)
            return runpy.run_path(file)["get_config"](*argument)
    return ConfigDict()


def _describe_unknown(name: str, keys: list[str]) -> str:
    """Returns the error about a key that the config does not have."""
    last = {k.split(".")[-1]: k for k in keys}
    close = difflib.get_close_matches(name, keys, n=3, cutoff=0.6) or [
        last[k] for k in difflib.get_close_matches(name.split(".")[-1], last, n=3, cutoff=0.6)
    ]
    if close:
        return f"the config has no key {name!r}; did you mean {' or '.join(close)}?"
    return f"the config has no key {name!r}; its keys are\n  " + "\n  ".join(keys)
