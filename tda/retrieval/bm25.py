"""BM25: the lexical baseline, by the `bm25s` library."""

from collections.abc import Iterable, Sequence

import numpy as np

from tda.retrieval import by_score
from tda.retrieval.ranked import Ranked


class Index:
    """An index of the words of passages, for BM25 (Robertson & Zaragoza 2009; Lucene's variant).

    Args:
        texts: the passages, in the corpus's order.
        k1, b: BM25's constants; by default those of `bm25s`.

    Raises:
        ValueError: no passage has a word.
    """

    def __init__(self, texts: Iterable[str], k1: float = 1.5, b: float = 0.75):
        # Imported here because its import computes with jax, which must come after
        # `jax.distributed` has joined the processes.
        import bm25s

        texts = list(texts)
        # Without stop words: a template's "the" and "of" are in nearly every passage.
        tokens = bm25s.tokenize(texts, stopwords="en", show_progress=False)
        if not tokens.vocab:
            raise ValueError("no passage has a word that BM25 could index")
        self._rows, self._vocabulary = len(texts), tokens.vocab
        self._index = bm25s.BM25(k1=k1, b=b)
        self._index.index(tokens, show_progress=False)

    def search(
        self,
        queries: list[str],
        k: int = 10,
        correct: dict[str, list[np.ndarray]] | None = None,
        withdrawn: Sequence[int] | np.ndarray = (),
    ) -> Ranked:
        """Ranks passages by texts of queries, prompt and target; the rest as `by_score.rank`."""
        import bm25s

        # As words, since ids would be those of a vocabulary of the queries, not of the index.
        split = bm25s.tokenize(queries, stopwords="en", return_ids=False, show_progress=False)

        def scores():
            for words in split:
                # bm25s cannot score a query without a word that the index has.
                known = [w for w in words if w in self._vocabulary]
                zeros = np.zeros(self._rows, np.float32)
                yield self._index.get_scores(known) if known else zeros

        return by_score.rank(scores(), len(queries), k, correct, withdrawn)
