"""Shows results in the browser, answers live questions, or writes the viewer as static files.

    python -m experiments.view --workdir=DIR
    python -m experiments.view --results=a.jsonl,b.jsonl.gz,https://HOST/c.jsonl
    python -m experiments.view --workdir=DIR --export=OUT

Serves on 127.0.0.1 alone, unless --host says otherwise. Of a workdir it shows the results of the
last evaluation (`results/METHOD.jsonl` of the methods in `metrics.json`; --results shows others in
their place), tables and plots; notes are kept in `WORKDIR/notes.jsonl`; questions are answered from
its model and store (`tda/live/finished_run.py`).
"""

import sys
import tempfile

from absl import app, flags, logging

from experiments.launch import WORKDIR
from tda.live import finished_run
from tda.runtime import huge_pages
from tda.viewer import opening
from tda.viewer.export import export

_RESULTS = flags.DEFINE_list("results", [], "Results files or addresses; LABEL=FILE names one.")
_EXPORT = flags.DEFINE_string("export", None, "Write static files to this folder; serve nothing.")
_NOTES = flags.DEFINE_string("notes", None, "File of notes; WORKDIR/notes.jsonl by default.")
_PORT = flags.DEFINE_integer("port", 8484, "Port; 0 takes a free one.", 0, 65535)
_HOST = flags.DEFINE_string(
    "host", "127.0.0.1", "Address to serve on. Whoever reaches it reads all and may write notes."
)
_NAMES = flags.DEFINE_list("names", [], "Further names that browsers reach the viewer by.")
_URLS = flags.DEFINE_bool("allow_urls", False, "Let the page fetch results from addresses.")
_LIVE = flags.DEFINE_bool("live", True, "Answer live questions from the workdir.")


def main(argv):
    """Opens what the flags name; exports or serves it."""
    if len(argv) > 1:
        sys.exit(f"error: unexpected arguments: {' '.join(argv[1:])}")
    logging.set_verbosity(logging.WARNING)
    try:
        with tempfile.TemporaryDirectory() as folder:
            collection = opening.collect(WORKDIR.value, _RESULTS.value, _NOTES.value, folder)
            for file in collection.files:
                if file.malformed:
                    print(f"{file.path}: {file.malformed:,} lines are malformed; they are shown so")
            if _EXPORT.value:
                count = export(collection, _EXPORT.value)
                print(f"{count:,} files of data; open {_EXPORT.value}/index.html")
                return
            answers = (
                finished_run.open_workdir(WORKDIR.value) if WORKDIR.value and _LIVE.value else None
            )
            opening.serve(collection, answers, _HOST.value, _PORT.value, _NAMES.value, _URLS.value)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    huge_pages.use()
    app.run(main)
