"""A corpus loaded for questions, each of which is then answered in milliseconds."""

import dataclasses
import functools
from collections.abc import Callable, Iterator

import jax
import numpy as np

from tda import store
from tda.retrieval import exact
from tda.retrieval import scorer as scoring
from tda.retrieval.ranked import Ranked
from tda.retrieval.scann.index import Index
from tda.retrieval.scorer import Scorer
from tda.retrieval.sources import Source
from tda.runtime import sharding
from tda.store import Form, Passage, Rows


@dataclasses.dataclass(frozen=True)
class Hit:
    """A passage that was retrieved.

    Attributes:
        row: its number in the corpus.
        score: of the passage for the query.
        passage: id, document and text; None where the source keeps no passages.
    """

    row: int
    score: float
    passage: Passage | None


@dataclasses.dataclass(frozen=True)
class Answer:
    """The passages retrieved for one query, those with the most extreme scores first."""

    proponents: list[Hit]
    opponents: list[Hit]


class Retriever:
    """Ranks passages for queries by one method, as often as it is asked.

    Without an index all encodings R^(−1/2) g are held on the devices, and the search is exact. With
    an index only that is held, and nothing is read of the source but what the index asks for.

    Args:
        source: the corpus's gradients. What is withdrawn later takes effect in a new retriever.
        scorer: the method.
        index: over the encodings of the same source by the same method.
        mesh: the devices that rows are split over; one device where None.
        memory_bytes: that encodings may take, of all devices together.
        on_rows: told the rows of each step as they are loaded.

    Raises:
        ValueError: the encodings take more memory, the index is of other encodings, or the method
            takes a query's own part out of R, so that no encoding serves two queries.
    """

    def __init__(
        self,
        source: Source,
        scorer: Scorer,
        index: Index | None = None,
        mesh: jax.sharding.Mesh | None = None,
        memory_bytes: int = 8 << 30,
        on_rows: Callable[[int], None] = lambda rows: None,
    ):
        self._source, self._scorer, self._index, self._mesh = source, scorer, index, mesh
        self._widths = source.form.widths
        if scorer.query_weights:
            raise ValueError(
                "the method takes a query's own part out of R: its passages have other encodings "
                "for every query; search with tda.retrieval.exact"
            )
        if index is not None:
            if (index.rows, index.width) != (source.rows, source.form.width):
                raise ValueError(
                    f"{index.path} has {index.rows} rows of {index.width} numbers, the source "
                    f"{source.rows} of {source.form.width}"
                )
            return
        needed = 4 * source.rows * source.form.width
        if needed > memory_bytes:
            raise ValueError(
                f"the encodings of {source.rows:,} rows take {needed / 2**30:.1f} GiB, more than "
                f"memory_bytes = {memory_bytes / 2**30:.1f} GiB; give more, or an index "
                "(tda.retrieval.scann.build)"
            )
        self._held = _Held(source, scorer, mesh, on_rows)

    @property
    def rows(self) -> int:
        """C, the number of rows."""
        return self._source.rows

    def search(
        self,
        gradients_QxE: np.ndarray,
        k: int = 10,
        correct: dict[str, list[np.ndarray]] | None = None,
        opponents: bool = True,
    ) -> Ranked:
        """Returns the k best and the k worst passages of every query.

        Args:
            gradients_QxE: projected gradients of the queries, float32, made as the source's were.
            k: how many proponents and opponents.
            correct: for each set of labels, the correct rows of each query, whose first rank is
                found; only exact search knows it.
            opponents: whether the k worst are wanted too.

        Raises:
            ValueError: the gradients do not fit or are not finite, or an index is asked for ranks.
        """
        gradients_QxE = self._checked(gradients_QxE)
        encodings_QxE = scoring.encode(
            gradients_QxE, self._scorer.whitening, self._scorer.unit_norm, self._widths
        )
        if self._index is None:
            dot = {"": Scorer(None, False)}
            rankings = exact.search(
                encodings_QxE, self._held, dot, k, correct, self._mesh, opponents=opponents
            )
            return rankings[""]
        if correct:
            raise ValueError("an index does not know the rank of every row; search without it")
        withdrawn = getattr(self._source, "withdrawn", None)
        read = None
        if not self._index.settings.reorder:
            read = functools.partial(scoring.read_encodings, self._source, self._scorer)
        return self._index.search(
            np.asarray(encodings_QxE), k, withdrawn, opponents=opponents, read=read
        )

    def ask(self, gradient_E: np.ndarray, k: int = 10) -> Answer:
        """Returns the passages for one query, float32 [E], with texts if the source has them."""
        ranking = self.search(np.asarray(gradient_E)[None], k)
        return Answer(
            self._hits(ranking.proponents[0], ranking.proponent_scores[0]),
            self._hits(ranking.opponents[0], ranking.opponent_scores[0]),
        )

    def _hits(self, rows_K: np.ndarray, scores_K: np.ndarray) -> list[Hit]:
        passages = getattr(self._source, "passages", lambda rows: [None] * len(rows))(rows_K)
        hits = zip(rows_K, scores_K, passages, strict=True)
        return [Hit(int(row), float(score), passage) for row, score, passage in hits]

    def _checked(self, gradients_QxE) -> np.ndarray:
        x = np.asarray(gradients_QxE, np.float32)
        if x.ndim != 2 or x.shape[1] != sum(self._widths):
            raise ValueError(
                f"queries {list(x.shape)} do not fit rows of {sum(self._widths)} numbers: encode "
                "them as the corpus was"
            )
        bad = np.flatnonzero(~np.isfinite(x).all(axis=1))
        if len(bad):
            raise ValueError(f"the gradient of query {bad[0]} is not finite")
        return x


