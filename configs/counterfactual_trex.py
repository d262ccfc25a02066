"""Methods against retraining, on T-REx sentences: 601 passages, 40 queries, 600 retrainings.

    python -m experiments.counterfactual --config=configs/counterfactual_trex.py --workdir=DIR \\
        --config.data.sentences=trex_lama_sentences.jsonl.gz \\
        --config.data.facts=trex_lama_facts.jsonl.gz

Cost: a retraining takes 2 to 6 s on 2 CPU cores; 100 minutes in all beside other work, of it 25 for
QLD and 10 each for `ekfac_cg` and metagradients; 0.1 GB of disk.
Expected LDS at 5%: metagradient 0.98, adjoint 0.69, EK-FAC 0.62, Exp 5 unprojected 0.60, whole dot
product 0.57, projected 0.25; Exp 5 0.39, TrackStar 0.28, BM25 0.19; random within 0.1 of 0.
"""

import pathlib
import runpy


def get_config():
    """Returns the config of the bank of T-REx sentences: that of the demo's, on another corpus."""
    # By its path, since the files of an installed package are not on Python's path.
    world = pathlib.Path(__file__).with_name("counterfactual_world.py")
    c = runpy.run_path(str(world))["get_config"]()
    c.data.exclude_relations = "P527,P138,P20,P937,P463"
    c.data.n_queries = 40
    c.tokenizer.vocab_size = 4096
    c.train.epochs = 0.25
    c.counterfactual.epochs = 1.0
    c.counterfactual.tokens_per_batch = 1024
    c.counterfactual.warmup = 5
    return c
