"""All methods by name: the gradients, R, norm and retriever of each.

To add a row to a table, add an entry to `METHODS`. Methods with the same gradients share one store
for each checkpoint (`GradientKind`), and are searched in a single scan over it if they can be.
"""

import dataclasses

# Retrievers that ignore the query: the baselines that any useful method must beat.
CONTROLS = ("random", "length", "gradient_norm")


@dataclasses.dataclass(frozen=True)
class GradientKind:
    """A kind of gradients; a store holds those of one kind at one checkpoint.

    Attributes:
        corrected: whether gradients are divided by the root of the optimizer's second moments.
        output: the function that is differentiated: "loss", "margin" or "logit"; if empty, that of
            the config (`gradients.output`).
        curvature: "ekfac" multiplies by the inverse root of EK-FAC's Fisher matrix
            (`tda.gradients.kronecker`) before the projection; "logra" projects on the principal
            components of activations and of their gradients instead of at random; or "none".
        adam_step: whether an example's gradient is replaced by the step that Adam would take on
            it alone (`tda.gradients.adam_steps`).
    """

    corrected: bool = False
    output: str = ""
    curvature: str = "none"
    adam_step: bool = False


@dataclasses.dataclass(frozen=True)
class Method:
    """A method: how projected gradients, or texts, become a ranking.

    Attributes:
        title: its name in tables.
        corrected, output, curvature: see `GradientKind`.
        hessian: R is "none", "train" (R_train) or "mixed" (λ R_eval + (1 − λ) R_train).
        unit_norm: whether encodings are scaled to norm one, which makes scores cosines.
        retriever: "gradient"; "rerank" (whole gradients of candidates); "rrf" (reciprocal-rank
            fusion of the methods that find candidates); one that needs no projected
            gradients ("bm25", "dense", "hidden", "annotated"); one by the gradients of the
            training's own steps ("captured"); or a control that looks at no query ("random",
            "length", "gradient_norm").
        several: whether scores are summed over several checkpoints, each with its own R.
        by_learning_rate: whether a checkpoint's weight in that sum is the learning rate of the
            steps up to it; otherwise all weigh the same.
        passages: how a passage's gradient is changed first: not at all ("plain"); weighted by
            1 − p, with p the mean probability of its tokens ("unsure", TRAK's Q); or replaced by
            the step that Adam takes on it ("adam_step", LESS).
        query_output: the function that is differentiated for queries; if empty, that of passages.
        evaluation: the queries of R_eval when a query is scored: "all", all except it
            ("leave_one_out"), or the half without it ("disjoint"); if empty, the rule of the
            config (`hessian.evaluation`).
        layer: the layer of the "hidden" retriever: "last" or "middle".
        candidates: comma-separated methods whose first passages "rerank" and "rrf" rank; if empty,
            those of the config (`rerank.candidates`).
    """

    title: str
    corrected: bool = False
    hessian: str = "none"
    unit_norm: bool = True
    retriever: str = "gradient"
    output: str = ""
    curvature: str = "none"
    several: bool = False
    by_learning_rate: bool = False
    passages: str = "plain"
    query_output: str = ""
    evaluation: str = ""
    layer: str = "last"
    candidates: str = ""

    @property
    def gradients(self) -> GradientKind:
        """The kind of gradients of the passages."""
        adam_step = self.passages == "adam_step"
        corrected = self.corrected and not adam_step
        return GradientKind(corrected, self.output, self.curvature, adam_step)

    @property
    def steps_by_adam(self) -> bool:
        """Whether passages' gradients are replaced by Adam's steps."""
        return self.passages == "adam_step"

    @property
    def query_gradients(self) -> GradientKind:
        """The kind of gradients of the queries: LESS takes Adam's steps on passages only."""
        kind = dataclasses.replace(self.gradients, output=self.query_output or self.output)
        if not self.steps_by_adam:
            return kind
        return dataclasses.replace(kind, corrected=False, adam_step=False)

    @property
    def kinds(self) -> tuple[GradientKind, GradientKind]:
        """The kinds of gradients of passages and of queries."""
        return self.gradients, self.query_gradients

    @property
    def takes_gradients(self) -> bool:
        """Whether the method needs the passages' projected gradients."""
        return self.retriever in ("gradient", "gradient_norm")

    @property
    def takes_query_gradients(self) -> bool:
        """Whether the method needs the queries' gradients."""
        return self.takes_gradients or self.retriever == "captured"

    @property
    def compares_gradients(self) -> bool:
        """Whether the method needs gradients, projected or not."""
        return self.takes_query_gradients or self.retriever == "rerank"

    @property
    def takes_candidates(self) -> bool:
        """Whether the method ranks the first passages of other methods."""
        return self.retriever in ("rerank", "rrf")

    @property
    def beyond_plain(self) -> dict[str, object]:
        """The fields other than correction, R, norm and retriever that are not default."""
        plain = ("title", "corrected", "hessian", "unit_norm", "retriever")
        fields = (f for f in dataclasses.fields(self) if f.name not in plain)
        return {f.name: x for f in fields if (x := getattr(self, f.name)) != f.default}

    @property
    def is_plain(self) -> bool:
        """Whether the method needs only gradients of one checkpoint, EK-FAC or R, and a norm."""
        extra = {k: x for k, x in self.beyond_plain.items() if (k, x) != ("curvature", "ekfac")}
        return self.retriever == "gradient" and not extra

    @property
    def searched_by(self) -> str:
        """The name of the retriever in the registry (`tda.run.registry`)."""
        is_sum = self.retriever == "gradient" and not self.shares_scan
        return "sums" if is_sum else self.retriever

    @property
    def shares_scan(self) -> bool:
        """Whether the method uses stored gradients unchanged, and can share a scan with others."""
        plain = self.passages == "plain" and not self.several
        return self.retriever == "gradient" and plain


