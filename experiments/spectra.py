"""Plots of the spectra of R that a search kept.

    python -m experiments.spectra DIR/retrieval/spectra-*.npz

draws the eigenvalues of R_train and R_eval, all blocks together, beside each file (PNG and SVG).
Needs matplotlib: the extra `plots`.
"""

import sys

from tda.reports import spectra

if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: python -m experiments.spectra FILE.npz ...")
    for given in sys.argv[1:]:
        try:
            print(*spectra.draw(given))
        except (ValueError, ImportError) as error:
            sys.exit(f"error: {error}")
