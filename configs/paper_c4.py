"""The paper's own setting: C4 (English), 365M passages of 160B tokens, a model of 8B parameters.

    python -m experiments.plan --config=configs/paper_c4.py --hardware=v5p-256

It is here to be planned, not run: the corpus is stated by its size, and no file is named.
`--config=configs/paper_c4.py:recommended` keeps what we would keep of so large a corpus: the same
numbers in 2 bits, which are the most signal for their bytes (results/README.md, "Few-bit stores").
Cost: the command says it, in seconds and on any machine. Expected: a store of 87.0 TiB in float32,
and of 6.1 TiB as recommended.
"""

from tda.run import defaults


def get_config(store: str = "paper"):
    """Returns the config of the paper's largest experiment."""
    if store not in ("paper", "recommended"):
        raise ValueError(f"paper_c4.py:{store}: give paper or recommended after the colon")
    c = defaults.get_config()
    c.methods = "trackstar"
    c.plan.passages = 365_000_000
    c.plan.tokens = 160_000_000_000
    c.plan.queries = 5_415
    # Not known to be the paper's: the vocabulary that makes a model of this shape 8.0B parameters.
    c.tokenizer.vocab_size = 128_256
    c.model.size = "8b"
    c.model.context = 2048
    c.model.dtype = "bfloat16"
    # 8 blocks of layers × (attention, MLP) × 64 × 64 = 65,536 dimensions.
    c.projection.side = 64
    c.projection.blocks = 8
    c.gradients.tokens_per_batch = 1 << 20
    c.store.dtype = "float32" if store == "paper" else "2bit"
    c.store.shard_bytes = 4 << 30
    # No more than the chips of a host: each host then has a copy of the model and encodes alone.
    c.mesh.fsdp = 4
    return c
