"""The board as a figure: what each method's LDS and MRR cost."""

import pytest
from matplotlib.figure import Figure

from tda.reports import board


def method(family, cost, lds, mrr=None):
    def interval(mean):
        return {"mean": mean, "low": mean - 0.1, "high": mean + 0.1}

    record = {"family": family, "cost": cost, "lds": {"0.05": {"same order": interval(lds)}}}
    return record | ({} if mrr is None else {"mrr": interval(mrr)})


@pytest.fixture
def axes(tmp_path, monkeypatch):
    figures, save = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: figures.append(self) or save(self, *a, **k)
    )
    methods = {
        "captured": method("captured while training", 0.2, 0.5, 0.3),
        "trackstar": method("one pass", 0.8, 0.6, 0.4),
        "exp1": method("one pass", 0.7, 0.55),
        "bm25": method("no gradients", 0.0, 0.3, 0.9),
        "old": method("one pass", None, 0.9, 0.9),
    }
    files = board.draw_costs({"methods": methods}, tmp_path / "costs")
    assert [f.rpartition(".")[2] for f in files] == ["png", "svg"]
    return figures[0].axes


def test_each_method_stands_at_its_cost(axes):
    lds, mrr = axes
    assert lds.get_title() == "LDS 5%, same order" and mrr.get_title() == "MRR"
    at = {t.get_text(): t.xy for t in lds.texts}
    assert at["captured"] == (0.2, 0.5) and at["trackstar"] == (0.8, 0.6)
    # Without a cost there is no place; a cost that no clock can tell has the least one.
    assert "old" not in at and at["bm25"] == (0.1, 0.3)
    assert {t.get_text() for t in mrr.texts} == {"captured", "trackstar", "bm25"}


def test_methods_of_a_family_look_alike(axes):
    colours = {tuple(line.get_xdata()): line.get_color() for line in axes[0].get_lines()}
    assert set(colours) == {(0.2,), (0.7, 0.8), (0.1,)} and len(set(colours.values())) == 3
