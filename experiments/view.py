"""Shows results in the browser, answers live questions, or writes static files.

    python -m experiments.view --workdir=DIR
    python -m experiments.view --results=a.jsonl,b.jsonl.gz,https://HOST/c.jsonl
    python -m experiments.view --workdir=DIR --export=OUT
    python -m experiments.view --results=a.jsonl --metadata=corpus.jsonl --by=source,year

Serves on 127.0.0.1 unless --host is given. With a workdir it shows tables, plots and the results of
the last evaluation (`results/METHOD.jsonl` of the methods in `metrics.json`, or the files of
--results instead); it writes notes to `WORKDIR/notes.jsonl` and answers questions from the run's
model and store.
"""

import tempfile

from absl import flags

from tda.evaluation import by_label
from tda.live import finished_run
from tda.viewer import opening
from tda.viewer.export import export
from tda.viewer.notes import describe_agreement

from .launch import WORKDIR, start

_RESULTS = flags.DEFINE_list("results", [], "Results files or URLs; LABEL=FILE sets a title.")
_EXPORT = flags.DEFINE_string("export", None, "Folder for static files; serves nothing.")
_QUERIES = flags.DEFINE_integer("queries", 0, "Queries of each file, evenly spaced; 0: all.", 0)
_NOTES = flags.DEFINE_string("notes", None, "File of notes; WORKDIR/notes.jsonl by default.")
_PORT = flags.DEFINE_integer("port", 8484, "Port; 0 takes a free one.", 0, 65535)
_HOST = flags.DEFINE_string(
    "host", "127.0.0.1", "Address to serve on; whoever reaches it may read all and write notes."
)
_NAMES = flags.DEFINE_list("names", [], "Further host names of the viewer.")
_URLS = flags.DEFINE_bool("allow_urls", False, "Let the page fetch results from URLs.")
_AGREEMENT = flags.DEFINE_bool("agreement", False, "Tell how notes agree with the judge; no more.")
_LIVE = flags.DEFINE_bool("live", True, "Answer live questions from the workdir.")
_METADATA = flags.DEFINE_string(
    "metadata", None, "The corpus whose documents have the --by fields."
)
_BY = flags.DEFINE_list("by", [], "Fields, such as source,year, by which scores are added up.")
flags.declare_key_flag("workdir")
flags.declare_key_flag("plugin")
flags.declare_key_flag("compilation_cache")


def main(_):
    """Opens the results; exports or serves them."""
    # The folder of results that are fetched from URLs.
    with tempfile.TemporaryDirectory() as folder:
        collection = opening.collect(
            WORKDIR.value, _RESULTS.value, _NOTES.value, folder, _QUERIES.value
        )
        collection.groups = by_label.of_corpus(_METADATA.value, _BY.value)
        for file in collection.files:
            if file.malformed:
                print(f"{file.path}: {file.malformed:,} malformed lines, shown as such")
        if _AGREEMENT.value:
            if collection.notes is None:
                raise ValueError("--agreement reads notes, and there are none; give --notes=FILE")
            print(describe_agreement(collection.notes.agreement(collection.files)))
            return
        if _EXPORT.value:
            count = export(collection, _EXPORT.value)
            print(f"{count:,} files of data; open {_EXPORT.value}/index.html")
            return
        run = finished_run.open_workdir(WORKDIR.value) if WORKDIR.value and _LIVE.value else None
        opening.serve(collection, run, _HOST.value, _PORT.value, _NAMES.value, _URLS.value)


if __name__ == "__main__":
    start(main)
