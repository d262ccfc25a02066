"""The table of methods: the three switches that tell the paper's rows apart."""

import pytest

from tda.methods import METHODS, parse


def test_rows_differ_in_the_papers_switches():
    switches = {n: (m.corrected, m.hessian, m.unit_norm) for n, m in METHODS.items()}
    assert switches["exp1"] == (True, "none", False)
    assert switches["exp2"] == switches["grad_cos"] == (False, "none", True)
    assert switches["exp3"] == (True, "none", True)
    assert switches["exp4"] == (False, "train", True)
    assert switches["exp5"] == (True, "train", True)
    assert switches["trackstar"] == (True, "mixed", True)
    assert switches["grad_dot"] == (False, "none", False)


def test_parse():
    assert list(parse("bm25, trackstar")) == ["bm25", "trackstar"]
    with pytest.raises(ValueError, match="unknown method 'foo'; there are bm25"):
        parse("foo")
    with pytest.raises(ValueError, match="named twice"):
        parse("bm25,bm25")
    with pytest.raises(ValueError, match="no method"):
        parse(" ,")
