"""Plots the spectra of R that a search wrote.

    python -m experiments.spectra DIR/retrieval/spectra-*.npz

Draws the eigenvalues of R_train and R_eval, all blocks together, beside each file (PNG and SVG).
Needs matplotlib: the extra `plots`.
"""

from tda.reports import spectra

from .launch import start


def main(files):
    """Draws each file."""
    if not files:
        raise ValueError("name files of spectra: DIR/retrieval/spectra-*.npz")
    for file in files:
        print(*spectra.draw(file))


if __name__ == "__main__":
    start(main, takes_arguments=True)
