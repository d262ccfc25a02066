"""Live questions: one prompt and target at a time, answered from a model and its corpus's store."""

from tda.live.roots import Encoded, Hessian, finished_stores
from tda.live.speaker import Speaker
from tda.live.tracer import Tracer

__all__ = ["Encoded", "Hessian", "Speaker", "Tracer", "finished_stores"]
