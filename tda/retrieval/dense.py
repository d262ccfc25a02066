"""Dense retrieval: a sentence encoder's vectors, by the `sentence-transformers` library."""

import hashlib
import importlib.util
import itertools
import pathlib
from collections.abc import Sequence

import numpy as np

from tda.runtime.fingerprint import fingerprint_parts

BATCH = 64


class DenseError(ValueError):
    """The library or the model of dense retrieval is missing."""


def check(model: str) -> None:
    """Checks that `sentence-transformers` is installed and the model exists.

    A model that is not a directory is loaded, and downloaded if needed, before hours of work.

    Raises:
        DenseError: the library or the model is missing.
    """
    check_installed()
    if not pathlib.Path(model).is_dir():
        SentenceEncoder(model)


def check_installed() -> None:
    """Checks that `sentence-transformers` is installed, without importing it.

    Raises:
        DenseError: it is not installed.
    """
    if importlib.util.find_spec("sentence_transformers") is None:
        raise DenseError("dense retrieval needs the extra `dense`: pip install 'tda-jax[dense]'")


class SentenceEncoder:
    """A sentence encoder.

    Args:
        model: a directory, or a name on the Hugging Face hub.

    Raises:
        DenseError: the extra `dense` is not installed, or there is no such model.
    """

    def __init__(self, model: str):
        check_installed()
        # Imported here because it imports PyTorch.
        import sentence_transformers

        try:
            self._model = sentence_transformers.SentenceTransformer(model)
        # The library passes on the errors of the libraries with which it loads files.
        except Exception as error:
            raise DenseError(
                f"cannot load dense.model={model!r} ({error}); give the directory of a "
                "sentence-transformers model, or its name on the hub"
            ) from error

    @property
    def width(self) -> int:
        """D, the numbers in a vector."""
        return self._model.get_sentence_embedding_dimension()

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Encodes texts, float32 [N, D]; the model cuts a text that is too long."""
        vectors = self._model.encode(
            list(texts), batch_size=BATCH, show_progress_bar=False, convert_to_numpy=True
        )
        return np.asarray(vectors, np.float32)


def identity(model: str) -> str:
    """Returns an identity of a model: its name, or a hash of its directory's contents."""
    directory = pathlib.Path(model)
    if not directory.is_dir():
        return model
    files = sorted(p for p in directory.rglob("*") if p.is_file())
    parts = (
        (str(f.relative_to(directory)), hashlib.sha256(f.read_bytes()).digest()) for f in files
    )
    return fingerprint_parts(itertools.chain.from_iterable(parts))
