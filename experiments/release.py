"""Makes a finished run a folder to publish: retrievals, outputs, viewer, data card.

    python -m experiments.release --workdir=DIR --out=DIR2

Any web server or GitHub Pages hosts the folder. Fill in the licence in its README.md; a later
release into the same folder keeps it.
"""

from absl import flags

from tda.viewer.release import release

from .launch import WORKDIR, start

_OUT = flags.DEFINE_string("out", None, "Folder of the release: new, empty, or an earlier one.")
flags.declare_key_flag("workdir")


def main(_):
    """Writes the release."""
    size = release(WORKDIR.value, _OUT.value)
    print(f"{size / 1e6:,.1f} MB; fill in the licence in {_OUT.value}/README.md")
    print(f"to look at it, open {_OUT.value}/index.html")


if __name__ == "__main__":
    flags.mark_flags_as_required(["workdir", "out"])
    start(main)
