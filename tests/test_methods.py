"""The table of methods: the three switches that tell the paper's rows apart."""

import dataclasses

import pytest

from tda import methods
from tda.methods import METHODS, GradientKind, parse
from tda.run.registry import RETRIEVERS


def test_rows_differ_in_the_papers_switches():
    switches = {n: (m.corrected, m.hessian, m.unit_norm) for n, m in METHODS.items()}
    assert switches["exp1"] == (True, "none", False)
    assert switches["exp2"] == switches["grad_cos"] == (False, "none", True)
    assert switches["exp3"] == (True, "none", True)
    assert switches["exp4"] == (False, "train", True)
    assert switches["exp5"] == switches["trackstar_train"] == (True, "train", True)
    assert switches["trackstar"] == (True, "mixed", True)
    assert switches["grad_dot"] == (False, "none", False)


def test_every_row_says_what_there_is():
    for m in METHODS.values():
        assert m.hessian in ("none", "train", "mixed") and m.curvature in ("none", "ekfac", "logra")
        assert m.passages in ("plain", "unsure", "adam_step") and m.searched_by in RETRIEVERS
    titles = [m.title for m in METHODS.values()]
    assert len(set(titles)) == len(titles)
    assert all(METHODS[name].retriever == name for name in methods.CONTROLS)


def test_rows_that_share_gradients_share_a_store():
    """One pass over the corpus for each set of gradients, whatever is done with them later."""
    plain = {"grad_dot", "grad_cos", "exp2", "exp4", "trackstar_raw"}
    corrected = {"exp1", "exp3", "exp5", "trackstar", "trackstar_disjoint"}
    for names, what in ((plain, GradientKind()), (corrected, GradientKind(corrected=True))):
        assert all(METHODS[n].gradients == what and METHODS[n].shares_scan for n in names)
    # The last checkpoint's of TracIn and LESS are those too.
    assert METHODS["tracin"].gradients == GradientKind() == METHODS["less"].query_gradients
    assert METHODS["less"].gradients == GradientKind(adam_step=True)
    assert not METHODS["tracin"].shares_scan and not METHODS["trak"].shares_scan


def test_trak_is_the_papers():
    """Park et al. 2023: margin, both sides by R^(−1/2), no norm, Q, averaged over checkpoints."""
    trak = METHODS["trak"]
    assert trak.output == "margin" and trak.hessian == "train" and not trak.unit_norm
    assert trak.passages == "unsure" and trak.several and not trak.by_learning_rate
    assert not trak.corrected


def test_grad_cos_and_exp2_differ_by_name_alone():
    one, other = (dataclasses.replace(METHODS[n], title="") for n in ("grad_cos", "exp2"))
    assert one == other


def test_parse():
    assert list(parse("bm25, trackstar")) == ["bm25", "trackstar"]
    with pytest.raises(ValueError, match="unknown method 'foo'; there are annotated, bm25"):
        parse("foo")
    with pytest.raises(ValueError, match="named twice"):
        parse("bm25,bm25")
    with pytest.raises(ValueError, match="no method"):
        parse(" ,")
