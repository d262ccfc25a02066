"""Which positions of a passage carry its score for a question."""

import numpy as np
from flax import nnx

from tda.data import batches, tokens
from tda.gradients import contributions
from tda.live.encoded import Encoded
from tda.live.speaker import Speaker
from tda.retrieval.scorer import Scorer
from tda.store import GradientStore


def lacks(e: Encoded) -> str | None:
    """Why scores by some gradients cannot be split; None where they can."""
    if e.untapped == "reference":
        return (
            "this store took gradients of parameters without taps "
            "(gradients.untapped=reference), whose parts by position are not known"
        )
    if e.encoder is not None:
        return "scores by gradients that Kronecker factors changed have no parts by position"
    return None


class Heat:
    """Splits scores by one store's gradients.

    Args:
        model: the model that they were taken of.
        speaker: knows the tokenizer and the context.
        e: the gradients.
        scales: 1/√V by path, or None.
    """

    def __init__(self, model: nnx.Module, speaker: Speaker, e: Encoded, scales: dict | None):
        self._speaker, self._e = speaker, e
        how = e.output, e.include, e.exclude
        self._parts = contributions.make_contributions(model, e.projection, scales, *how)

    def of(
        self,
        query_1xE: np.ndarray,
        stored_1xE: np.ndarray,
        scorer: Scorer,
        ids: np.ndarray,
        pieces: list[str],
    ) -> dict:
        """What each position of a passage carries of its score.

        Args:
            query_1xE, stored_1xE: the gradients of question and passage.
            scorer: its roots are factors F of which FᵀF is the inverse of R.
            ids: the passage's tokens.
            pieces: the text of each.

        Returns:
            "tokens": for each position {"text", "part", "special"}; "sum" of the parts; "score" of
            the stored gradient; "faithful": whether they agree. They do not where the passage's
            text, read anew, has other tokens than were encoded.
        """
        slices = self._e.store.slices
        direction_E = contributions.direction_of(
            query_1xE[0], stored_1xE[0], scorer.roots, slices, scorer.unit_norm
        )
        parts_T = self._of_positions(ids, direction_E)
        score = float(stored_1xE[0].astype(np.float64) @ direction_E)
        total = float(parts_T.sum())
        near = 0.02 * abs(score) + 1e-3 * float(np.abs(parts_T).sum())
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

    def _of_positions(self, ids: np.ndarray, direction_E: np.ndarray) -> np.ndarray:
        """The part of each position of a passage in an inner product, float64 [T]."""
        starts = np.asarray([0, len(ids)], np.int64)
        table = tokens.TokenTable(["passage"], ["passage"], ids, starts, np.arange(len(ids)) > 0)
        positions, pad = len(ids) - 1, self._speaker.tokenizer.pad
        length = self._speaker.bucket(positions)
        batch = batches.materialise(table, np.asarray([0]), length, 1, pad).arrays()
        parts_1xT = self._parts(batch, direction_E.astype(np.float32))
        return np.asarray(parts_1xT, np.float64)[0, :positions]


def tokens_of(store: GradientStore, row: int, speaker: Speaker) -> tuple[np.ndarray, list[str]]:
    """A passage's tokens, int32, made of its text, and the text of each.

    Raises:
        ValueError: the store has no texts.
    """
    (found,) = store.passages([row])
    if found.text is None:
        raise ValueError("the store was made without texts")
    tokenizer, longest = speaker.tokenizer, speaker.context + 1
    ids, pieces = speaker.pieces(found.text)
    ids, pieces = [*tokenizer.begin, *ids], [*map(speaker.shown, tokenizer.begin), *pieces]
    # Of a document that was split, the last passage alone ends with <eos>.
    if store.rows_of_document(found.document)[-1] == row and len(ids) < longest:
        ids, pieces = [*ids, *tokenizer.end], [*pieces, *map(speaker.shown, tokenizer.end)]
    return np.asarray(ids[:longest], np.int32), pieces[:longest]
