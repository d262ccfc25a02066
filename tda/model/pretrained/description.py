"""A published model as its files describe it: the decoder's settings and the places of tensors."""

import dataclasses

from tda.model.decoder import Decoder, abstract_decoder
from tda.model.pretrained.tensors import Part, Source
from tda.model.settings import DecoderSettings


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A published model, described by its files.

    Attributes:
        arguments: keyword arguments of `DecoderSettings` that the files state, as JSON values.
        parts: the place of each parameter of the unstacked decoder, by path.
        source: the tensors.
        path: the directory or file.
        config: its configuration, unchanged.
    """

    arguments: dict
    parts: dict[str, Part]
    source: Source
    path: str
    config: dict

    @property
    def settings(self) -> DecoderSettings:
        """The decoder's settings.

        Raises:
            ValueError: the files state settings that do not fit each other.
        """
        return DecoderSettings(**self.arguments)

    def abstract_decoder(self) -> Decoder:
        """Returns the decoder with shapes and dtypes in place of arrays."""
        return abstract_decoder(self.settings)
