"""Methods against retraining, on the demo's corpus: 512 sentences, 32 queries, 600 retrainings.

    python -m experiments.counterfactual --config=configs/counterfactual_world.py --workdir=DIR

`--config=configs/counterfactual_world.py:small` has 13 methods, 16 queries and 40 retrainings
without 5 %, in one order of the data: about 3 minutes.

Cost: a retraining takes 2 s on 2 CPU cores, metagradients of all queries and
`adjoint_batch` 5 minutes each, `ekfac_cg` 12, QLD 25 (a retraining for each method and each of 16
queries): 90 minutes beside other work; 0.2 GB of disk.
Expected LDS at 5%: metagradient 0.94; adjoint with each batch's Gauss–Newton matrix 0.90; SOURCE,
Shampoo, EK-FAC, the other adjoints and gradients over √V, whole, 0.69 to 0.71; whole dot product
0.65, projected 0.44; TrackStar 0.53; BM25 0.28; random within 0.1 of 0.
"""

import importlib.util
import pathlib
import runpy

from tda.run import defaults

METHODS = (
    "trackstar,trackstar_raw,trackstar_leave_one_out,trackstar_disjoint,exp1,exp3,exp4,exp5,"
    "grad_cos,grad_dot,trak,tracin,less,captured,captured_plain,ekfac,ekfac_cos,logra,logra_cos,"
    "bm25,hidden_middle,hidden_last,random,length,gradient_norm,trackstar_logit,trackstar_margin,"
    "trackstar_query_logit,"
    # Every passage is scored without projection.
    "rerank_dot,rerank_cos,rerank_exp3,rerank_exp4,rerank_exp5,rerank_trackstar,rerank_ekfac,"
    "rerank_ekfac_cos"
)


def get_config(size: str = "full"):
    """Returns the config of the demo's bank."""
    if size not in ("full", "small"):
        raise ValueError(f"counterfactual_world.py:{size}: give full or small after the colon")
    c = defaults.get_config()
    c.methods = METHODS
    if size == "full" and importlib.util.find_spec("sentence_transformers"):
        c.methods += ",dense"
        # By its path, since the files of an installed package are not on Python's path.
        table1 = pathlib.Path(__file__).with_name("trex_table1.py")
        c.dense.model = runpy.run_path(str(table1))["sentence_encoder"]()
    c.rerank.passages = 0
    c.data.pool = "clean"
    # The bank's passages are not in the text that the model is pretrained on.
    c.data.n_sentences = 512
    c.data.n_queries = 32
    c.data.train_on = "rest"
    c.tokenizer.vocab_size = 2048
    c.model.context = 64
    c.model.size = "micro"
    # Retrainings differ by a few passages, which bfloat16 would round away.
    c.model.dtype = "float32"
    c.train.epochs = 2.0
    c.train.learning_rate = 3e-3
    c.projection.side = 16
    c.projection.pooling = "matrix"
    # The committed figures were made with these.
    c.store.dtype = "float32"
    c.hessian.structure = "dense"
    c.counterfactual.epochs = 2.0
    c.counterfactual.tokens_per_batch = 512
    c.counterfactual.learning_rate = 1e-3
    c.counterfactual.warmup = 8
    c.counterfactual.subsets = 100
    c.counterfactual.fractions = "0.05,0.5,0.01"
    c.counterfactual.orders = 2
    c.counterfactual.own_top = 16
    if size == "small":
        c.methods = "captured,captured_plain,exp1,trackstar,rerank_trackstar,grad_cos,grad_dot,"
        c.methods += "bm25,random"
        c.counterfactual.methods = "metagradient,ekfac_whole,adam_dot_whole,dot_whole"
        c.data.n_queries = 16
        c.counterfactual.subsets = 40
        c.counterfactual.fractions = "0.05"
        c.counterfactual.orders = 1
        c.counterfactual.own_top = 0
    return c
