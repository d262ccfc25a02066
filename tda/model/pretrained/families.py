"""Families of models: configurations as the decoder's settings, tensors as its parameters."""

import dataclasses
import re
from collections.abc import Callable, Iterable

from tda.model.pretrained import architectures, configurations, layouts
from tda.model.pretrained.tensors import Part, PretrainedError
from tda.model.settings import DecoderSettings

# Names of the output matrix.
HEADS = ("lm_head.weight", "embed_out.weight")


@dataclasses.dataclass(frozen=True)
class Family:
    """One family.

    Attributes:
        arguments: from a `configurations.Config` to keyword arguments of `DecoderSettings`.
        layer: from the settings and a layer's prefix to the layer's parts by path of parameter.
        outside: from the settings and the model's prefix to the parts outside of the layers.
        model_prefixes: possible beginnings of tensor names in a model saved with its head.
        layers_prefix: the part of a tensor's name before a layer's number.
        ignored: a regular expression for tensors that are no parameters.
    """

    arguments: Callable[[configurations.Config], dict]
    layer: Callable[[DecoderSettings, str], dict[str, Part]]
    outside: Callable[[DecoderSettings, str], dict[str, Part]]
    model_prefixes: tuple[str, ...]
    layers_prefix: str = "layers."
    ignored: str = r"^$"

    def is_ignored(self, tensor: str) -> bool:
        """Returns whether a tensor is no parameter of the decoder, such as a buffer."""
        return re.search(self.ignored, tensor) is not None

    def parts(self, settings: DecoderSettings, tensors: Iterable[str]) -> dict[str, Part]:
        """Returns the part of every parameter of the unstacked decoder, by its path.

        Args:
            settings: the decoder's.
            tensors: names of all tensors.
        """
        # A model that was saved without its head has no prefix.
        prefixes = (p for p in self.model_prefixes if any(t.startswith(p) for t in tensors))
        prefix = next(prefixes, "")
        parts = dict(self.outside(settings, prefix))
        for i in range(settings.layers):
            layer = self.layer(settings, f"{prefix}{self.layers_prefix}{i}.")
            parts |= {f"layers/{i}/{path}": part for path, part in layer.items()}
        embedding = parts["embedding/embedding"]
        if settings.tied and embedding.tensor not in tensors:
            # A tied matrix may be saved only under the name of the output matrix.
            for head in (name for name in HEADS if name in tensors):
                parts["embedding/embedding"] = dataclasses.replace(embedding, tensor=head)
        return parts


def _like_llama(
    arguments: Callable[[configurations.Config], dict], layer=layouts.llama_layer
) -> Family:
    return Family(
        arguments,
        layer,
        layouts.llama_outside,
        model_prefixes=("model.",),
        ignored=r"rotary_emb\.inv_freq$",
    )


