"""Every named method as data: which gradients, which R, which norm, which retriever.

A row of a table is a line here; a new row is a new line. Methods with the same gradients share one
store of each checkpoint (`GradientKind`), and one scan over it answers all that need nothing else.
"""

import dataclasses

# What each field may be, with what it means where that is not said by its name.
HESSIANS = ("none", "train", "mixed")
CURVATURES = ("none", "ekfac", "logra")
PASSAGES = ("plain", "unsure", "adam_step")
# The retrievers that look at no query: a method is worth something only above these.
CONTROLS = ("random", "length", "gradient_norm")


@dataclasses.dataclass(frozen=True)
class GradientKind:
    """A kind of gradients: what one store of a checkpoint holds.

    Attributes:
        corrected: gradients are divided by the root of the optimizer's second moments.
        output: the function that is differentiated: "loss", "margin", "logit"; empty: as the run
            says (`gradients.output`).
        curvature: "ekfac" multiplies by the inverse root of EK-FAC's Fisher matrix
            (`tda.gradients.kronecker`) before the projection; "logra" projects on the principal
            components of activations and of their gradients, not at random; "none".
        adam_step: the step that Adam would make on an example alone takes its gradient's place
            (`tda.gradients.adam_steps`).
    """

    corrected: bool = False
    output: str = ""
    curvature: str = "none"
    adam_step: bool = False


@dataclasses.dataclass(frozen=True)
class Method:
    """How one method turns projected gradients, or text, into a ranking.

    Attributes:
        title: what tables call it.
        corrected, output, curvature: see `GradientKind`.
        hessian: R is "none", "train" (R_train) or "mixed" (λ R_eval + (1 − λ) R_train).
        unit_norm: encodings are scaled to norm one, so that a score is a cosine.
        retriever: "gradient", one that needs no projected gradients ("bm25", "dense", "hidden",
            "annotated"), or a control that looks at no query ("random", "length",
            "gradient_norm").
        several: scores are summed over several checkpoints, each with its own R.
        by_learning_rate: in that sum a checkpoint counts by the learning rate up to it, else all
            count alike.
        passages: what is done to a passage's gradient first: nothing ("plain"); a weight of
            1 − p, p its tokens' mean probability ("unsure", TRAK's Q); or the step that Adam makes
            on it takes its place ("adam_step", LESS).
        evaluation: what R_eval is made of for a query: "all" queries, all but this one
            ("leave_one_out"), or a half that it is not in ("disjoint"); empty: as the run says.
        layer: of "hidden": "last" or "middle".
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
    evaluation: str = ""
    layer: str = "last"

    @property
    def gradients(self) -> GradientKind:
        """The kind of gradients of the passages."""
        adam_step = self.passages == "adam_step"
        corrected = self.corrected and not adam_step
        return GradientKind(corrected, self.output, self.curvature, adam_step)

    @property
    def steps_by_adam(self) -> bool:
        """Whether the moments of Adam's state make its passages' gradients."""
        return self.passages == "adam_step"

    @property
    def query_gradients(self) -> GradientKind:
        """The kind of gradients of the queries: LESS steps by Adam on passages alone."""
        if not self.steps_by_adam:
            return self.gradients
        return dataclasses.replace(self.gradients, corrected=False, adam_step=False)

    @property
    def takes_gradients(self) -> bool:
        """Whether it needs the passages' gradients."""
        return self.retriever in ("gradient", "gradient_norm")

    @property
    def beyond_plain(self) -> dict[str, object]:
        """What it asks for, by field, beyond a correction, R, norm and retriever."""
        plain = ("title", "corrected", "hessian", "unit_norm", "retriever")
        fields = (f for f in dataclasses.fields(self) if f.name not in plain)
        return {f.name: x for f in fields if (x := getattr(self, f.name)) != f.default}

    @property
    def is_plain(self) -> bool:
        """Whether correction, R and norm are all that it asks of one checkpoint's gradients."""
        return self.retriever == "gradient" and not self.beyond_plain

    @property
    def searched_by(self) -> str:
        """The name of the retriever in the registry (`tda.run.registry`)."""
        is_sum = self.retriever == "gradient" and not self.shares_scan
        return "sums" if is_sum else self.retriever

    @property
    def shares_scan(self) -> bool:
        """Whether passages are taken as the store has them, so that others scan it too."""
        plain = self.passages == "plain" and not self.several
        return self.retriever == "gradient" and plain


