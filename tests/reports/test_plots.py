"""Plots: what is drawn is what was given; files are whole, and the same for the same figures."""

import pathlib
import sys
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from matplotlib.figure import Figure

from tda.reports import plots


def panels():
    x = [10.0, 1.0, 100.0]
    a = plots.Line("a", x, [0.2, 0.1, 0.3], [0.1, 0.0, 0.2], [0.3, 0.2, 0.4], marked=5.0)
    b = plots.Line("b", x, [0.5, float("nan"), 0.6])
    return [plots.Panel("MRR", [a, b]), plots.Panel("tail-patch", [b], percent=True)]


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved."""
    figures = []
    save = Figure.savefig

    def keep(self, *args, **kwargs):
        figures.append(self)
        return save(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


def test_lines_are_the_figures_in_order_of_x(tmp_path, drawn):
    plots.draw(tmp_path / "p", panels(), "x", log_x=True, mark_label="best")
    left, right = drawn[0].axes
    a, mark, b = left.get_lines()
    np.testing.assert_array_equal(a.get_xdata(), [1, 10, 100])
    np.testing.assert_array_equal(a.get_ydata(), [0.1, 0.2, 0.3])
    assert list(mark.get_xdata()) == [5.0, 5.0] and mark.get_color() == a.get_color()
    band = left.collections[0].get_paths()[0].vertices
    assert band[:, 1].min() == 0.0 and band[:, 1].max() == 0.4
    # A label looks alike in every panel, whatever stands before it there.
    assert right.get_lines()[0].get_color() == b.get_color() != a.get_color()
    assert left.get_xscale() == "log" and left.get_xlabel() == "x" and left.get_title() == "MRR"
    assert right.yaxis.get_major_formatter()(0.25, 0) == "25%"
    (legend,) = drawn[0].legends
    assert [t.get_text() for t in legend.get_texts()] == ["a", "b", "best"]


def test_named_points_are_not_joined(tmp_path, drawn):
    line = plots.Line("a", [10.0, 1.0], [0.2, 0.1], [0.1, 0.0], [0.3, 0.2], names=["ten", "one"])
    plots.draw(tmp_path / "p", [plots.Panel("LDS", [line])], "cost", log_x=True)
    (axes,) = drawn[0].axes
    (points,) = axes.get_lines()
    assert points.get_linestyle() == "None" and list(points.get_xdata()) == [1, 10]
    assert {t.get_text(): t.xy for t in axes.texts} == {"one": (1, 0.1), "ten": (10, 0.2)}


def test_names_in_a_crowd_of_points_do_not_cover_each_other(tmp_path, drawn):
    close, far = [1.0, 1.001, 1.002], [100.0]
    line = plots.Line("a", close + far, [0.2] * 4, names=["first", "second", "third", "far"])
    plots.draw(tmp_path / "p", [plots.Panel("LDS", [line])], "cost", log_x=True)
    (axes,) = drawn[0].axes
    assert [t.get_text() for t in axes.texts if t.get_visible()] == ["first", "far"]


def test_names_have_rows(tmp_path, drawn):
    lines = [
        plots.Line("a", ["z", "y"], [1, 2], [0.5, 1.5], [1.5, 3]),
        plots.Line("b", ["y", "w"], [3, 4]),
    ]
    plots.draw(tmp_path / "p", [plots.Panel(t, lines, percent=True) for t in "tu"], "x")
    axes, right = drawn[0].axes
    assert [t.get_text() for t in axes.get_yticklabels()] == ["z", "y", "w"]
    assert axes.get_ylim() == right.get_ylim() == (2.5, -0.5)  # the first on top
    a, b = axes.get_lines()
    np.testing.assert_array_equal(a.get_xdata(), [1, 2])
    np.testing.assert_array_equal(b.get_xdata(), [3, 4])
    # Side by side where a row has both.
    np.testing.assert_allclose(a.get_ydata(), [0, 0.8])
    np.testing.assert_allclose(b.get_ydata(), [1.2, 2])
    (ends,) = axes.collections
    np.testing.assert_allclose(ends.get_segments(), [[(0.5, 0), (1.5, 0)], [(1.5, 0.8), (3, 0.8)]])
    assert a.get_linestyle() == "None"  # nothing lies between two names
    assert axes.xaxis.get_major_formatter()(0.025, 0) == "2.5%"
    assert [t.get_text() for t in drawn[0].legends[0].get_texts()] == ["a", "b"]


def test_a_line_for_each_row_needs_no_legend(tmp_path, drawn):
    lines = [plots.Line(n, [n], [1]) for n in "abc"]
    plots.draw(tmp_path / "p", [plots.Panel("t", lines)], "x")
    assert not drawn[0].legends
    (axes,) = drawn[0].axes
    assert len({(m.get_color(), m.get_marker()) for m in axes.get_lines()}) == 1
    np.testing.assert_allclose([m.get_ydata() for m in axes.get_lines()], [[0], [1], [2]])


def test_lines_of_a_family_share_a_colour_and_no_two_look_alike(tmp_path, drawn):
    lines = [
        plots.Line(f"{f} {i}", [1, 2], [1, 2], [0, 1], [2, 3], family=f)
        for f in "abcdefghij"
        for i in range(2)
    ]
    plots.draw(tmp_path / "p", [plots.Panel("t", lines)], "x")
    (axes,) = drawn[0].axes
    made = axes.get_lines()
    assert [made[i].get_color() == made[i + 1].get_color() for i in range(0, 20, 2)] == [True] * 10
    looks = {(m.get_color(), m.get_linestyle(), m.get_marker()) for m in made}
    assert len(looks) == 20
    # Points in rows have no dashes.
    assert len({(m.get_color(), m.get_marker()) for m in made}) == 20
    # So many bands would hide one another: error bars.
    assert not any(type(c).__name__ == "FillBetweenPolyCollection" for c in axes.collections)
    assert len(axes.collections) == 20


@pytest.mark.parametrize(
    "values", [(464, 1856, 7424, 29696, 66816), (1.9e6, 5.3e6, 10.5e6), (8, 16, 32, 48)]
)
def test_labels_of_an_axis_do_not_touch(tmp_path, drawn, values):
    line = plots.Line("a", values, [0.1] * len(values))
    plots.draw(tmp_path / "p", [plots.Panel(t, [line]) for t in "abc"], "x", log_x=True)
    drawn[0].canvas.draw()  # extents of now, not of the file that was written last
    for axes in drawn[0].axes:
        labels = axes.get_xticklabels()
        boxes = [t.get_window_extent() for t in labels]
        assert len(boxes) == len(values)
        if labels[0].get_rotation():  # what turns about their ends needs a line's height
            ends = np.array([b.x1 for b in boxes])
            height = boxes[0].height / (np.sin(np.pi / 6) * len(labels[0].get_text()))
            assert (np.diff(ends) > height).all()
        else:
            assert all(a.x1 + 3 < b.x0 for a, b in zip(boxes[:-1], boxes[1:], strict=True))


def test_numbers_on_the_axis():
    labels = [plots._short_number(v) for v in (0.001, 3, 512, 2048, 1.3e6, 8e9)]
    assert labels == ["0.001", "3", "512", "2,048", "1.3M", "8B"]


def test_files(tmp_path):
    files = plots.draw(tmp_path / "p", panels(), "x")
    assert files == [str(tmp_path / "p.png"), str(tmp_path / "p.svg")]
    assert (tmp_path / "p.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert ET.parse(tmp_path / "p.svg").getroot().tag.endswith("svg")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["p.png", "p.svg"]
    before = [pathlib.Path(file).read_bytes() for file in files]
    plots.draw(tmp_path / "p", panels(), "x")
    assert [pathlib.Path(file).read_bytes() for file in files] == before


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'tda-jax\[plots\]'"):
        plots.check()