METHODS = {
    # The paper's rows.
    "annotated": Method("annotated sentences", retriever="annotated"),
    "bm25": Method("BM25", retriever="bm25"),
    "dense": Method("dense retrieval", retriever="dense"),
    "trak": Method(
        "TRAK", hessian="train", unit_norm=False, output="margin", several=True, passages="unsure"
    ),
    # The paper's ablations of TrackStar, numbered as in its table:
    # Exp 1: gradients with optimizer correction (by its second moments), as a dot product.
    # Exp 2: unchanged gradients, as a cosine.
    # Exp 3: gradients with optimizer correction, as a cosine.
    # Exp 4: gradients whitened by R of the passages (R_train), as a cosine.
    # Exp 5: optimizer correction and R_train, as a cosine: the default of `tda.trace`.
    "exp1": Method("Exp 1: optimizer, no norm", corrected=True, unit_norm=False),
    "exp2": Method("Exp 2: norm"),
    "exp3": Method("Exp 3: optimizer, norm", corrected=True),
    "exp4": Method("Exp 4: R_train, norm", hessian="train"),
    "exp5": Method("Exp 5: optimizer, R_train, norm", corrected=True, hessian="train"),
    "trackstar": Method("TrackStar", corrected=True, hessian="mixed"),
    # TrackStar with one change. The first is Exp 5 under a descriptive name: the files of rankings
    # and stores are named by the other fields, so the two share them.
    "trackstar_train": Method("TrackStar, R of the passages", corrected=True, hessian="train"),
    "trackstar_raw": Method("TrackStar without optimizer correction", hessian="mixed"),
    "trackstar_all": Method(
        "TrackStar, R_eval of all queries", corrected=True, hessian="mixed", evaluation="all"
    ),
    "trackstar_leave_one_out": Method(
        "TrackStar, R_eval without the query",
        corrected=True,
        hessian="mixed",
        evaluation="leave_one_out",
    ),
    "trackstar_disjoint": Method(
        "TrackStar, R_eval of other queries", corrected=True, hessian="mixed", evaluation="disjoint"
    ),
    "trackstar_margin": Method(
        "TrackStar, margin", corrected=True, hessian="mixed", output="margin"
    ),
    "trackstar_logit": Method(
        "TrackStar, target logit", corrected=True, hessian="mixed", output="logit"
    ),
    "trackstar_query_logit": Method(
        "TrackStar, logit of queries", corrected=True, hessian="mixed", query_output="logit"
    ),
    # Other gradient methods.
    "grad_dot": Method("gradient dot product", unit_norm=False),
    "grad_cos": Method("gradient cosine"),
    "tracin": Method("TracIn", unit_norm=False, several=True, by_learning_rate=True),
    "less": Method(
        "LESS", corrected=True, several=True, by_learning_rate=True, passages="adam_step"
    ),
    # The gradients of the training's own steps, which `train.capture` keeps.
    "captured": Method(
        "in-run, captured, Adam",
        corrected=True,
        unit_norm=False,
        retriever="captured",
        several=True,
    ),
    "captured_plain": Method(
        "in-run, captured", unit_norm=False, retriever="captured", several=True
    ),
    "ekfac": Method("EK-FAC influence", unit_norm=False, curvature="ekfac"),
    "ekfac_cos": Method("EK-FAC influence, norm", curvature="ekfac"),
    "logra": Method("LoGra", hessian="train", unit_norm=False, curvature="logra"),
    "logra_cos": Method("LoGra, norm", hessian="train", curvature="logra"),
    # Without projection: for the candidates of a first stage, or a small corpus. R is then the
    # product of a matrix's row and column second moments.
    "rerank_dot": Method("dot product, unprojected", retriever="rerank", unit_norm=False),
    "rerank_cos": Method("cosine, unprojected", retriever="rerank"),
    "rerank_exp3": Method("optimizer, norm, unprojected", retriever="rerank", corrected=True),
    "rerank_exp4": Method("R_train, norm, unprojected", retriever="rerank", hessian="train"),
    "rerank_exp5": Method(
        "optimizer, R_train, norm, unprojected",
        retriever="rerank",
        corrected=True,
        hessian="train",
    ),
    "rerank_trackstar": Method(
        "TrackStar, unprojected", retriever="rerank", corrected=True, hessian="mixed"
    ),
    "rerank_ekfac": Method(
        "EK-FAC influence, unprojected", retriever="rerank", unit_norm=False, curvature="ekfac"
    ),
    "rerank_ekfac_cos": Method(
        "EK-FAC influence, norm, unprojected", retriever="rerank", curvature="ekfac"
    ),
    # Words and gradients together.
    "rerank_bm25": Method(
        "TrackStar on BM25's passages, unprojected",
        retriever="rerank",
        corrected=True,
        hessian="mixed",
        candidates="bm25",
    ),
    "rrf": Method(
        "BM25 and TrackStar, reciprocal ranks", retriever="rrf", candidates="bm25,trackstar"
    ),
    # Similarity of hidden states.
    "hidden_last": Method("hidden states, last layer", retriever="hidden"),
    "hidden_middle": Method("hidden states, middle layer", retriever="hidden", layer="middle"),
    # Controls.
    "random": Method("random", retriever="random"),
    "length": Method("passage length", retriever="length"),
    "gradient_norm": Method("gradient norm", retriever="gradient_norm", unit_norm=False),
}

# The rows of the paper's table, in its order.
PAPER = ("annotated", "bm25", "dense", "trak", "exp1", "exp2", "exp3", "exp4", "exp5", "trackstar")
# Those of its table for a corpus without labels.
PAPER_OPEN = ("bm25", "dense", "grad_dot", "grad_cos", "trackstar")


def register(name: str, method: Method) -> None:
    """Registers a method under a name, for this process.

    Raises:
        ValueError: the name belongs to another method.
    """
    if METHODS.setdefault(name, method) != method:
        raise ValueError(f"method {name!r} is registered already; give yours another name")


def parse(names: str) -> dict[str, Method]:
    """Returns the methods of a comma-separated list by name, in its order.

    Raises:
        ValueError: the list is empty, or a name is unknown or repeated.
    """
    listed = [n.strip() for n in names.split(",") if n.strip()]
    if not listed:
        raise ValueError(f"no method is named; there are {', '.join(METHODS)}")
    for name in listed:
        if name not in METHODS:
            raise ValueError(f"unknown method {name!r}; there are {', '.join(METHODS)}")
        if listed.count(name) > 1:
            raise ValueError(f"method {name!r} is named twice")
    return {name: METHODS[name] for name in listed}