METHODS = {
    # The paper's rows.
    "annotated": Method("annotated sentences", retriever="annotated"),
    "bm25": Method("BM25", retriever="bm25"),
    "dense": Method("dense retrieval", retriever="dense"),
    "trak": Method(
        "TRAK",
        hessian="train",
        unit_norm=False,
        output="margin",
        several=True,
        passages="unsure",
    ),
    # The paper's ablations of TrackStar, as its table numbers them. "Optimizer" is the correction
    # by the optimizer's second moments, "R_train" R of the passages, "norm" a unit norm (a cosine).
    "exp1": Method("Exp 1: optimizer, no norm", corrected=True, unit_norm=False),
    "exp2": Method("Exp 2: norm"),
    "exp3": Method("Exp 3: optimizer, norm", corrected=True),
    "exp4": Method("Exp 4: R_train, norm", hessian="train"),
    "exp5": Method("Exp 5: optimizer, R_train, norm", corrected=True, hessian="train"),
    "trackstar": Method("TrackStar", corrected=True, hessian="mixed"),
    # TrackStar with one thing changed. The first is Exp 5 under a name that says what it is.
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
        "TrackStar, R_eval of other queries",
        corrected=True,
        hessian="mixed",
        evaluation="disjoint",
    ),
    "trackstar_margin": Method(
        "TrackStar, margin", corrected=True, hessian="mixed", output="margin"
    ),
    "trackstar_logit": Method(
        "TrackStar, target logit", corrected=True, hessian="mixed", output="logit"
    ),
    # Other gradient methods.
    "grad_dot": Method("gradient dot product", unit_norm=False),
    "grad_cos": Method("gradient cosine"),
    "tracin": Method("TracIn", unit_norm=False, several=True, by_learning_rate=True),
    "less": Method(
        "LESS", corrected=True, several=True, by_learning_rate=True, passages="adam_step"
    ),
    "ekfac": Method("EK-FAC influence", unit_norm=False, curvature="ekfac"),
    "ekfac_cos": Method("EK-FAC influence, norm", curvature="ekfac"),
    "logra": Method("LoGra", hessian="train", unit_norm=False, curvature="logra"),
    "logra_cos": Method("LoGra, norm", hessian="train", curvature="logra"),
    # Likeness of what the model computes.
    "hidden_last": Method("hidden states, last layer", retriever="hidden"),
    "hidden_middle": Method("hidden states, middle layer", retriever="hidden", layer="middle"),
    # Controls.
    "random": Method("random", retriever="random"),
    "length": Method("passage length", retriever="length"),
    "gradient_norm": Method("gradient norm", retriever="gradient_norm", unit_norm=False),
}

# The rows of the paper's table, in its order.
PAPER = (
    "annotated",
    "bm25",
    "dense",
    "trak",
    "exp1",
    "exp2",
    "exp3",
    "exp4",
    "exp5",
    "trackstar",
)


def register(name: str, method: Method) -> None:
    """Makes a method of one's own known by name, in this process.

    Raises:
        ValueError: another method has the name.
    """
    if METHODS.setdefault(name, method) != method:
        raise ValueError(f"method {name!r} is registered already; give yours another name")


def parse(names: str) -> dict[str, Method]:
    """The methods of a comma-separated list, by name, in its order.

    Raises:
        ValueError: a name is unknown, given twice, or none is given.
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
