"""Tracing one question at a time: a query is encoded as it comes, its passages found in a store.

What a run computed for all its queries, this computes for any prompt and target, by the same code:
the encoder, R of the store, exact search. So a query of the run has the passages and scores that
the run gave it.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Sequence

import jax
import numpy as np
from flax import nnx

from tda import encoding, hessian, results
from tda import store as stores
from tda.data import batches, tokens
from tda.data.tokenizer import Tokenizer
from tda.gradients import contributions, encoder
from tda.gradients.projection import Projection
from tda.methods import Method
from tda.retrieval import bm25, exact, scorer
from tda.store import GradientStore

Progress = Callable[[str, int, int], None]

# What of a method is done here; one that asks for more must not be answered with less.
_UNDERSTOOD = ("title", "corrected", "hessian", "unit_norm", "retriever")


def silent(what: str, done: int, total: int) -> None:
    """Progress that nobody looks at."""


@dataclasses.dataclass(frozen=True)
class Hessian:
    """How R is made; see `tda.hessian`.

    Attributes:
        sample, seed: passages that R_train is taken of (0: all), and the seed of their draw.
        component: k of the mixing rule; 0: in proportion to the width.
        weight: λ; below 0: by the rule.
        damping: in mean eigenvalues of a block.
    """

    sample: int = 0
    seed: int = 0
    component: int = 0
    weight: float = -1.0
    damping: float = 1e-3


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A corpus's gradients, and all that makes a query's gradient like them.

    Attributes:
        store: the corpus's gradients.
        queries: the gradients that R_eval is taken of; None where there are none.
        projection: P.
        scales: gives 1/√V by path, or None; called when a query is first encoded.
        output, include, exclude, untapped: as for `tda.gradients.encoder.make_encoder`.
    """

    store: GradientStore
    queries: GradientStore | None
    projection: Projection
    scales: Callable[[], dict | None] = lambda: None
    output: str = "loss"
    include: str | None = None
    exclude: str | None = None
    untapped: str = "leave"


