"""Methods against retraining, on T-REx sentences: 601 passages, 40 queries, 200 retrainings.

    python -m experiments.counterfactual --config=configs/counterfactual_trex.py --workdir=DIR \\
        --config.data.sentences=trex_lama_sentences.jsonl.gz \\
        --config.data.facts=trex_lama_facts.jsonl.gz

Cost: a retraining takes 2 to 5 s on 2 CPU cores; an hour in all, on a machine with other work.
Expected LDS at 5%: metagradient 0.98, adjoint 0.69, EK-FAC 0.62, whole dot product 0.57, projected
0.25; Exp 5 0.39, TrackStar 0.28, BM25 0.19; random within 0.1 of 0.
"""

import pathlib
import runpy

from tda.run import defaults


def get_config():
    """Returns the config of the bank of T-REx sentences."""
    c = defaults.get_config()
    # By its path, since the files of an installed package are not on Python's path.
    world = pathlib.Path(__file__).with_name("counterfactual_world.py")
    runpy.run_path(str(world))["add_methods"](c)
    c.rerank.passages = 0
    c.data.pool = "clean"
    c.data.exclude_relations = "P527,P138,P20,P937,P463"
    # The bank's passages are not in the text that the model is pretrained on.
    c.data.n_sentences = 512
    c.data.n_queries = 40
    c.data.train_on = "rest"
    c.model.context = 64
    c.model.size = "micro"
    # Retrainings differ by a few passages, which bfloat16 would round away.
    c.model.dtype = "float32"
    c.train.epochs = 0.25
    c.train.learning_rate = 3e-3
    c.projection.side = 16
    c.projection.pooling = "matrix"
    # The committed figures were made with these.
    c.store.dtype = "float32"
    c.hessian.structure = "dense"
    c.counterfactual.epochs = 1.0
    c.counterfactual.warmup = 5
    c.counterfactual.subsets = 100
    c.counterfactual.fractions = "0.05,0.5,0.01"
    c.counterfactual.orders = 2
    c.counterfactual.own_top = 16
    return c
