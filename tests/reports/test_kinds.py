"""The figure of what proponents say."""

import numpy as np
import pytest

from tda.reports import kinds, plots


def of(share, tail_patch, pairs):
    of_kind = dict(share=share, interval=(share, share), by_rank=[share, share])
    return of_kind | {"tail_patch": tail_patch, "n_tail_patches": pairs}


@pytest.mark.parametrize("pairs", [0, 9])
def test_what_few_pairs_say_is_not_drawn(tmp_path, monkeypatch, pairs):
    drawn = []
    monkeypatch.setattr(plots, "draw", lambda path, panels, x: drawn.append(panels) or [])
    by_kind = {"states the fact": of(0.3, 0.02, pairs), "unrelated": of(0.7, 0.5, min(4, pairs))}
    kinds.draw(tmp_path / "kinds", {"trackstar": {"by_kind": by_kind}})
    by_method, by_rank = drawn
    assert [p.title for p in by_rank] == ["TrackStar"]
    if not pairs:
        assert len(by_method) == 1
        return
    (line,) = by_method[1].lines
    np.testing.assert_array_equal(line.y, [0.02, np.nan])
