"""Live questions: one prompt and target at a time, answered from a model and its corpus's store."""

from tda.live.encoded import Encoded, finished_stores
from tda.live.questions import Question
from tda.live.speaker import Speaker
from tda.live.tracer import Tracer
from tda.run.remembered import Known

__all__ = ["Encoded", "Known", "Question", "Speaker", "Tracer", "finished_stores"]
