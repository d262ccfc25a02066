"""Methods against retraining, on the demo's corpus.

python -m experiments.counterfactual --config=configs/counterfactual_world.py --workdir=DIR
"""

from tda.run import defaults


def get_config():
    """The config of the demo's bank."""
    c = defaults.get_config()
    c.methods = "trackstar,trackstar_raw,exp3,exp4,exp5,grad_cos,grad_dot,trak,tracin,less,ekfac,"
    c.methods += "ekfac_cos,logra,bm25,hidden_last,random,length,gradient_norm"
    c.data.pool = "clean"
    # The bank's passages are no part of what the model is pretrained on.
    c.data.n_sentences = 512
    c.data.n_queries = 32
    c.data.train_on = "rest"
    c.tokenizer.vocab_size = 2048
    c.model.context = 64
    c.model.size = "micro"
    c.train.epochs = 2.0
    c.train.learning_rate = 3e-3
    c.projection.side = 16
    c.projection.pooling = "matrix"
    c.counterfactual.epochs = 2.0
    c.counterfactual.tokens_per_batch = 512
    c.counterfactual.learning_rate = 1e-3
    c.counterfactual.warmup = 8
    c.counterfactual.subsets = 100
    c.counterfactual.fractions = "0.05,0.5"
    c.counterfactual.orders = 2
    return c
