"""Rotary position encoding: its periods, their stretching, and two layouts of pairs."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

# Required and optional keys of each kind of scaling.
_SCALINGS = {
    "linear": ("factor", ""),
    "factors": ("factors", ""),
    "llama3": ("factor low_freq_factor high_freq_factor original_max_position_embeddings", ""),
    "yarn": (
        "factor original_max_position_embeddings",
        "beta_fast beta_slow attention_factor truncate",
    ),
    "longrope": ("short_factor long_factor attention_factor original_max_position_embeddings", ""),
    "dynamic": ("factor max_position_embeddings", ""),
}
# Those whose numbers periods are multiplied or divided by.
_POSITIVE = {
    "factor",
    "factors",
    "short_factor",
    "long_factor",
    "original_max_position_embeddings",
    "max_position_embeddings",
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rotation:
    """How fast each pair of features turns with the position. Axes may be stacked over layers."""

    inverse_period_K: jax.Array
    """Radians per position, float32 [K / 2]; features beyond these pairs are not rotated."""
    factor: float | jax.Array = 1.0
    """Factor of the rotated features."""


def rotation(
    width: int, base: float = 10_000.0, scaling: dict | None = None, T: int = 0
) -> Rotation:
    """Returns base^(−2i/K) for the pairs i of `width` = K features (Su et al. 2021, section 3.2.2).

    Args:
        width: number of rotated features, even.
        base: base of the periods.
        scaling: how the periods are stretched: a "kind" with its keys in `_SCALINGS`. "linear"
            (Chen et al. 2023); "llama3", only long periods; "yarn" (Peng et al. 2023, section 3);
            "longrope" (Ding et al. 2024), by a factor for each pair, other factors beyond the
            original positions; "dynamic", by a larger base beyond them; or "factors", one for each
            pair. `check` refuses others.
        T: number of positions, for "longrope" and "dynamic". As in transformers, padding counts.
    """
    if scaling is not None and scaling["kind"] == "dynamic":
        # The base that stretches the longest period by the ratio of T to the trained length.
        excess = max(T / scaling["max_position_embeddings"], 1.0) - 1.0
        base = base * (1.0 + scaling["factor"] * excess) ** (width / (width - 2))
        scaling = None
    inverse = base ** (-jnp.arange(width // 2, dtype=jnp.float32) / (width // 2))
    if scaling is None:
        return Rotation(inverse)
    kind = scaling["kind"]
    if kind == "factors":
        return Rotation(inverse / jnp.asarray(scaling["factors"], jnp.float32))
    if kind == "longrope":
        is_long = T > scaling["original_max_position_embeddings"]
        factors = scaling["long_factor" if is_long else "short_factor"]
        stretched = inverse / jnp.asarray(factors, jnp.float32)
        return Rotation(stretched, float(scaling["attention_factor"]))
    factor = scaling["factor"]
    if kind == "linear":
        return Rotation(inverse / factor)
    if kind == "llama3":
        # A pair's turns over the context length of the first training.
        turns = inverse * scaling["original_max_position_embeddings"] / (2 * math.pi)
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        unscaled = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
        return Rotation(inverse / factor * (1 - unscaled) + inverse * unscaled)
    unscaled = 1 - _yarn_ramp(width, base, scaling)
    attention = scaling.get("attention_factor")
    if attention is None:
        attention = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
    return Rotation(inverse / factor * (1 - unscaled) + inverse * unscaled, attention)


def check(width: int, scaling: dict | None) -> None:
    """Checks the arguments of `rotation`.

    Raises:
        ValueError: an odd width, or a scaling with an unknown kind, a missing or an unknown key, or
            a number that is not above 0.
    """
    if width % 2:
        raise ValueError(f"{width} features of a head are rotated; rotary encoding needs pairs")
    if scaling is None:
        return
    kind = scaling.get("kind")
    if kind not in _SCALINGS:
        raise ValueError(f"unknown rope_scaling kind {kind!r}; use {', '.join(_SCALINGS)}")
    required, optional = (set(keys.split()) for keys in _SCALINGS[kind])
    keys = scaling.keys() - {"kind"}
    if required - keys or keys - required - optional:
        raise ValueError(
            f"rope_scaling of kind {kind!r} needs {', '.join(sorted(required))}"
            + (f" and may have {', '.join(sorted(optional))}" if optional else "")
            + f"; it has {', '.join(sorted(keys))}"
        )
    for key in ("factors", "short_factor", "long_factor"):
        if key in scaling and len(scaling[key]) != width // 2:
            raise ValueError(
                f"rope_scaling has {len(scaling[key])} numbers in {key!r}; give one for each of "
                f"{width // 2} pairs of features"
            )
    for key in _POSITIVE & keys:
        values = np.asarray(scaling[key])
        if values.dtype.kind not in "iuf" or not (values > 0).all():
            raise ValueError(
                f"{key!r} of rope_scaling is {scaling[key]!r}; give numbers that are above 0"
            )


def _yarn_ramp(width: int, base: float, scaling: dict):
    """Returns 0 for pairs with many turns, which stay, 1 for stretched pairs, linear between."""
    length = scaling["original_max_position_embeddings"]

    def pair(turns):
        return width * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = pair(scaling.get("beta_fast", 32)), pair(scaling.get("beta_slow", 1))
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    span = high - low if high != low else 0.001
    return jnp.clip((jnp.arange(width // 2, dtype=jnp.float32) - low) / span, 0.0, 1.0)


def rotary(x_BxTxHxK, rotation: Rotation, layout: str = "half"):
    """Rotates heads of width K by their positions (Su et al. 2021, eq. 34).

    Angles are float32 whatever the dtype of `x`; positions count from 0.

    Args:
        x_BxTxHxK: queries or keys.
        rotation: the angles; features after the last pair are not rotated.
        layout: which features form a pair: i and i + K/2 ("half"), or 2i and 2i + 1
            ("interleaved").
    """
    inverse_period = rotation.inverse_period_K
    width = 2 * inverse_period.shape[-1]
    # In bfloat16, with 8 bits, neighbouring positions from 256 on would have the same angle.
    angle_TxK = jnp.arange(x_BxTxHxK.shape[1], dtype=jnp.float32)[:, None] * inverse_period
    sin, cos = jnp.sin(angle_TxK)[None, :, None], jnp.cos(angle_TxK)[None, :, None]
    # A factor of 1 costs nothing; a stacked one is an array of unknown value.
    if not (isinstance(rotation.factor, float) and rotation.factor == 1.0):
        sin, cos = sin * rotation.factor, cos * rotation.factor
    x, rest = x_BxTxHxK[..., :width], x_BxTxHxK[..., width:]
    x = x.astype(jnp.float32)
    a, b = (x[..., ::2], x[..., 1::2]) if layout == "interleaved" else jnp.split(x, 2, axis=-1)
    pair = [a * cos - b * sin, b * cos + a * sin]
    if layout == "interleaved":
        y = jnp.stack(pair, axis=-1).reshape(x.shape)
    else:
        y = jnp.concatenate(pair, axis=-1)
    y = y.astype(x_BxTxHxK.dtype)
    return jnp.concatenate([y, rest], axis=-1) if rest.shape[-1] else y
