"""Published models, from Hugging Face directories and GGUF files, as the decoder.

No code of a file is ever run: configurations and tokenizers are JSON, tensors are safetensors or
GGUF, and every tensor of a file has its place in the decoder or is an error that names it.
"""

from tda.model.pretrained.description import Pretrained
from tda.model.pretrained.loading import inspect, load, load_tokenizer, locate, place, state_of
from tda.model.pretrained.tensors import PretrainedError

__all__ = [
    "Pretrained",
    "PretrainedError",
    "inspect",
    "load",
    "load_tokenizer",
    "locate",
    "place",
    "state_of",
]
