"""Starting a main: config keys are checked, and errors that a user can mend are told in a line."""

import difflib
import os
import runpy
import sys
import traceback
from collections.abc import Callable

import tensorflow_datasets as tfds
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

CONFIG = config_flags.DEFINE_config_file("config", None, "File of the run's config.")
WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run's files.")


def launch(main: Callable[[ConfigDict, str], None]) -> None:
    """Parses the command line and calls `main(config, workdir)`."""
    flags.mark_flags_as_required(["config", "workdir"])
    logging.set_verbosity(logging.WARNING)  # what the libraries tell of themselves is not news
    tfds.disable_progress_bar()

    def run(argv):
        if len(argv) > 1:
            sys.exit(f"error: unexpected arguments: {' '.join(argv[1:])}")
        try:
            main(CONFIG.value, WORKDIR.value)
        except (ValueError, OSError, FloatingPointError) as error:
            _tell(error)

    app.run(run, flags_parser=_parse)


def _parse(argv):
    try:
        return app.parse_flags_with_usage(argv)
    except (AttributeError, KeyError) as error:
        keys = sorted(_keys(_config_of(argv)))
        for argument in argv[1:]:
            name = argument.lstrip("-").split("=")[0]
            if name.startswith("config.") and name[len("config.") :] not in keys:
                sys.exit(f"error: {_unknown(name[len('config.') :], keys)}")
        raise error


def _config_of(argv) -> ConfigDict:
    """The config that `--config` names, before any key is overridden."""
    for argument, following in zip(argv, [*argv[1:], ""], strict=True):
        name, _, value = argument.lstrip("-").partition("=")
        if name == "config":
            return runpy.run_path(value or following)["get_config"]()
    return ConfigDict()


def _keys(config: ConfigDict, prefix: str = "") -> list[str]:
    """Every key of a config, such as `train.epochs`."""
    out = []
    for key, value in config.items():
        out += _keys(value, f"{prefix}{key}.") if isinstance(value, ConfigDict) else [prefix + key]
    return out


def _unknown(name: str, keys: list[str]) -> str:
    """What to say of a key that the config does not have."""
    last = {k.split(".")[-1]: k for k in keys}
    close = difflib.get_close_matches(name, keys, n=3, cutoff=0.6) or [
        last[k] for k in difflib.get_close_matches(name.split(".")[-1], last, n=3, cutoff=0.6)
    ]
    if close:
        return f"the config has no key {name!r}; did you mean {' or '.join(close)}?"
    return f"the config has no key {name!r}; there are\n  " + "\n  ".join(keys)


def _tell(error: Exception) -> None:
    """Ends the program with the error in a line; the traceback goes to a file in the workdir."""
    where = ""
    try:
        path = os.path.join(WORKDIR.value, "error.txt")
        with open(path, "w", encoding="utf-8") as out:
            out.write(traceback.format_exc())
        where = f"\n(traceback in {path})"
    except OSError:
        traceback.print_exc()
    advice = ""
    if "No space left" in str(error):
        advice = (
            f"\nthe disk of --workdir={WORKDIR.value} is full: free some space and run the same "
            "command again; it goes on where it stopped"
        )
    sys.exit(f"error: {error}{advice}{where}")
