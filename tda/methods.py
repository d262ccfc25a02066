"""Every named method as data: which correction, which R, which norm, which retriever.

A row of the paper's table 1 is a line here (Chang et al. 2024). Methods with the same correction
share one store, and one scan over it answers them all.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Method:
    """How one method turns projected gradients, or text, into a ranking.

    Attributes:
        corrected: gradients are divided by the root of the optimizer's second moments.
        hessian: R is "none", "train" (R_train) or "mixed" (λ R_eval + (1 − λ) R_train).
        unit_norm: encodings are scaled to norm one, so that a score is a cosine.
        retriever: "gradient" or "bm25".
        title: what tables call it.
    """

    title: str
    corrected: bool = False
    hessian: str = "none"
    unit_norm: bool = True
    retriever: str = "gradient"


METHODS = {
    "bm25": Method("BM25", retriever="bm25"),
    "grad_dot": Method("gradient dot product", unit_norm=False),
    "grad_cos": Method("gradient cosine"),
    "exp1": Method("Exp 1: optimizer, no norm", corrected=True, unit_norm=False),
    "exp2": Method("Exp 2: norm"),
    "exp3": Method("Exp 3: optimizer, norm", corrected=True),
    "exp4": Method("Exp 4: R_train, norm", hessian="train"),
    "exp5": Method("Exp 5: optimizer, R_train, norm", corrected=True, hessian="train"),
    "trackstar_raw": Method("TrackStar without optimizer correction", hessian="mixed"),
    "trackstar": Method("TrackStar", corrected=True, hessian="mixed"),
}


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