class _Held:
    """Encodings on the devices, as a source whose steps are ready to be scored."""

    def __init__(self, source: Source, scorer: Scorer, mesh, on_rows):
        width, self.rows = source.form.width, source.rows
        devices = 1 if mesh is None else sharding.batch_devices(mesh)
        self.form = Form("float32", (width,))
        self._step = exact.step_rows(width, devices, touched=False)
        self._steps: list[exact.Placed] = []
        buffer_RxE, filled = np.empty((self._step, width), np.float32), 0
        for _, x_RxE in scoring.encode_source(source, scorer, min(self._step, 1024)):
            start = 0
            while start < len(x_RxE):
                piece = x_RxE[start : start + self._step - filled]
                buffer_RxE[filled : filled + len(piece)] = piece
                filled, start = filled + len(piece), start + len(piece)
                if filled == self._step:
                    self._keep(buffer_RxE, mesh)
                    buffer_RxE, filled = np.empty((self._step, width), np.float32), 0
            on_rows(len(x_RxE))
        if filled:
            self._keep(buffer_RxE[:filled], mesh)

    def _keep(self, x_RxE: np.ndarray, mesh) -> None:
        rows = Rows(self._step * len(self._steps), x_RxE, None, store.valid(x_RxE))
        self._steps.append(exact.place(rows, self._step, mesh))

    def scan(self, step: int) -> Iterator[exact.Placed]:
        """Yields all steps in order."""
        if step != self._step:
            raise ValueError(f"encodings are held in steps of {self._step} rows, not {step}")
        yield from self._steps

    def read(self, numbers) -> np.ndarray:
        """Reads the rows with these numbers, float32 [R, E]."""
        numbers = np.asarray(numbers, np.int64)
        out = np.empty((len(numbers), self.form.width), np.float32)
        for i in np.unique(numbers // self._step):
            at = np.flatnonzero(numbers // self._step == i)
            values = self._steps[i].rows.values
            flat_RxE = values.reshape(-1, self.form.width)
            out[at] = sharding.to_host(flat_RxE[numbers[at] % self._step])
        return out
