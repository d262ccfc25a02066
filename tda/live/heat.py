"""Splits a passage's score for a question over the positions of the passage."""

import numpy as np

from tda.data import tokens
from tda.gradients import contributions
from tda.hessian import block_slices
from tda.live.speaker import Speaker
from tda.methods import GradientKind, Method
from tda.retrieval.scorer import factors
from tda.run import moments
from tda.run.gradient_retrievers import Encodings
from tda.run.retrievers import Queries
from tda.run.run import Run
from tda.runtime.progress import Progress
from tda.store import GradientStore


class Heat:
    """Splits scores of a finished run's passages by position.

    Args:
        run: the run.
        speaker: has the tokenizer and the context.
        encodings: the gradients of the run.
    """

    def __init__(self, run: Run, speaker: Speaker, encodings: Encodings):
        self._run, self._speaker, self._encodings = run, speaker, encodings
        self._contributions: dict = {}

    def split(self, queries: Queries, method: Method, passage: str, on_progress: Progress) -> dict:
        """Returns how much each position of a passage adds to its score for one question.

        Args:
            queries: the question.
            method: one of `LiveRun.heat_methods`.
            passage: the passage's id.
            on_progress: called as the work advances.

        Returns:
            "tokens": {"text", "part", "special"} of each position; "sum" of the parts; "score" by
            the stored gradient; "faithful": whether sum and score agree. They do not if the
            passage's text is now tokenised otherwise than when it was encoded.

        Raises:
            ValueError: there is no such passage, or its score cannot be split.
        """
        kind = method.gradients
        if self._run.config.gradients.untapped == "reference":
            raise ValueError(
                "this store has gradients of parameters without taps "
                "(gradients.untapped=reference), which have no parts by position"
            )
        store = self._encodings.passages(kind)
        try:
            row = store.row_of(passage)
        except KeyError as error:
            raise ValueError(f"the store has no passage {passage!r}") from error
        query_E = self._encodings.of_queries(queries, method.query_gradients, on_progress)[0]
        (number,) = queries.numbers
        scorer = self._encodings.whitening(method, on_progress).scorer(method, number)
        (stored_E,) = store.read([row])
        if not np.isfinite(stored_E).all():
            raise ValueError(f"the gradient of {passage!r} is not finite, or was withdrawn")
        on_progress("splitting the score", 0, 0)
        slices = block_slices(store.form.widths)
        roots = factors(scorer, query_E, slices)
        direction_E = contributions.direction_of(query_E, stored_E, roots, slices, method.unit_norm)
        ids, pieces = tokens_of(store, row, self._speaker)
        parts_T = self._parts(kind, ids, direction_E, on_progress)
        score = float(stored_E.astype(np.float64) @ direction_E)
        total = float(parts_T.sum())
        # Larger than the rounding of float32 sums in another order, and than four standard
        # deviations of the store's rounding; other tokens differ by more.
        rounding = store.form.rounding * float(np.linalg.norm(stored_E * direction_E))
        near = 0.02 * abs(score) + 1e-3 * float(np.abs(parts_T).sum()) + 4 * rounding
        special = len(self._speaker.tokenizer.begin)
        return {
            "tokens": [
                {"text": text, "part": float(part), "special": t < special}
                for t, (text, part) in enumerate(zip(pieces, parts_T, strict=False))
            ],
            "sum": total,
            "score": score,
            "faithful": abs(total - score) <= near,
        }

    def _parts(
        self, kind: GradientKind, ids: np.ndarray, direction_E: np.ndarray, on_progress: Progress
    ) -> np.ndarray:
        """Returns each position's part of a passage's inner product, float64 [T]."""
        if kind not in self._contributions:
            run, g = self._run, self._run.config.gradients
            self._contributions[kind] = contributions.make_contributions(
                run.trained.model,
                run.projection(kind),
                moments.inverse_root_moments(run, kind, on_progress),
                kind.output or g.output,
                g.include or None,
                g.exclude or None,
            )
        starts = np.asarray([0, len(ids)], np.int64)
        table = tokens.TokenTable(["passage"], ["passage"], ids, starts, np.arange(len(ids)) > 0)
        (batch,) = self._speaker.layout.batches(table)
        parts_1xT = self._contributions[kind](batch.arrays(), direction_E.astype(np.float32))
        return np.asarray(parts_1xT, np.float64)[0, : len(ids) - 1]


def tokens_of(store: GradientStore, row: int, speaker: Speaker) -> tuple[np.ndarray, list[str]]:
    """Returns the tokens of a passage's text, int32, and the text of each token.

    Raises:
        ValueError: the store has no texts.
    """
    (passage,) = store.passages([row])
    if passage.text is None:
        raise ValueError("the store was made without texts")
    tokenizer, longest = speaker.tokenizer, speaker.context + 1
    ids, pieces = speaker.pieces(passage.text)
    ids, pieces = [*tokenizer.begin, *ids], [*map(speaker.shown, tokenizer.begin), *pieces]
    # Only the last passage of a split document ends with <eos>.
    if store.rows_of_document(passage.document)[-1] == row and len(ids) < longest:
        ids, pieces = [*ids, *tokenizer.end], [*pieces, *map(speaker.shown, tokenizer.end)]
    return np.asarray(ids[:longest], np.int32), pieces[:longest]
