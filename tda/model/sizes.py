"""Named sizes of the decoder, as keyword arguments of `tda.model.settings.DecoderSettings`."""

SIZES = {
    "micro": dict(width=64, layers=4, heads=4, kv_heads=4, head_width=16, ff_width=192),
    "tiny": dict(width=128, layers=4, heads=4, kv_heads=4, head_width=32, ff_width=384),
    "mini": dict(width=192, layers=6, heads=3, kv_heads=3, head_width=64, ff_width=768),
    "small": dict(width=256, layers=8, heads=4, kv_heads=4, head_width=64, ff_width=1024),
    "154m": dict(
        width=768, layers=12, heads=12, kv_heads=12, head_width=64, ff_width=2736, tied=False
    ),
    "1b": dict(
        width=2048, layers=16, heads=32, kv_heads=8, head_width=64, ff_width=7168, tied=False
    ),
    "8b": dict(
        width=4096, layers=32, heads=32, kv_heads=8, head_width=128, ff_width=14336, tied=False
    ),
}


def size(name: str) -> dict:
    """Returns the settings of a named size, except for the vocabulary's.

    Raises:
        ValueError: there is no such size; the message lists the known ones.
    """
    if name not in SIZES:
        raise ValueError(f"unknown model size {name!r}; there are {', '.join(SIZES)}")
    return dict(SIZES[name])
