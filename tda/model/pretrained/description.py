"""A published model as its files describe it: the decoder's settings, and where its tensors are."""

import dataclasses

from flax import nnx

from tda.model.decoder import Decoder
from tda.model.pretrained.tensors import Part, Source


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """What the files of a model say of it.

    Attributes:
        arguments: of `tda.model.decoder.Decoder`, plain values.
        parts: where each parameter of the unstacked decoder is, by path.
        source: the tensors.
        where: the directory or file.
        config: its configuration, as it is written there.
    """

    arguments: dict
    parts: dict[str, Part]
    source: Source
    where: str
    config: dict

    def shapes(self) -> nnx.Module:
        """The decoder without numbers: shapes and dtypes in the places of arrays."""
        return nnx.eval_shape(lambda: Decoder(**self.arguments, rngs=nnx.Rngs(0)))


def some(names: list[str], most: int = 6) -> str:
    """The first of many names, for a message."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
