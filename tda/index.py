"""Passages whose gradients are computed once, for many questions."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from typing import overload

import numpy as np
from flax import nnx

from tda import methods
from tda.answers import Answer, RankedPassage, TraceResult
from tda.data.rows import Query
from tda.encoding import checks, idle_arguments
from tda.encoding.batch_inputs import BatchInputs
from tda.encoding.inputs import EncodedQueries, TextInputs
from tda.encoding.settings import TraceSettings
from tda.methods import METHODS, GradientKind, Method
from tda.retrieval.exact import ExactSearch
from tda.retrieval.hessian_settings import HessianSettings
from tda.retrieval.ranked import Ranked
from tda.retrieval.sources import Source
from tda.retrieval.whitening import Whitening, describe_regularisation
from tda.runtime import progress

# The distance of two means of the same gradients, as a share of their norm: other batches round
# them otherwise, by 1e-7 to 1e-6 in float32.
_ROUNDING = 1e-5
# Gradients of up to this many bytes stay on the device between questions.
_HELD_BYTES = 1 << 30


class Index:
    """The gradients of a corpus by one model, as it was given. Returned by `tda.encode`.

    Gradients with the optimizer's correction, gradients without it and those that EK-FAC changes
    are three kinds. Each is computed when a method first needs it, and then serves all methods of
    its kind. R and the compiled programs are kept too, so that a second question takes a fraction
    of the first's time.

    Args:
        settings: the arguments of `tda.encode`.
        make_inputs: makes the gradients of given settings.
        has_tokenizer: whether queries are texts.
        names: the default methods.
        quiet: whether to show no progress.
    """

    def __init__(
        self,
        settings: TraceSettings,
        make_inputs: Callable[[TraceSettings], TextInputs | BatchInputs],
        has_tokenizer: bool,
        names: Sequence[str],
        quiet: bool = False,
    ):
        checks.check_settings(settings)
        # Shares the arrays: a model that is trained on gets new ones, and this one keeps its own.
        self._settings = dataclasses.replace(settings, model=nnx.clone(settings.model))
        self._make_inputs = make_inputs
        self._has_tokenizer, self._names, self._quiet = has_tokenizer, tuple(names), quiet
        self._kinds: dict[GradientKind, _Kind] = {}

    def encode(self) -> None:
        """Computes the gradients that the default methods need."""
        with progress.hidden(self._quiet):
            for name in self._names:
                self._kind(METHODS[name]).hold()

    @overload
    def query(
        self,
        queries: Iterable,
        method: str | None = None,
        k: int = 10,
        damping: float = -1.0,
        joiner: str | None = None,
        rerank: int = 0,
        contrast: Iterable | None = None,
        candidates: str | None = None,
    ) -> TraceResult: ...

    @overload
    def query(
        self,
        queries: Iterable,
        method: list[str] | tuple[str, ...],
        k: int = 10,
        damping: float = -1.0,
        joiner: str | None = None,
        rerank: int = 0,
        contrast: Iterable | None = None,
        candidates: str | None = None,
    ) -> dict[str, TraceResult]: ...

    def query(
        self,
        queries: Iterable,
        method: str | list[str] | tuple[str, ...] | None = None,
        k: int = 10,
        damping: float = -1.0,
        joiner: str | None = None,
        rerank: int = 0,
        contrast: Iterable | None = None,
        candidates: str | None = None,
    ) -> TraceResult | dict[str, TraceResult]:
        """Finds the passages that made the model say something.

        Args:
            queries, k, damping, joiner, rerank, contrast, candidates: as for `tda.trace`.
            method: a name in `tda.methods.METHODS`, by default the first that was given to
                `tda.encode`; or a list of names, each of which ranks the passages.

        Returns:
            The ranked passages of each query; by the method's name if `method` is a list.

        Raises:
            ValueError: an argument is wrong, or has no effect beside another.
        """
        checks.check_question(k, damping, joiner)
        names = parse_names(self._names[0] if method is None else method)
        optional = {"damping": None if damping == -1 else damping, "joiner": joiner}
        arguments = {name: x for name, x in optional.items() if x is not None}
        chosen = [METHODS[n] for n in names]
        checks.check_rerank(rerank, k, chosen, self._settings, self._has_tokenizer)
        checks.check_candidates(candidates, rerank)
        checks.check_contrast(contrast, rerank, chosen)
        idle_arguments.check(names, arguments, (), self._has_tokenizer)
        # Two kinds of gradients read an iterator twice. Other values are checked later, unchanged.
        queries, contrast = (list(x) if isinstance(x, Iterator) else x for x in (queries, contrast))
        results: dict[str, TraceResult] = {}
        # Methods of one kind share the queries' gradients and one scan over the passages'.
        with progress.hidden(self._quiet):
            for gradients in dict.fromkeys(METHODS[name].gradients for name in names):
                of_kind = {n: METHODS[n] for n in names if METHODS[n].gradients == gradients}
                kind = self._kind(next(iter(of_kind.values())))
                encoded = kind.encode_queries(queries, contrast, of_kind, joiner)
                results |= kind.query(encoded, of_kind, (k, rerank), damping, candidates)
        return results[names[0]] if isinstance(method, str | None) else results

    def _kind(self, method: Method) -> "_Kind":
        """Returns the gradients that a method needs."""
        gradients = method.gradients
        if gradients not in self._kinds:
            settings = dataclasses.replace(
                self._settings, corrected=gradients.corrected, curvature=gradients.curvature
            )
            checks.check_curvature(settings, self._has_tokenizer)
            self._kinds[gradients] = _Kind(self._make_inputs(settings))
        return self._kinds[gradients]


class _Kind:
    """The gradients of one kind, with the R and the search that use them.

    Args:
        inputs: the gradients.
    """

    def __init__(self, inputs: TextInputs | BatchInputs):
        self._inputs, self._settings = inputs, inputs.settings
        self._whitenings: dict[float, Whitening] = {}
        self._is_held = False

    def hold(self) -> None:
        """Computes the gradients; from the next search on they stay on the device if they fit."""
        form = self._inputs.source.form
        self._is_held = 4 * self._inputs.source.rows * form.width <= _HELD_BYTES

    @functools.cached_property
    def _search(self) -> ExactSearch:
        def on_rows(rows: int) -> None:
            self._bar.update(rows)

        source = self._inputs.source
        return ExactSearch(source, self._settings.mesh, on_rows, hold=self._is_held)

    def encode_queries(
        self,
        queries: Iterable,
        contrast: Iterable | None,
        chosen: dict[str, Method],
        joiner: str | None,
    ) -> EncodedQueries:
        """Returns queries with their gradients; with a contrast, one query (`mean_of`)."""
        # A method that mixes in R of the queries needs more queries than others.
        strictest = max(chosen.values(), key=lambda m: m.hessian == "mixed")
        encoded = self._inputs.encode_queries(queries, strictest, joiner)
        if contrast is None:
            return encoded
        if isinstance(contrast, Sized) and not len(contrast):
            return mean_of(encoded)
        try:
            others = self._inputs.encode_queries(contrast, strictest, joiner)
        except ValueError as error:
            raise ValueError(f"contrast: {error}") from error
        return mean_of(encoded, others)

    def query(
        self,
        encoded: EncodedQueries,
        chosen: dict[str, Method],
        depths: tuple[int, int],
        damping: float,
        candidates: str | None = None,
    ) -> dict[str, TraceResult]:
        """Returns the answers of methods of this kind, by name; depths are k and rerank."""
        k, rerank = depths
        source = self._inputs.source
        whitening = self._whitening(source, encoded.gradients_QxE, damping)
        # Plain methods use R of all queries, so all queries are searched for together.
        (part,) = whitening.parts(chosen)
        scorers = part.scorers
        with progress.bar(source.rows, "search", "passage") as self._bar:
            rankings = self._search.rank(encoded.gradients_QxE, scorers, max(k, rerank))
        if rerank and isinstance(self._inputs, TextInputs):
            reranker = self._inputs.whole_gradients
            by_words = [self._inputs.first_by_words(encoded, rerank)] if candidates else []
            rankings = {
                n: reranker.rank(encoded.prompts, [rankings[n], *by_words], m, k, damping)
                for n, m in chosen.items()
            }
        for name, method in chosen.items():
            note = whitening.note(method)
            if note is not None:
                described = describe_regularisation(note)
                progress.tell(f"{name}: R of {source.rows:,d} passages: {described}")
        return {name: self._answer(encoded, m, rankings[name]) for name, m in chosen.items()}

    def _whitening(self, source: Source, queries_QxE: np.ndarray, damping: float) -> Whitening:
        """Returns the whitening with R of these queries; R of the passages is computed once."""
        if damping in self._whitenings:
            whitening = self._whitenings[damping].of_queries(queries_QxE)
        else:
            whitening = Whitening(
                HessianSettings(damping=damping, structure=self._settings.structure),
                source,
                queries_QxE,
                self._settings.mesh,
                shapes=self._settings.layout().shapes,
            )
        self._whitenings[damping] = whitening
        return whitening

    def _answer(self, encoded: EncodedQueries, method: Method, ranked: Ranked) -> TraceResult:
        def passages(rows: np.ndarray, scores: np.ndarray) -> tuple[RankedPassage, ...]:
            return tuple(
                RankedPassage(name, float(score), text)
                for row, score in zip(rows, scores, strict=True)
                if row >= 0  # a second stage fills up lists of fewer candidates
                for name, text in [self._inputs.passage_of(int(row))]
            )

        return TraceResult(
            method.title,
            [
                Answer(
                    query.id,
                    query.prompt,
                    query.target,
                    passages(ranked.proponents[q], ranked.proponent_scores[q]),
                    passages(ranked.opponents[q], ranked.opponent_scores[q]),
                )
                for q, query in enumerate(encoded.queries)
            ],
            self._inputs.read_labels,
        )


def mean_of(encoded: EncodedQueries, contrast: EncodedQueries | None = None) -> EncodedQueries:
    """Returns the mean gradient of some queries, minus that of a contrast, as one query.

    It is the gradient of the difference of two mean losses.

    Raises:
        ValueError: it is zero, up to rounding.
    """
    mean_E = encoded.gradients_QxE.astype(np.float64).mean(axis=0)
    norm, text = np.linalg.norm(mean_E), f"the mean of {len(encoded.queries):,} queries"
    if contrast is not None:
        mean_E -= contrast.gradients_QxE.astype(np.float64).mean(axis=0)
        text += f", less that of {len(contrast.queries):,} others"
    if np.linalg.norm(mean_E) <= _ROUNDING * norm:
        raise ValueError(
            "queries and contrast have the same mean gradient, so their difference is zero; give "
            "other queries in contrast"
        )
    return EncodedQueries([Query("mean", text, "")], mean_E[None].astype(np.float32))


def parse_names(method: str | Sequence[str]) -> list[str]:
    """Returns the names of methods that need only gradients, EK-FAC or R, and a norm.

    Raises:
        ValueError: a name is unknown, or its method needs more.
    """
    names = [method] if isinstance(method, str) else method
    is_list = isinstance(names, list | tuple) and all(isinstance(n, str) for n in names)
    if not is_list or not names:
        raise ValueError(f"method={method!r}; give the name of one, such as 'trackstar_train'")
    parsed = methods.parse(",".join(names))
    for name in names:
        if name not in parsed or not parsed[name].is_plain:
            plain = [n for n, m in METHODS.items() if m.is_plain]
            raise ValueError(f"method={name!r} is not one of {', '.join(plain)}")
    return list(names)
