"""How an approximate index is built and searched, and the rule that chooses it from a size."""

import dataclasses

# Numbers of all rows below which exact search is quick enough.
_EXACT_NUMBERS = 1 << 28
# Codes of a row, at least.
_CODES = 1024
_TRAINING_ROWS = 5_000
# Rows of a part, at least.
_PART_ROWS = 1_000
REORDER_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What ScaNN is told (Guo et al. 2020, *Accelerating large-scale inference with anisotropic
    vector quantization*; Sun et al. 2023, *SOAR*).

    Attributes:
        part_rows: rows of the corpus that are indexed together, at most; what bounds memory.
        dims_per_block: numbers of an encoding that one 4-bit code stands for; 0 codes nothing, and
            every row of a leaf that is searched is scored by its float32 encoding.
        threshold: of anisotropic quantisation: the error along a row is weighted as for scores of
            at least `threshold` times its norm; 0 weights all errors alike.
        reorder: rows that the codes rank first and that are scored again by their encodings, per
            part; 0 leaves the scores to the codes.
        reorder_dtype: of the encodings that are kept for that: "float32", "bfloat16" or "int8".
        leaves: partitions of a part's rows by k-means; 0 searches all rows.
        leaves_to_search: how many of them a query looks into.
        residual: whether codes are of a row less its leaf's centre.
        soar: SOAR's λ: every row is in a second leaf, chosen for the queries that miss the first;
            0 keeps it in one.
        training_rows: rows of a part that codes and leaves are learned from, at most.
        training_iterations: of k-means.

    Raises:
        ValueError: a number is out of its range, or two do not go together; names it.
    """

    part_rows: int
    dims_per_block: int = 8
    threshold: float = 0.2
    reorder: int = 200
    reorder_dtype: str = "bfloat16"
    leaves: int = 0
    leaves_to_search: int = 0
    residual: bool = False
    soar: float = 0.0
    training_rows: int = 10_000
    training_iterations: int = 10

    def __post_init__(self):
        least = {"part_rows": 1, "training_rows": 16, "training_iterations": 1}
        whole = ("dims_per_block", "reorder", "leaves", "leaves_to_search")
        for name, low in (dict.fromkeys(whole, 0) | least).items():
            if getattr(self, name) < low:
                raise ValueError(f"{name} is {getattr(self, name)}; it is at least {low}")
        if not 0 <= self.threshold < 1:
            raise ValueError(f"threshold is {self.threshold}; it is from 0 to below 1")
        if self.reorder_dtype not in REORDER_BYTES:
            known = ", ".join(REORDER_BYTES)
            raise ValueError(f"reorder_dtype is {self.reorder_dtype!r}; use {known}")
        if bool(self.leaves) != bool(self.leaves_to_search) or self.leaves_to_search > self.leaves:
            raise ValueError(
                f"leaves_to_search is {self.leaves_to_search} of {self.leaves} leaves; "
                "set both, and search no more than there are, or leave both 0"
            )
        if not self.leaves and (self.soar or self.residual):
            raise ValueError("soar and residual need leaves")

    def row_bytes(self, width: int) -> int:
        """Bytes on disk of a row of `width` numbers; ScaNN writes a byte for each 4-bit code."""
        if not self.dims_per_block:
            return 4 * width
        codes = -(-width // self.dims_per_block) * (2 if self.soar else 1)
        return codes + (REORDER_BYTES[self.reorder_dtype] * width if self.reorder else 0)


def settings_for(
    rows: int, width: int, k: int = 10, memory_bytes: int = 8 << 30, **changes
) -> Settings | None:
    """The settings for a corpus, or None where exact search is quick enough.

    - Below 2^28 numbers (1 GiB), exact search answers a batch of queries in less than a second on
      two CPU cores, and no index is worth its recall.
    - A row becomes 1,024 to 2,047 codes, whatever its width: the error of an inner product hangs on
      how many bits a row has, and the time of a search on how many codes.
    - About `40 k` rows are scored again by their int8 encodings, at least `3 k` of each part, where
      these and the codes fit into the memory. Else reading them takes as long as reading all rows
      does, and there are codes alone: let searches score their candidates again (`read`).
    - There are no leaves: whitened gradients hardly cluster, so a query's best rows are in many.
    - A part has as many rows as the memory holds three times, beside twice those that codes are
      learned from.

    Args:
        rows, width: C and E.
        k: how many proponents and opponents will be asked for.
        memory_bytes: what building may take, and the index when it is searched.
        changes: settings that are to be other ones.

    Raises:
        ValueError: the memory holds too few rows to learn codes from; says how much would.
    """
    if rows * width < _EXACT_NUMBERS:
        return None
    held = memory_bytes // (4 * width)
    training = changes.get("training_rows", min(_TRAINING_ROWS, held // 8))
    part_rows = changes.get("part_rows", (held - 2 * training) // 3)
    if "part_rows" not in changes and part_rows < _PART_ROWS:
        training = changes.get("training_rows", _PART_ROWS // 2)
        needed = 4 * width * (3 * _PART_ROWS + 2 * training)
        raise ValueError(
            f"{memory_bytes / 2**30:.1f} GiB hold too few rows of {width} numbers for a part of an "
            f"index; {needed / 2**30:.1f} GiB would do"
        )
    part_rows = min(rows, part_rows)
    parts = -(-rows // part_rows)
    chosen = dict(
        part_rows=part_rows,
        dims_per_block=min(32, max(2, 1 << max(0, (width // _CODES).bit_length() - 1))),
        reorder=max(3 * k, -(-40 * k // parts)),
        reorder_dtype="int8",
        training_rows=training,
    )
    settings = Settings(**(chosen | changes))
    if "reorder" not in changes and rows * settings.row_bytes(width) > memory_bytes:
        settings = dataclasses.replace(settings, reorder=0)
    return settings
