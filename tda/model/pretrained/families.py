"""Families of models: configurations as the decoder's settings, tensors as its parameters.

A family is a function from a configuration (`configurations`) to the decoder's keyword arguments,
and names of tensors (`layouts`).
"""

import dataclasses
import re
from collections.abc import Callable

from tda.model.pretrained import configurations, layouts
from tda.model.pretrained.tensors import Part, PretrainedError


@dataclasses.dataclass(frozen=True)
class Family:
    """One family.

    Attributes:
        arguments: of `tda.model.decoder.Decoder`, from a `configurations.Config`.
        layer: parts of one layer by path of parameter, from the arguments and the layer's prefix.
        outside: parts outside of the layers, likewise, from the arguments and the prefix.
        base: what the names of the tensors begin with, where the model was saved with its head.
        layers: what stands before a layer's number.
        ignored: a regular expression of tensors that are no parameters.
    """

    arguments: Callable
    layer: Callable
    outside: Callable
    base: str
    layers: str
    ignored: str = r"$^"


def _like_llama(arguments: Callable) -> Family:
    ignored = r"rotary_emb\.inv_freq$"
    return Family(
        arguments, layouts.llama_layer, layouts.llama_outside, "model.", "layers.", ignored
    )


FAMILIES = {
    "LlamaForCausalLM": _like_llama(configurations.llama),
    "MistralForCausalLM": _like_llama(configurations.mistral),
    "Qwen2ForCausalLM": _like_llama(configurations.qwen2),
    "Qwen3ForCausalLM": _like_llama(configurations.qwen3),
    "Olmo2ForCausalLM": _like_llama(configurations.olmo2),
    "Gemma3ForCausalLM": _like_llama(configurations.gemma3),
    "GPT2LMHeadModel": Family(
        configurations.gpt2,
        layouts.gpt2_layer,
        layouts.gpt2_outside,
        "transformer.",
        "h.",
        r"attn\.(masked_)?bias$",
    ),
    "GPTNeoXForCausalLM": Family(
        configurations.neox,
        layouts.neox_layer,
        layouts.neox_outside,
        "gpt_neox.",
        "layers.",
        r"attention\.(masked_)?bias$|rotary_emb\.inv_freq$",
    ),
}


def family(config: dict, where: str) -> Family:
    """The family of a configuration, by its `architectures`.

    Raises:
        PretrainedError: it names none, or one that is not known; the message lists those known.
    """
    names = config.get("architectures") or []
    for name in names:
        if name in FAMILIES:
            return FAMILIES[name]
    raise PretrainedError(
        f"{where}: the architecture {', '.join(map(str, names)) or 'is not named; it'} is not "
        f"known here; known are {', '.join(FAMILIES)}"
    )


def parts(found: Family, arguments: dict, names) -> dict[str, Part]:
    """The part of every parameter of the unstacked decoder, by its path.

    Args:
        found: the family.
        arguments: of the decoder.
        names: of the tensors; a model that was saved without its head has no `base` in them.
    """
    base = found.base if any(n.startswith(found.base) for n in names) else ""
    out = dict(found.outside(arguments, base))
    for i in range(arguments["layers"]):
        layer = found.layer(arguments, f"{base}{found.layers}{i}.")
        out |= {f"layers/{i}/{path}": part for path, part in layer.items()}
    return out


def is_ignored(found: Family, tensor: str) -> bool:
    """Whether a tensor is a buffer that holds nothing learned."""
    return re.search(found.ignored, tensor) is not None
