"""Tracing one question at a time: a query is encoded as it comes, its passages found in a store.

What a run computed for all its queries, this computes for any prompt and target, by the same code:
the encoder, R of the store, exact search. So a query of the run has the passages and scores that
the run gave it.
"""

import pathlib

import numpy as np
from flax import nnx

from tda import results
from tda.data.tokenizer import Tokenizer
from tda.encoding import table as encoding
from tda.gradients import encoder
from tda.live import heat, retrievers
from tda.live.encoded import Encoded
from tda.live.questions import Question
from tda.live.retrievers import Passages, Retriever
from tda.live.speaker import Speaker
from tda.methods import GradientKind, Method
from tda.retrieval import exact
from tda.retrieval.ranked import Ranked
from tda.retrieval.scorer import Scorer
from tda.retrieval.whitening import HessianSettings, Whitening, factors
from tda.run.remembered import Known
from tda.runtime.progress import Progress, counted, silent

# What a method may ask for beside correction, R, norm and retriever.
_KNOWN_FIELDS = ("output", "curvature", "evaluation", "layer")
_OF_SUMS = ("several", "by_learning_rate", "passages")


class Tracer:
    """Answers questions about one model and its corpus.

    Args:
        model: the model that the gradients were taken of.
        tokenizer: its tokenizer.
        context: positions that a query may have.
        encoded: the corpus's gradients.
        settings: how R is made.
        folder: where R^(−1/2) is kept for the next start; None keeps it in memory alone.
        known: the run's own queries, by whose rules they are answered and marked.
        passages: the corpus; that of the gradients by default.
        others: retrievers beside those of gradients and of words, by name; "several" answers by
            sums over checkpoints, and by passages whose gradients are changed.

    Attributes:
        speaker: asks the model for tokens.
    """

    def __init__(
        self,
        model: nnx.Module,
        tokenizer: Tokenizer,
        context: int,
        encoded: dict[GradientKind, Encoded],
        settings: HessianSettings | None = None,
        folder=None,
        known: Known | None = None,
        passages: Passages | None = None,
        others: dict[str, Retriever] | None = None,
    ):
        self.speaker = Speaker(model, tokenizer, context)
        self._model, self._encoded = model, encoded
        self._settings, self._known = settings or HessianSettings(), known or Known()
        self._folder = None if folder is None else pathlib.Path(folder)
        self._whitenings: dict[GradientKind, Whitening] = {}
        if passages is None and encoded:
            passages = retrievers.StoredPassages(next(iter(encoded.values())).store)
        self._passages, self._others = passages, dict(others or {})
        if passages is not None:
            self._others.setdefault("bm25", retrievers.Words(passages))
        if norms := retrievers.gradient_norms(encoded):
            self._others.setdefault("gradient_norm", norms)
        self._encoders: dict[GradientKind, encoder.Encoder] = {}
        self._scales: dict[GradientKind, dict | None] = {}
        self._heats: dict[GradientKind, heat.Heat] = {}

    @property
    def passages(self) -> int:
        """C, the number of passages."""
        return 0 if self._passages is None else self._passages.rows

    def lacks(self, method: Method) -> str | None:
        """Why a method cannot be asked here; None where it can."""
        # One that asks for more must not be answered with less.
        fields = _KNOWN_FIELDS + (_OF_SUMS if "several" in self._others else ())
        beyond = {n: x for n, x in method.beyond_plain.items() if n not in fields}
        if beyond:
            named = ", ".join(f"{name}={value}" for name, value in beyond.items())
            return f"methods with {named} answer no live questions"
        if _retriever(method) in self._others:
            return self._others[_retriever(method)].lacks(method)
        if method.retriever not in ("gradient", "gradient_norm"):
            return f"there is nothing that the retriever {method.retriever!r} could search"
        if method.gradients not in self._encoded:
            return f"the run has no store of {_told(method.gradients)}"
        return self._lacks_queries(method) if method.hessian == "mixed" else None

    def _lacks_queries(self, method: Method) -> str | None:
        if self._encoded[method.gradients].queries is None:
            return "R_eval needs the gradients of the run's queries, which are not there"
        rule = self._settings.evaluation_of(method)
        if rule != "all" and not self._known.ids:
            return (
                f"R_eval is {rule}, and the run kept no list of its queries to know them by; run "
                "experiments.trace with this workdir once more, which computes nothing anew"
            )
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

        A query of the run is answered as the run answered it, and its passages are marked where
        they are correct; R_eval of another question is that of all queries (`Roots.scorer`).

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
        question = self._question(prompt, target)
        found = {}
        sharing: dict[GradientKind, dict[str, Method]] = {}
        for name, method in methods.items():
            if method.shares_scan:
                sharing.setdefault(method.gradients, {})[name] = method
        for gradients, own in sharing.items():
            found |= self._search(question, gradients, own, k, on_progress)
        for name, method in methods.items():
            if not method.shares_scan:
                retriever = self._others[_retriever(method)]
                found[name] = retriever.search(method, question, k, on_progress)
        return {n: self._record(question, found[n], methods[n]) for n in methods}

    def _question(self, prompt: str, target: str) -> Question:
        table = self.speaker.query(prompt, target)
        return Question(prompt, target, table, self._known.number(prompt, target))

    def _search(
        self,
        question: Question,
        gradients: GradientKind,
        sharing: dict[str, Method],
        k: int,
        on_progress: Progress,
    ) -> dict[str, Ranked]:
        store = self._encoded[gradients].store
        gradient_1xE = self.gradient(question, gradients, on_progress)
        scorers = {n: self.scorer(m, question, gradients, on_progress) for n, m in sharing.items()}
        on_rows = counted(on_progress, "searching passages", store.rows)
        return exact.search(gradient_1xE, store, scorers, k, on_rows=on_rows)

    def scorer(
        self, method: Method, question: Question, kind: GradientKind, on_progress: Progress
    ) -> Scorer:
        """How a method scores passages for a question; see `Whitening.parts`."""
        if kind not in self._whitenings:
            e = self._encoded[kind]
            queries = e.queries and e.queries.read(slice(0, e.queries.rows))
            stores = [s for s in (e.store, e.queries) if s is not None]
            identity = [[s.manifest, s.withdrawn.tolist()] for s in stores]
            self._whitenings[kind] = Whitening(
                self._settings,
                e.store,
                queries,
                folder=self._folder,
                identity=identity,
                on_progress=lambda *told: self._on_progress(*told),
            )
        self._on_progress = on_progress
        return self._whitenings[kind].scorer(method, question.number)

    def _record(self, question: Question, found: Ranked, method: Method) -> dict:
        def passages(rows, scores):
            kept = rows >= 0
            read = self._passages.read_passages(rows[kept])
            pairs = zip(read, scores[kept].tolist(), strict=True)
            return [(p.id, p.text or "", s) for p, s in pairs]

        more = {}
        if question.number is not None:
            correct = self._known.correct[question.number]
            rows = found.proponents[0]
            more["fact_id"] = self._known.ids[question.number]
            if len(correct):  # else there is nothing to judge by
                more["proponent_correct"] = np.isin(rows[rows >= 0], correct).tolist()
        return results.record(
            f"live: {question.text}",
            "live",
            question.prompt,
            question.target,
            passages(found.proponents[0], found.proponent_scores[0]),
            passages(found.opponents[0], found.opponent_scores[0]),
            **more,
        )

    def gradient(
        self, question: Question, gradients: GradientKind, on_progress: Progress = silent
    ) -> np.ndarray:
        """The projected gradient of a question, float32 [1, E]."""
        if gradients not in self._encoders:
            on_progress("preparing the encoder", 0, 0)
            self._encoders[gradients] = self._encoder(gradients, on_progress)
        on_progress("taking the gradient", 0, 0)
        found = encoding.encode_rows(
            self._encoders[gradients],
            question.table,
            np.arange(1),
            self.speaker.layout,
        )
        if not np.isfinite(found).all():
            raise ValueError("the question's gradient is not finite: look at the model's logits")
        return found

    def _encoder(self, gradients: GradientKind, on_progress: Progress) -> encoder.Encoder:
        e = self._encoded[gradients]
        if e.encoder is not None:
            return e.encoder()
        scales = self._scales_of(gradients, on_progress)
        how = e.output, e.include, e.exclude, e.untapped
        return encoder.make_encoder(self._model, e.projection, scales, *how)

    def _scales_of(self, gradients: GradientKind, on_progress: Progress) -> dict | None:
        if gradients not in self._scales:
            self._scales[gradients] = self._encoded[gradients].scales(on_progress)
        return self._scales[gradients]

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
            See `tda.live.heat.Heat.of`.

        Raises:
            ValueError: no such passage, or the method's scores have no such parts.
        """
        if method.retriever != "gradient":
            raise ValueError(f"{method.title} has no gradients: its scores have no positions")
        if why := self.lacks(method):
            raise ValueError(why)
        gradients = method.gradients
        if not method.shares_scan:
            raise ValueError(f"{method.title}: its scores are no inner products of one gradient")
        e = self._encoded[gradients]
        if why := heat.lacks(e):
            raise ValueError(why)
        try:
            row = e.store.row_of(passage)
        except KeyError as error:
            raise ValueError(f"the store has no passage {passage!r}") from error
        question = self._question(prompt, target)
        query_1xE = self.gradient(question, gradients, on_progress)
        scorer = self.scorer(method, question, gradients, on_progress)
        stored_1xE = e.store.read([row])
        if not np.isfinite(stored_1xE).all():
            raise ValueError(f"the gradient of {passage!r} is not finite, or was withdrawn")
        on_progress("splitting the score", 0, 0)
        if gradients not in self._heats:
            scales = self._scales_of(gradients, on_progress)
            self._heats[gradients] = heat.Heat(self._model, self.speaker, e, scales)
        whitening = Scorer(factors(scorer, query_1xE[0], e.store.slices), method.unit_norm)
        tokens = heat.tokens_of(e.store, row, self.speaker)
        return self._heats[gradients].of(query_1xE, stored_1xE, whitening, *tokens)


def _retriever(method: Method) -> str:
    """The name of what answers by a method."""
    summed = method.retriever == "gradient" and not method.shares_scan
    return "several" if summed else method.retriever


def _told(gradients: GradientKind) -> str:
    """Which gradients they are, in words."""
    kind = "with" if gradients.corrected else "without"
    parts = [f"gradients {kind} optimizer correction"]
    if gradients.adam_step:
        parts = ["the step that Adam would make on each passage alone"]
    parts += [f"of the {gradients.output}"] * bool(gradients.output)
    parts += [f"as {gradients.curvature} has them"] * (gradients.curvature != "none")
    return ", ".join(parts)
