"""Training-data attribution for language-model pretraining, in JAX.

import tda

model, tokenizer = tda.load("SmolLM2-135M")
print(tda.trace(model, "corpus.jsonl", [("Paris lies in", "France")], tokenizer=tokenizer))
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tda.api import encode, load, trace
    from tda.gradients.capture import Capture
    from tda.gradients.moments.second_moments import second_moments
    from tda.gradients.projection import Projection
    from tda.training.recipe import TrainingRecipe
    from tda.training_trace import trace_training

__version__ = "0.1.0"
__all__ = [
    "Capture",
    "Projection",
    "TrainingRecipe",
    "encode",
    "load",
    "second_moments",
    "trace",
    "trace_training",
]

_WHERE = {
    "Capture": "tda.gradients.capture",
    "encode": "tda.api",
    "load": "tda.api",
    "trace": "tda.api",
    "Projection": "tda.gradients.projection",
    "second_moments": "tda.gradients.moments.second_moments",
    "trace_training": "tda.training_trace",
    "TrainingRecipe": "tda.training.recipe",
}


def __getattr__(name: str) -> Any:
    # On first use: programs that join other processes do so before jax computes anything.
    if name in _WHERE:
        return getattr(importlib.import_module(_WHERE[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
