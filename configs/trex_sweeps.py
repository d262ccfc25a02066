"""T-REx sentences for sweeps and seeds: 10,000 of them, 500 queries, a model of 1.9M parameters.

    python -m experiments.sweep --config=configs/trex_sweeps.py --sweep=configs/sweeps/lambda.py \\
        --config.data.sentences=trex_lama_sentences.jsonl.gz \\
        --config.data.facts=trex_lama_facts.jsonl.gz --workdir=sweeps/trex

All sweeps may share a workdir, and with it the training.

Cost: the training takes 8 minutes on 2 CPU cores; with it `lambda` takes 20 minutes, `dims` 19,
`tokens` 40, `sizes` 70 and then `sizes_matrix` 15; 3 GiB of memory, 12 GB of disk.
Expected MRR: TrackStar 0.18 to 0.20, without correction 0.183, gradient cosine 0.099, BM25 0.978;
see results/README.md.
"""

import pathlib
import runpy


def get_config():
    """Returns the config of the sweeps on T-REx."""
    # By its path, since the files of an installed package are not on Python's path.
    small = pathlib.Path(__file__).with_name("trex_small.py")
    c = runpy.run_path(str(small))["get_config"]()
    c.methods = "trackstar,trackstar_raw,exp5,exp4,exp3,grad_cos,grad_dot,bm25,random"
    c.data.n_sentences = 10_000
    c.data.statements_of = "corpus"
    c.model.size = "tiny"
    c.train.learning_rate = 3e-3
    c.train.warmup = 100
    c.projection.side = 24
    c.store.dtype = "bfloat16"
    c.eval.samples = 0
    return c
