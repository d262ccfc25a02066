"""Tracing one question at a time: a query is encoded as it comes, its passages found in a store.

What a run computed for all its queries, this computes for any prompt and target, by the same code:
the encoder, R of the store, exact search. So a query of the run has the passages and scores that
the run gave it.
"""

from collections.abc import Callable

import numpy as np
from flax import nnx

from tda import encoding, results
from tda.data import batches, tokens
from tda.data.tokenizer import Tokenizer
from tda.gradients import contributions, encoder
from tda.live.roots import Encoded, Hessian, Progress, Roots, silent
from tda.live.speaker import Speaker
from tda.methods import Method
from tda.retrieval import bm25, exact, scorer
from tda.store import GradientStore


class Tracer:
    """Answers questions about one model and its corpus.

    Args:
        model: the model that the gradients were taken of.
        tokenizer: its tokenizer.
        context: positions that a query may have.
        encoded: the corpus's gradients, by whether they are corrected.
        how: how R is made; by default as configs have it.
        folder: where R^(−1/2) is kept for the next start; None keeps it in memory alone.

    Attributes:
        speaker: asks the model for tokens.
    """

    def __init__(
        self,
        model: nnx.Module,
        tokenizer: Tokenizer,
        context: int,
        encoded: dict[bool, Encoded],
        how: Hessian | None = None,
        folder=None,
    ):
        self.speaker = Speaker(model, tokenizer, context)
        self._model, self._encoded = model, encoded
        self._roots = Roots(encoded, how or Hessian(), folder)
        self._encoders: dict[bool, encoder.Encoder] = {}
        self._scales: dict[bool, dict | None] = {}
        self._parts: dict[bool, Callable] = {}
        self._texts: list[str] | None = None

    @property
    def passages(self) -> int:
        """C, the rows of the store."""
        return max((e.store.rows for e in self._encoded.values()), default=0)

    def lacks(self, method: Method) -> str | None:
        """Why a method cannot be asked here; None where it can."""
        # One that asks for more must not be answered with less.
        beyond = [f"{name}={value}" for name, value in method.beyond_plain.items()]
        if beyond:
            return f"methods with {', '.join(beyond)} answer no live questions"
        if method.retriever == "bm25":
            return None if self._encoded else "there is no store with the passages' texts"
        if method.retriever != "gradient":
            return f"the retriever {method.retriever!r} answers no live questions"
        if method.corrected not in self._encoded:
            kind = "with" if method.corrected else "without"
            return f"the run has no store of gradients {kind} optimizer correction"
        if method.hessian == "mixed" and self._encoded[method.corrected].queries is None:
            return "R_eval needs the gradients of the run's queries, which are not there"
        return None

    def trace(
        self,
        prompt: str,
        target: str,
        methods: dict[str, Method],
        k: int = 10,
        on_progress: Progress = silent,
    ) -> dict[str, dict]:
        """The passages of a question, by each method.

        Args:
            prompt, target: the query.
            methods: the methods by name.
            k: proponents and opponents of each.
            on_progress: told what is done, and how far it is; what it raises ends the work.

        Returns:
            A results record for each method.

        Raises:
            ValueError: the query does not fit, or a method cannot be asked here.
        """
        for name, method in methods.items():
            if why := self.lacks(method):
                raise ValueError(f"{name}: {why}")
        table = self.speaker.query(prompt, target)
        found = {}
        for corrected in self._encoded:
            sharing = {
                n: m
                for n, m in methods.items()
                if m.retriever == "gradient" and m.corrected == corrected
            }
            if sharing:
                found |= self._search(table, corrected, sharing, k, on_progress)
        for name, method in methods.items():
            if method.retriever == "bm25":
                on_progress("BM25", 0, 0)
                found[name] = bm25.search([f"{prompt} {target}"], self._all_texts(on_progress), k)
        return {n: self._record(prompt, target, found[n], methods[n]) for n in methods}

    def _search(self, table, corrected: bool, sharing: dict, k: int, on_progress: Progress) -> dict:
        store = self._encoded[corrected].store
        gradient_1xE = self._gradient(table, corrected, on_progress)
        scorers = {
            n: exact.Scorer(self._roots.get(corrected, m.hessian, on_progress), m.unit_norm)
            for n, m in sharing.items()
        }
        done = 0

        def on_rows(rows: int) -> None:
            nonlocal done
            done += rows
            on_progress("searching passages", done, store.rows)

        on_progress("searching passages", 0, store.rows)
        return exact.search(gradient_1xE, store, scorers, k, on_rows=on_rows)

    def _record(self, prompt: str, target: str, found, method: Method) -> dict:
        source = self._any(method).store

        def passages(rows, scores):
            read = source.passages(rows)
            return [(p.id, p.text or "", s) for p, s in zip(read, scores.tolist(), strict=True)]

        return results.record(
            f"live: {prompt} {target}",
            "live",
            prompt,
            target,
            passages(found.proponents[0], found.proponent_scores[0]),
            passages(found.opponents[0], found.opponent_scores[0]),
        )

    def _any(self, method: Method) -> Encoded:
        """The store that has a method's passages."""
        return self._encoded.get(method.corrected) or next(iter(self._encoded.values()))

    def _all_texts(self, on_progress: Progress) -> list[str]:
        if self._texts is None:
            store, texts, step = next(iter(self._encoded.values())).store, [], 8192
            for first in range(0, store.rows, step):
                on_progress("reading passages", first, store.rows)
                rows = range(first, min(store.rows, first + step))
                texts += [p.text or "" for p in store.passages(rows)]
            for row in store.withdrawn.tolist():
                texts[row] = ""  # never retrieved
            self._texts = texts
        return self._texts

    def _gradient(self, table, corrected: bool, on_progress: Progress = silent) -> np.ndarray:
        """The projected gradient of each row of a table, float32 [R, E]."""
        e = self._encoded[corrected]
        if corrected not in self._encoders:
            on_progress("preparing the encoder", 0, 0)
            self._encoders[corrected] = encoder.make_encoder(
                self._model,
                e.projection,
                self._scales_of(corrected),
                e.output,
                e.include,
                e.exclude,
                e.untapped,
            )
        on_progress("taking the gradient", 0, 0)
        found = encoding.encode_rows(
            self._encoders[corrected],
            table,
            np.arange(len(table)),
            bucket_lengths=batches.buckets(self.speaker.context),
            tokens_per_batch=1,
            pad=self.speaker.tokenizer.pad,
        )
        if not np.isfinite(found).all():
            raise ValueError("the question's gradient is not finite: look at the model's logits")
        return found

    def _scales_of(self, corrected: bool) -> dict | None:
        if corrected not in self._scales:
            self._scales[corrected] = self._encoded[corrected].scales()
        return self._scales[corrected]

    def heat(
        self,
        prompt: str,
        target: str,
        method: Method,
        passage: str,
        on_progress: Progress = silent,
    ) -> dict:
        """What each position of a passage carries of its score for a question.

        Args:
            prompt, target: the query.
            method: a gradient method.
            passage: the passage's id.
            on_progress: told what is done.

        Returns:
            "tokens": for each position {"text", "part", "special"}; "sum" of the parts; "score" of
            the stored gradient; "faithful": whether they agree. They do not where the passage's
            text, read anew, has other tokens than were encoded.

        Raises:
            ValueError: no such passage, or the method's scores have no such parts.
        """
        if method.retriever != "gradient":
            raise ValueError(f"{method.title} has no gradients: its scores have no positions")
        if why := self.lacks(method):
            raise ValueError(why)
        e = self._encoded[method.corrected]
        if e.untapped == "reference":
            raise ValueError(
                "this store took gradients of parameters without taps "
                "(gradients.untapped=reference), whose parts by position are not known"
            )
        try:
            row = e.store.row_of(passage)
        except KeyError as error:
            raise ValueError(f"the store has no passage {passage!r}") from error
        question = self.speaker.query(prompt, target)
        query_1xE = self._gradient(question, method.corrected, on_progress)
        roots = self._roots.get(method.corrected, method.hessian, on_progress)
        stored_1xE = e.store.read([row])
        if not np.isfinite(stored_1xE).all():
            raise ValueError(f"the gradient of {passage!r} is not finite, or was withdrawn")
        on_progress("splitting the score", 0, 0)
        ids, pieces = self._tokens_of(e.store, row)
        direction = contributions.direction_of(
            query_1xE[0], stored_1xE[0], roots, e.store.slices, method.unit_norm
        )
        parts_T = self._parts_of(method.corrected, ids, direction)
        encoded = [
            np.asarray(scorer.encode(x, roots, method.unit_norm, e.store.form.widths))[0]
            for x in (query_1xE, stored_1xE)
        ]
        score, total = float(encoded[0] @ encoded[1]), float(parts_T.sum())
        near = 0.02 * abs(score) + 1e-3 * float(np.abs(parts_T).sum())
        return {
            "tokens": [
                {"text": text, "part": float(part), "special": t == 0}
                for t, (text, part) in enumerate(zip(pieces, parts_T, strict=False))
            ],
            "sum": total,
            "score": score,
            "faithful": abs(total - score) <= near,
        }

    def _parts_of(self, corrected: bool, ids: np.ndarray, direction_E: np.ndarray) -> np.ndarray:
        """The part of each position of a passage in an inner product, float64 [T]."""
        if corrected not in self._parts:
            e = self._encoded[corrected]
            self._parts[corrected] = contributions.make_contributions(
                self._model,
                e.projection,
                self._scales_of(corrected),
                e.output,
                e.include,
                e.exclude,
            )
        starts = np.asarray([0, len(ids)], np.int64)
        table = tokens.TokenTable(["passage"], ["passage"], ids, starts, np.arange(len(ids)) > 0)
        positions, pad = len(ids) - 1, self.speaker.tokenizer.pad
        length = self.speaker.bucket(positions)
        batch = batches.materialise(table, np.asarray([0]), length, 1, pad).arrays()
        parts_1xT = self._parts[corrected](batch, direction_E.astype(np.float32))
        return np.asarray(parts_1xT, np.float64)[0, :positions]

    def _tokens_of(self, store: GradientStore, row: int) -> tuple[np.ndarray, list[str]]:
        """A passage's tokens, int32, made of its text, and the text of each."""
        (found,) = store.passages([row])
        if found.text is None:
            raise ValueError("the store was made without texts")
        ids, pieces = self.speaker.tokenizer.pieces(found.text)
        ids, pieces = [self.speaker.tokenizer.bos, *ids], ["<bos>", *pieces]
        # Of a document that was split, the last passage alone ends with <eos>.
        if store.rows_of_document(found.document)[-1] == row and len(ids) <= self.speaker.context:
            ids, pieces = [*ids, self.speaker.tokenizer.eos], [*pieces, "<eos>"]
        ids, pieces = ids[: self.speaker.context + 1], pieces[: self.speaker.context + 1]
        return np.asarray(ids, np.int32), pieces