class Tracer:
    """Answers questions about one model and its corpus.

    Args:
        model: the model that the gradients were taken of.
        tokenizer: its tokenizer.
        context: positions that a query may have.
        encoded: the corpus's gradients, by whether they are corrected.
        how: how R is made.
        folder: where R^(−1/2) is kept for the next start; None keeps it in memory alone.
    """

    def __init__(
        self,
        model: nnx.Module,
        tokenizer: Tokenizer,
        context: int,
        encoded: dict[bool, Encoded],
        how: Hessian = Hessian(),
        folder=None,
    ):
        self._model, self._tokenizer, self._context = model, tokenizer, context
        self._encoded, self._how = encoded, how
        self._folder = None if folder is None else pathlib.Path(folder)
        self._encoders: dict[bool, encoder.Encoder] = {}
        self._scales: dict[bool, dict | None] = {}
        self._parts: dict[bool, Callable] = {}
        self._roots: dict[tuple[bool, str], list[np.ndarray] | None] = {}
        self._texts: list[str] | None = None
        graphdef, state = nnx.split(model)
        compiled = jax.jit(lambda state, tokens_BxT: nnx.merge(graphdef, state)(tokens_BxT))
        self._logits = lambda tokens_BxT: compiled(state, tokens_BxT)

    @property
    def passages(self) -> int:
        """C, the rows of the store."""
        return max((e.store.rows for e in self._encoded.values()), default=0)

    def lacks(self, method: Method) -> str | None:
        """Why a method cannot be asked here; None where it can."""
        beyond = [
            f"{f.name}={getattr(method, f.name)}"
            for f in dataclasses.fields(method)
            if f.name not in _UNDERSTOOD and getattr(method, f.name) != f.default
        ]
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

    def complete(
        self, prompt: str, count: int, others: int = 5, on_progress: Progress = silent
    ) -> list[dict]:
        """The model's likeliest next tokens, one after the other.

        Args:
            prompt: the text before them.
            count: tokens at most; it ends before where the model ends the passage.
            others: candidates told of each step beside the one taken.
            on_progress: told how far it is.

        Returns:
            For each step {"token", "probability", "others"}, the last a list of such pairs too.

        Raises:
            ValueError: the prompt does not fit the context.
        """
        (ids,) = self._tokenizer.encode([prompt.rstrip()]) if prompt.strip() else ([],)
        ids = [self._tokenizer.bos, *ids]
        if len(ids) > self._context:
            raise ValueError(f"the prompt has {len(ids)} tokens, the context {self._context}")
        steps = []
        while len(steps) < count and len(ids) <= self._context:
            on_progress("completing", len(steps), count)
            p_V = _softmax(self._logits_of(ids)[-1])
            order = np.argsort(-p_V, kind="stable")[: others + 1].tolist()
            told = [{"token": self._shown(i), "probability": float(p_V[i])} for i in order]
            steps.append(told[0] | {"others": told[1:]})
            if order[0] == self._tokenizer.eos:
                break
            ids.append(order[0])
        return steps

    def _shown(self, token: int) -> str:
        special = {
            self._tokenizer.eos: "<eos>",
            self._tokenizer.bos: "<bos>",
            self._tokenizer.pad: "<pad>",
        }
        return special.get(token) or self._tokenizer.decode([token])

    def _logits_of(self, ids: Sequence[int]) -> np.ndarray:
        """Logits after each token, float32 [T, V]."""
        padded = np.full((1, self._bucket(len(ids))), self._tokenizer.pad, np.int32)
        padded[0, : len(ids)] = ids
        return np.asarray(self._logits(padded), np.float32)[0, : len(ids)]

    def _bucket(self, positions: int) -> int:
        return next(b for b in batches.buckets(self._context) if b >= positions)

    def likelihood(self, prompt: str, target: str) -> dict:
        """What the model thinks of a target: {"nats", "rank"}, as `evaluation.knowledge` says."""
        table = self._query(prompt, target)
        logits_TxV = self._logits_of(table.tokens[:-1]).astype(np.float64)
        nats, worst = 0.0, 0
        for t in np.flatnonzero(table.scored[1:]):
            row, picked = logits_TxV[t], logits_TxV[t, table.tokens[t + 1]]
            nats += float(np.logaddexp.reduce(row) - picked)
            worst = max(worst, 1 + int((row > picked).sum()))
        return {"nats": nats, "rank": worst}

    def _query(self, prompt: str, target: str) -> tokens.TokenTable:
        return tokens.queries([("question", prompt, target)], self._tokenizer, self._context)

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
        table = self._query(prompt, target)
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
            n: exact.Scorer(self._root(corrected, m.hessian, on_progress), m.unit_norm)
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
            bucket_lengths=batches.buckets(self._context),
            tokens_per_batch=1,
            pad=self._tokenizer.pad,
        )
        if not np.isfinite(found).all():
            raise ValueError("the question's gradient is not finite: look at the model's logits")
        return found

    def _scales_of(self, corrected: bool) -> dict | None:
        if corrected not in self._scales:
            self._scales[corrected] = self._encoded[corrected].scales()
        return self._scales[corrected]

    def _root(self, corrected: bool, kind: str, on_progress: Progress) -> list[np.ndarray] | None:
        """R^(−1/2) by block; None for the identity."""
        key = corrected, kind
        if key not in self._roots:
            self._roots[key] = None if kind == "none" else self._kept_root(*key, on_progress)
        return self._roots[key]

    def _kept_root(self, corrected: bool, kind: str, on_progress: Progress) -> list[np.ndarray]:
        e = self._encoded[corrected]
        path = None
        if self._folder is not None:
            path = self._folder / f"root-{kind}-{_fingerprint(e, self._how, kind)}.npz"
            if path.exists():
                on_progress("reading R", 0, 0)
                with np.load(path, allow_pickle=False) as kept:
                    return [kept[str(i)] for i in range(len(e.store.slices))]
        made = self._made_root(e, kind, on_progress)
        if path is not None:
            self._folder.mkdir(exist_ok=True)
            part = f"{path}.part"
            with open(part, "wb") as out:
                np.savez(out, **{str(i): root for i, root in enumerate(made)})
            os.replace(part, path)
        return made

    def _made_root(self, e: Encoded, kind: str, on_progress: Progress) -> list[np.ndarray]:
        how, slices = self._how, e.store.slices
        total = min(how.sample or e.store.rows, e.store.rows)

        def rows():
            done = 0
            for x_RxE in hessian.rows_for(e.store, how.sample, how.seed):
                on_progress("R of the passages", done, total)
                yield x_RxE
                done += len(x_RxE)

        train = hessian.autocorrelation(rows(), slices)
        on_progress("decomposing R", 0, 0)
        if kind == "train":
            return hessian.inverse_root(train, how.damping)
        gradients_QxE = e.queries.read(slice(0, e.queries.rows))
        evaluation = hessian.autocorrelation([gradients_QxE], slices)
        weight = how.weight
        if weight < 0:
            k = how.component or hessian.component(e.store.width)
            spectra = hessian.spectrum(train), hessian.spectrum(evaluation)
            weight = hessian.mixing_weight(*spectra, k)
        return hessian.inverse_root(hessian.mix(train, evaluation, weight), how.damping)

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
        query_E = self._gradient(self._query(prompt, target), method.corrected, on_progress)[0]
        roots = self._root(method.corrected, method.hessian, on_progress)
        stored_1xE = e.store.read([row])
        if not np.isfinite(stored_1xE).all():
            raise ValueError(f"the gradient of {passage!r} is not finite, or was withdrawn")
        on_progress("splitting the score", 0, 0)
        ids, pieces = self._tokens_of(e.store, row)
        direction = contributions.direction_of(
            query_E, stored_1xE[0], roots, e.store.slices, method.unit_norm
        )
        if method.corrected not in self._parts:
            self._parts[method.corrected] = contributions.make_contributions(
                self._model,
                e.projection,
                self._scales_of(method.corrected),
                e.output,
                e.include,
                e.exclude,
            )
        table = tokens.TokenTable(
            [passage],
            [passage],
            ids,
            np.asarray([0, len(ids)], np.int64),
            np.arange(len(ids)) > 0,
        )
        length = self._bucket(len(ids) - 1)
        batch = batches.materialise(table, np.asarray([0]), length, 1, self._tokenizer.pad)
        parts_T = np.asarray(
            self._parts[method.corrected](batch.arrays(), direction.astype(np.float32))
        )[0, : len(ids) - 1].astype(np.float64)
        encoded = [
            np.asarray(scorer.encode(x, roots, method.unit_norm, e.store.form.widths))[0]
            for x in (query_E[None], stored_1xE)
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

    def _tokens_of(self, store: GradientStore, row: int) -> tuple[np.ndarray, list[str]]:
        """A passage's tokens, int32, made of its text, and the text of each."""
        (found,) = store.passages([row])
        if found.text is None:
            raise ValueError("the store was made without texts")
        ids, pieces = self._tokenizer.pieces(found.text)
        ids, pieces = [self._tokenizer.bos, *ids], ["<bos>", *pieces]
        # Of a document that was split, the last passage alone ends with <eos>.
        if store.rows_of_document(found.document)[-1] == row and len(ids) <= self._context:
            ids, pieces = [*ids, self._tokenizer.eos], [*pieces, "<eos>"]
        ids, pieces = ids[: self._context + 1], pieces[: self._context + 1]
        return np.asarray(ids, np.int32), pieces


def _softmax(x_V: np.ndarray) -> np.ndarray:
    shifted = np.exp(x_V.astype(np.float64) - x_V.max())
    return shifted / shifted.sum()


def _fingerprint(e: Encoded, how: Hessian, kind: str) -> str:
    """Tells a root from others: what its gradients are, and how R is made of them."""

    def of(store: GradientStore):
        return [store.manifest, store.withdrawn.tolist()]

    made_from = [dataclasses.asdict(how), of(e.store)]
    if kind == "mixed":
        made_from.append(of(e.queries))
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:16]


def finished_stores(paths: Sequence) -> list[GradientStore]:
    """The stores among some paths that lack nothing, those written last first."""
    there = [p for p in map(pathlib.Path, paths) if stores.finished(p)]
    there.sort(key=lambda p: (p / "manifest.json").stat().st_mtime, reverse=True)
    return [stores.open_store(p) for p in there]
