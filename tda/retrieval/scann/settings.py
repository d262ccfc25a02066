"""Settings of an approximate index, and the rule that chooses them from the corpus's size."""

import dataclasses
import math

# Below this many numbers in all rows (1 GiB), exact search answers a batch of queries in less than
# a second on two CPU cores, and no index is worth its loss of recall.
_EXACT_NUMBERS = 1 << 28
# The least number of codes of a row: recall depends on a row's bits, not on its width. Whitened
# gradients do not cluster, so fewer codes lose the best rows (benchmarks/RESULTS.md, scann_curve).
_CODES = 1024
# The most rows that codes are learned from: more of them did not raise the recall.
_TRAINING_ROWS = 5_000
# The fewest rows of a part: fewer are too few to learn codes from.
_PART_ROWS = 1_000
REORDER_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of ScaNN (Guo et al. 2020, *Accelerating large-scale inference with anisotropic
    vector quantization*; Sun et al. 2023, *SOAR*).

    Attributes:
        part_rows: most rows of the corpus in one part; bounds memory.
        dims_per_block: numbers of an encoding in one 4-bit code; with 0 there are no codes, and
            every row of a searched leaf is scored by its float32 encoding.
        threshold: threshold T of anisotropic quantisation: codes keep the scores of queries whose
            inner product with a row is at least T times the row's norm; 0 weights all errors alike.
        reorder: rows of each part that are ranked first by codes and then scored again by their
            encodings; 0 keeps only codes.
        reorder_dtype: dtype of the encodings for that: "float32", "bfloat16" or "int8".
        leaves: k-means partitions of a part's rows; 0 searches all rows.
        leaves_to_search: leaves that a query looks into.
        residual: whether codes describe a row minus its leaf's centre.
        soar: SOAR's λ: every row is in a second leaf, chosen for the queries that miss the first;
            0 keeps it in one.
        training_rows: most rows of a part that codes and leaves are learned from.
        training_iterations: iterations of k-means.

    Raises:
        ValueError: a setting is out of its range or conflicts with another; the message names it.
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
        for name in (*least, "dims_per_block", "reorder", "leaves", "leaves_to_search"):
            if getattr(self, name) < (low := least.get(name, 0)):
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {low}")
        if not 0 <= self.threshold < 1:
            raise ValueError(f"threshold is {self.threshold}; it must be from 0 to below 1")
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

    @property
    def has_codes_alone(self) -> bool:
        """Whether an index keeps codes and no encodings to score candidates by."""
        return bool(self.dims_per_block) and not self.reorder

    def row_bytes(self, width: int) -> int:
        """Returns the bytes on disk of a row; ScaNN writes a byte for each 4-bit code."""
        if not self.dims_per_block:
            return 4 * width
        codes = -(-width // self.dims_per_block) * (2 if self.soar else 1)
        return codes + (REORDER_BYTES[self.reorder_dtype] * width if self.reorder else 0)


def settings_for(
    rows: int, width: int, k: int = 10, memory_bytes: int = 8 << 30, **changes
) -> Settings | None:
    """Returns the settings for a corpus, or None if exact search is quick enough.

    - A row becomes 1,024 to 2,047 codes, whatever its width.
    - About `40 k` rows are scored again by their int8 encodings, at least `3 k` of each part, if
      these and the codes fit into memory; else searches read the encodings of their candidates.
    - There are no leaves: whitened gradients hardly cluster, so a query's best rows are in many.
    - Memory holds three times a part's rows and twice the rows that codes are learned from, which
      is what ScaNN takes to build a part.

    Args:
        rows: C.
        width: E.
        k: number of proponents and opponents that searches will return.
        memory_bytes: memory for building and for the index while it is searched.
        changes: settings that override the rule.

    Raises:
        ValueError: memory holds too few rows to learn codes from; the message says how much is
            enough.
    """
    if rows * width < _EXACT_NUMBERS:
        return None
    memory_rows = memory_bytes // (4 * width)
    training = changes.get("training_rows", min(_TRAINING_ROWS, memory_rows // 8))
    part_rows = changes.get("part_rows", (memory_rows - 2 * training) // 3)
    if "part_rows" not in changes and part_rows < _PART_ROWS:
        training = changes.get("training_rows", _PART_ROWS // 2)
        needed = 4 * width * (3 * _PART_ROWS + 2 * training)
        raise ValueError(
            f"{memory_bytes / 2**30:.3g} GiB hold too few rows of {width} numbers for a part of an "
            f"index; {math.ceil(needed / 2**30 * 100) / 100:.2f} GiB are enough"
        )
    part_rows = min(rows, part_rows)
    parts = -(-rows // part_rows)
    defaults = dict(
        part_rows=part_rows,
        dims_per_block=min(32, max(2, 1 << max(0, (width // _CODES).bit_length() - 1))),
        reorder=max(3 * k, -(-40 * k // parts)),
        reorder_dtype="int8",
        training_rows=training,
    )
    settings = Settings(**(defaults | changes))
    if "reorder" not in changes and rows * settings.row_bytes(width) > memory_bytes:
        settings = dataclasses.replace(settings, reorder=0)
    return settings
