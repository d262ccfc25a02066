"""Two-sided random projections, pooled over blocks of layers (Chang et al. 2024, section 3).

A gradient G of an M × N matrix becomes AᵀGB with independent A (M × k) and B (N × k) of variance
1/k, so that ⟨AᵀGB, AᵀHB⟩ is ⟨G, H⟩ in expectation for every M and N. The projections of a group's
matrices are added up; the cross terms vanish in expectation.

A matrix is a function of (seed, name, side) alone. Its bits come from Philox, whose stream is fixed
by its published definition, so no device and no library version changes them.
"""

import collections
import dataclasses
import hashlib

import jax
import jax.numpy as jnp
import numpy as np

from tda.gradients import sites

FAMILIES = ("gaussian", "rademacher")
DEFAULT_BLOCKS = 8
POOLINGS = ("blocks", "layer", "matrix")


@dataclasses.dataclass(frozen=True)
class Projection:
    """How gradients are projected and pooled.

    Attributes:
        side: k; each block has k × k dimensions.
        blocks: number of contiguous blocks that the layers are split into.
        seed: of all random matrices.
        family: of their entries: "gaussian" or "rademacher".
        pooling: which matrices share a block: those of a block of layers and of one kind
            ("blocks"), those of one layer ("layer"), or none ("matrix").
    """

    side: int = 16
    blocks: int = DEFAULT_BLOCKS
    seed: int = 0
    family: str = "gaussian"
    pooling: str = "blocks"

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise ValueError(f"unknown family {self.family!r}; use {', '.join(FAMILIES)}")
        if self.pooling not in POOLINGS:
            raise ValueError(f"unknown pooling {self.pooling!r}; use {', '.join(POOLINGS)}")
        if self.side < 1 or self.blocks < 1:
            raise ValueError(f"side={self.side} and blocks={self.blocks} must be positive")


def random_matrix(seed: int, name: str, end: str, rows: int, side: int, family: str) -> np.ndarray:
    """Returns the projection matrix of one end ("left" or "right") of the matrix `name`.

    Returns:
        float32 [rows, side], entries of mean 0 and variance 1/side.
    """
    digest = hashlib.sha256(f"{seed}|{name}|{end}|{family}".encode()).digest()
    bits = np.random.Philox(key=np.frombuffer(digest[:16], np.uint64))
    count = rows * side
    if family == "rademacher":
        flips = np.unpackbits(bits.random_raw(-(-count // 64)).view(np.uint8))[:count]
        entries = flips.astype(np.float64) * 2 - 1
    else:
        # Box–Muller; 53 bits make a uniform number in (0, 1].
        half = -(-count // 2)
        uniform = ((bits.random_raw(2 * half) >> np.uint64(11)) + np.uint64(1)) * 2.0**-53
        radius = np.sqrt(-2.0 * np.log(uniform[:half]))
        angle = 2.0 * np.pi * uniform[half:]
        entries = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]
    return (entries / np.sqrt(side)).astype(np.float32).reshape(rows, side)


@dataclasses.dataclass(frozen=True)
class Layout:
    """Which matrices are pooled into which block of an encoding.

    Attributes:
        blocks: names such as "0/attention", in the order in which encodings hold them.
        side: k.
        members: for each site's path, the block number of each of its layers.
    """

    blocks: tuple[str, ...]
    side: int
    members: dict[str, tuple[int, ...]]

    @property
    def width(self) -> int:
        """E, the numbers in an encoding."""
        return len(self.blocks) * self.side**2

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Each block's (k, k), or (k²,) where several matrices are added up (`tda.hessian`)."""
        counts = collections.Counter(b for blocks in self.members.values() for b in blocks)
        matrix, pooled = (self.side, self.side), (self.side**2,)
        return tuple(matrix if counts[b] == 1 else pooled for b in range(len(self.blocks)))

    @property
    def slices(self) -> list[slice]:
        """The columns of each block in an encoding."""
        size = self.side**2
        return [slice(i * size, (i + 1) * size) for i in range(len(self.blocks))]


def layout(chosen: list[sites.Site], projection: Projection) -> Layout:
    """Assigns every matrix to a block; by default, blocks of layers with every kind of layer apart.

    A matrix outside any layer (an embedding, the head) has a block of its kind's own.

    Raises:
        ValueError: more blocks are asked for than there are layers.
    """
    numbers = sorted({sites.layer_of(n) for s in chosen for n in s.names()} - {None})
    pooled = projection.pooling == "blocks"
    if pooled and numbers and projection.blocks > len(numbers):
        raise ValueError(
            f"blocks={projection.blocks} exceeds the model's {len(numbers)} layers; lower it"
        )
    block_of_layer = {n: i * projection.blocks // len(numbers) for i, n in enumerate(numbers)}

    def block(site: sites.Site, name: str) -> tuple[int, str]:
        """Returns a key in whose order the blocks stand, and the block's name."""
        layer = sites.layer_of(name)
        if projection.pooling == "matrix":
            return -1 if layer is None else layer, name
        if layer is None:
            return -1, site.group
        if pooled:
            return block_of_layer[layer], f"{block_of_layer[layer]}/{site.group}"
        return layer, f"{layer}"

    by_path = {s.path: [block(s, n) for n in s.names()] for s in chosen}
    ordered = sorted({b for names in by_path.values() for b in names})
    index = {b: i for i, b in enumerate(ordered)}
    return Layout(
        tuple(name for _, name in ordered),
        projection.side,
        {path: tuple(index[b] for b in names) for path, names in by_path.items()},
    )


def matrices(site: sites.Site, projection: Projection) -> tuple[np.ndarray, np.ndarray]:
    """Returns A and B of a site, float32 [(L,) M, k] and [(L,) N, k]."""

    def stacked(end: str, rows: int) -> np.ndarray:
        p, names = projection, site.names()
        out = np.empty((len(names), rows, p.side), np.float32)
        for i, name in enumerate(names):
            out[i] = random_matrix(p.seed, name, end, rows, p.side, p.family)
        return out[0] if site.stack is None else out

    return stacked("left", site.rows), stacked("right", site.columns)


def pool(layout: Layout, projected: dict[sites.Site, jax.Array]) -> jax.Array:
    """Adds up the projections of each block's matrices: float32 [B, E] of [(L,) B, k, k] each."""
    parts: list[list[jax.Array]] = [[] for _ in layout.blocks]
    for site, x in projected.items():
        x_LxBxPxP = x[None] if site.stack is None else x
        for block in sorted(set(layout.members[site.path])):
            layers = [i for i, b in enumerate(layout.members[site.path]) if b == block]
            parts[block].append(jnp.sum(x_LxBxPxP[jnp.asarray(layers)], axis=0))
    pooled: list = [sum(p) for p in parts]
    return jnp.concatenate([p.reshape(p.shape[0], -1) for p in pooled], axis=-1)
