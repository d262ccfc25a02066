"""The demo: countries, capitals, currencies, …; 20,000 sentences, a model of 1M parameters.

    python -m experiments.trace --config=configs/world_facts.py --workdir=demo

`--config=configs/world_facts.py:pooled` adds matrices up in 8 blocks, 4,608 dimensions in place of
16,128, and damps R by 1e-3: most of the demo's sections in results/README.md were made with it.

Cost: about 4 minutes and 2 GiB of memory on 2 CPU cores, 1 GB of disk.
Expected: the target is among the model's first ten for about 88% of the 1,094 queries. MRR:
TrackStar 0.70 to 0.73, gradient cosine 0.55 to 0.59, gradient dot product 0.41 to 0.47, BM25 0.94;
tail-patch +2.4 to 3.0%, +2.1 to 2.7%, +1.8 to 2.2%, +1.4 to 1.7%. Pooled, MRR 0.64 to 0.69, 0.50 to
0.56, 0.35 to 0.40; tail-patch +2.1 to 2.7%, +2.0 to 2.5%, +1.4 to 1.9%.
"""

from tda.run import defaults


def get_config(pooling: str = "matrix"):
    """Returns the config of the demo."""
    if pooling not in ("matrix", "pooled"):
        raise ValueError(f"world_facts.py:{pooling}: give pooled after the colon, or nothing")
    c = defaults.get_config()
    c.data.pool = "clean"
    c.tokenizer.vocab_size = 2048
    c.train.epochs = 8.0
    c.train.learning_rate = 3e-3
    c.projection.side = 24
    if pooling == "pooled":
        c.projection.blocks = 4
        c.hessian.damping = 1e-3
    else:
        c.projection.pooling = "matrix"
    return c