FAMILIES = {
    "LlamaForCausalLM": _like_llama(architectures.llama),
    "MistralForCausalLM": _like_llama(architectures.mistral),
    "Qwen2ForCausalLM": _like_llama(architectures.qwen2),
    "Qwen3ForCausalLM": _like_llama(architectures.qwen3),
    "SmolLM3ForCausalLM": _like_llama(architectures.smollm3),
    "StableLmForCausalLM": _like_llama(architectures.stablelm),
    "Phi3ForCausalLM": _like_llama(architectures.phi3, layouts.phi3_layer),
    "OlmoForCausalLM": _like_llama(architectures.olmo),
    "Olmo2ForCausalLM": _like_llama(architectures.olmo2),
    "Olmo3ForCausalLM": _like_llama(architectures.olmo3),
    "GemmaForCausalLM": _like_llama(architectures.gemma),
    "Gemma2ForCausalLM": _like_llama(architectures.gemma2),
    "Gemma3ForCausalLM": _like_llama(architectures.gemma3),
    # The gradient of a text in the vision parameters is zero.
    "Gemma3ForConditionalGeneration": dataclasses.replace(
        _like_llama(architectures.gemma3_of_pictures),
        model_prefixes=("language_model.model.", "model.language_model."),
        ignored=r"^(model\.)?(vision_tower|multi_modal_projector)\.",
    ),
    "Starcoder2ForCausalLM": _like_llama(architectures.starcoder2, layouts.starcoder2_layer),
    "OPTForCausalLM": Family(
        architectures.opt,
        layouts.opt_layer,
        layouts.opt_outside,
        model_prefixes=("model.decoder.", "decoder."),
    ),
    "GPTNeoForCausalLM": Family(
        architectures.gpt_neo,
        layouts.gpt_neo_layer,
        layouts.gpt2_outside,
        model_prefixes=("transformer.",),
        layers_prefix="h.",
        ignored=r"attn\.attention\.(masked_)?bias$",
    ),
    "GPT2LMHeadModel": Family(
        architectures.gpt2,
        layouts.gpt2_layer,
        layouts.gpt2_outside,
        model_prefixes=("transformer.",),
        layers_prefix="h.",
        ignored=r"attn\.(masked_)?bias$",
    ),
    "GPTNeoXForCausalLM": Family(
        architectures.neox,
        layouts.neox_layer,
        layouts.neox_outside,
        model_prefixes=("gpt_neox.",),
        ignored=r"attention\.(masked_)?bias$|rotary_emb\.inv_freq$",
    ),
}


# What the decoder lacks for other common architectures.
_LACKING = {
    "PhiForCausalLM": "one norm before attention and MLP in parallel",
    "GPTJForCausalLM": "one norm before attention and MLP in parallel",
    "CohereForCausalLM": "one norm before attention and MLP in parallel",
    "FalconForCausalLM": "one norm before attention and MLP in parallel",
    "BloomForCausalLM": "positions as biases of the scores (ALiBi)",
    "MptForCausalLM": "positions as biases of the scores (ALiBi)",
    "GPTBigCodeForCausalLM": "one key and value for all heads of learned positions",
    "GraniteForCausalLM": "factors of the residual branches and of the logits",
    "NemotronForCausalLM": "squared ReLU in the MLP",
    "MambaForCausalLM": "state spaces instead of attention",
    "Mamba2ForCausalLM": "state spaces instead of attention",
    "RwkvForCausalLM": "recurrence instead of attention",
    "Gemma3nForCausalLM": "embeddings and layers that alternate (Gemma 3n)",
    "DeepseekV2ForCausalLM": "attention by latent keys and values",
    "DeepseekV3ForCausalLM": "attention by latent keys and values",
    "Llama4ForConditionalGeneration": "experts and attention in chunks",
    "Qwen2_5_VLForConditionalGeneration": "rotary positions of pictures",
}


def find_family(config: configurations.Config) -> Family:
    """Returns the family that a configuration names in `architectures`.

    Raises:
        PretrainedError: it names none, or an unknown one; the message lists the known ones.
    """
    names = config.get("architectures", [])
    names = [names] if isinstance(names, str) else names
    for name in names:
        if name in FAMILIES:
            return FAMILIES[name]
    for name in names:
        if name in _LACKING:
            raise PretrainedError(
                f"{config.path}: {name} is not supported, since the decoder lacks what it needs: "
                f"{_LACKING[name]}; your own module of it can be traced (docs/own_model.md)"
            )
    for key in ("num_experts", "num_local_experts", "n_routed_experts"):
        if config.get(key):
            raise PretrainedError(
                f"{config.path}: {', '.join(names)} has {config[key]} experts in a layer ({key}); "
                "the decoder has one MLP in each, so that experts would be left out; trace a model "
                "without experts, or your own module of it (docs/own_model.md)"
            )
    raise PretrainedError(
        f"{config.path}: the architecture {', '.join(map(str, names)) or 'is not named; it'} is "
        f"not known here; known are {', '.join(FAMILIES)}"
    )
