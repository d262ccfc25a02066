"""T-REx sentences: 20,000 of them, 500 queries from the clean pool, a model of 5M parameters.

    python -m experiments.trace --config=configs/trex_small.py --workdir=runs/trex_small \\
        --config.data.sentences=trex_lama_sentences.jsonl.gz \\
        --config.data.facts=trex_lama_facts.jsonl.gz

Cost: under two hours and 14 GiB of memory on 2 CPU cores, 17 GB of disk.
Expected MRR (all labels, strict): TrackStar 0.329, 0.289; without correction 0.337, 0.298; gradient
cosine 0.191, 0.153; gradient dot product 0.100, 0.086; BM25 0.976, 0.843.
"""

from tda.run import defaults


def get_config():
    """Returns the config of the small T-REx run."""
    c = defaults.get_config()
    c.methods = "trackstar,trackstar_raw,grad_cos,grad_dot,bm25"
    c.data.pool = "clean"
    # The five relations whose aligned sentences state the fact least often.
    c.data.exclude_relations = "P527,P138,P20,P937,P463"
    c.data.n_sentences = 20_000
    c.data.n_queries = 500
    # What teaches a small model to answer prompts: other facts in the prompts' words.
    c.data.statements = 2
    c.tokenizer.vocab_size = 8192
    c.model.size = "mini"
    c.train.epochs = 8.0
    c.train.learning_rate = 1.5e-3
    c.train.warmup = 200
    c.train.save_every = 200
    # The more dimensions the better; a block for each matrix keeps R small. The embedding too.
    c.gradients.include = "."
    # A shard of so wide a store has 700 rows: small batches leave less of them over.
    c.gradients.tokens_per_batch = 1024
    c.projection.pooling = "matrix"
    c.projection.side = 48
    # The committed figures were made with these.
    c.hessian.damping = 1e-3
    c.store.dtype = "float32"
    return c
