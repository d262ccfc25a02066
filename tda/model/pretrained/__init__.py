"""Published models, from Hugging Face directories and GGUF files, as the decoder.

No code from a file is ever run: configurations and tokenizers are JSON, tensors are safetensors or
GGUF. A tensor without a place in the decoder is an error that names it.
"""

from tda.model.pretrained.description import Pretrained
from tda.model.pretrained.loading import inspect, load, load_tokenizer, locate, place, state_of
from tda.model.pretrained.tensors import PretrainedError
