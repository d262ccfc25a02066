"""Table 1 on T-REx: all sentences, 1,000 queries from the clean pool, a model of 10M parameters.

    python -m experiments.table1 --config=configs/trex_table1.py --workdir=runs/trex_table1 \\
        --config.data.sentences=trex_lama_sentences.jsonl.gz \\
        --config.data.facts=trex_lama_facts.jsonl.gz
"""

from configs import defaults


def get_config():
    """The config of table 1."""
    c = defaults.get_config()
    c.data.pool = "clean"
    # The five relations whose aligned sentences state the fact least often.
    c.data.exclude_relations = "P527,P138,P20,P937,P463"
    c.data.n_queries = 1000
    # What teaches a small model to answer prompts: other facts in the prompts' words.
    c.data.statements = 2
    c.tokenizer.vocab_size = 8192
    c.model.size = "small"
    c.train.epochs = 2.5
    c.train.learning_rate = 1.5e-3
    c.train.warmup = 200
    # Methods over several checkpoints choose among these.
    c.train.save_every = 500
    c.train.keep = 0
    # A block for each matrix keeps R small and the projection's noise low. The embedding too.
    c.gradients.include = "."
    c.gradients.tokens_per_batch = 1024
    c.projection.pooling = "matrix"
    c.projection.side = 32
    c.store.dtype = "int8"
    return c
