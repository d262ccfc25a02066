"""Plots of kept spectra."""

import numpy as np
import pytest

from tda.reports import spectra


def test_draws_both_spectra(tmp_path):
    pytest.importorskip("matplotlib")
    file = tmp_path / "spectra-x.npz"
    train = np.geomspace(10, 1e-3, 200)
    np.savez(file, blocks=["a"], widths=[200], train=train[::-1], evaluation=np.zeros(200) + 1e-30)
    drawn = spectra.draw(file, component=3)
    assert drawn == [str(tmp_path / f"spectra-x.{s}") for s in ("png", "svg")]
    svg = (tmp_path / "spectra-x.svg").read_text()
    assert (tmp_path / "spectra-x.png").read_bytes().startswith(b"\x89PNG") and "<svg" in svg
    elsewhere = spectra.draw(file, out=tmp_path / "other")
    assert elsewhere[0] == str(tmp_path / "other.png")


def test_another_file_is_refused(tmp_path):
    pytest.importorskip("matplotlib")
    np.savez(tmp_path / "other.npz", x=np.ones(3))
    with pytest.raises(ValueError, match="other.npz holds no spectra"):
        spectra.draw(tmp_path / "other.npz")
    (tmp_path / "text.npz").write_text("no")
    with pytest.raises(ValueError, match="text.npz cannot be read"):
        spectra.draw(tmp_path / "text.npz")
