"""Every key that a config of `experiments.trace` or `experiments.plan` has, with its default."""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config() -> ConfigDict:
    """The defaults that configs start from."""
    c = ConfigDict()
    c.seed = 0
    c.methods = "trackstar,grad_cos,grad_dot,bm25"

    c.data = ConfigDict()
    c.data.name = "world_facts"  # a TFDS builder: world_facts or trex; unused with paths below
    c.data.sentences = ""  # JSON lines (.jsonl, .jsonl.gz): the corpus
    c.data.facts = ""  # JSON lines: the queries
    c.data.dir = ""  # where TFDS puts what it prepares; WORKDIR/data by default
    c.data.pool = "all"  # which facts are asked: all, or clean (one object, stated, no repetition)
    c.data.exclude_relations = ""  # comma-separated relations that are not asked, such as P527
    c.data.n_sentences = 0  # the corpus is sampled to so many, keeping what states a query; 0: all
    c.data.n_queries = 0  # queries are sampled to so many; 0: all
    c.data.train_on = "corpus"  # or all: also what n_sentences leaves out of the corpus
    c.data.statements = 0  # train on facts not asked too, stated by so many of their prompts (0-3)
    c.data.statements_of = "all"  # which facts that is: all, or those that the corpus states
    c.data.prompt = 0  # which of a fact's prompts: 0, 1, 2
    c.data.seed = 0

    c.tokenizer = ConfigDict()
    c.tokenizer.vocab_size = 4096

    c.model = ConfigDict()
    c.model.size = "tiny"  # tda/model/sizes.py
    # Start from a pretrained model instead, with its tokenizer: a Hugging Face directory, a .gguf
    # file, or a package that holds one. train.epochs=0 traces it as it is.
    c.model.pretrained = ""
    c.model.context = 128  # positions a passage may have
    c.model.dtype = "float32"
    c.model.remat = False

    c.train = ConfigDict()
    c.train.epochs = 10.0
    c.train.tokens_per_batch = 2048
    c.train.optimizer = "adam"
    c.train.learning_rate = 1e-3
    c.train.schedule = "cosine"
    c.train.warmup = 100
    # The last step's learning rate over the largest; with 0, tail-patches need a rate of their own.
    c.train.final = 0.1
    c.train.b1 = 0.9  # b1, b2 and eps are Adam's; Adafactor has none of them
    c.train.b2 = 0.99
    c.train.eps = 1e-8
    c.train.weight_decay = 0.0  # of adamw alone
    c.train.clip = 1.0
    c.train.save_every = 500
    c.train.keep = 1  # the last checkpoints; 0: all
    c.train.traced = 1.0  # share of the training after which the model is traced; below 1: keep=0

    c.gradients = ConfigDict()
    c.gradients.correction = "factored"  # or adam, low_rank(R), adafactor: what "corrected" means
    c.gradients.second_moments = "auto"  # optimizer, estimate, or what the checkpoint has
    c.gradients.estimate_batches = 200  # where they are estimated
    c.gradients.output = "loss"  # loss, margin or logit
    c.gradients.include = ""  # regular expression on parameters; empty: the layers' matrices
    c.gradients.exclude = ""
    c.gradients.untapped = "leave"  # reference: also parameters that no tap can be put on
    c.gradients.tokens_per_batch = 4096

    c.projection = ConfigDict()
    c.projection.side = 16  # a block has side × side dimensions
    c.projection.blocks = 8  # contiguous blocks of layers, each with attention and MLP apart
    c.projection.seed = 0
    c.projection.family = "gaussian"
    c.projection.pooling = "blocks"  # or layer, matrix: which matrices share a block

    c.store = ConfigDict()
    # On disk: float32, bfloat16, or int8 with a scale for each block of a row. none: there is no
    # store, the corpus is encoded as it is searched (and once more for R, unless it is sampled).
    c.store.dtype = "float32"
    c.store.shard_bytes = 256 << 20  # of a file; a host encodes whole files

    c.search = ConfigDict()
    c.search.index = "none"  # or scann: approximate, where the corpus is large enough to gain by it
    c.search.depth = 100  # passages that an index is asked for; deeper ranks are unknown
    c.search.recall_queries = 100  # whose exact ranking an index is held against
    c.search.memory_gib = 8.0  # for building an index, and for searching it
    # Settings (tda/retrieval/scann/settings.py) that are to be others than the rule's.
    c.search.scann = ConfigDict()
    c.search.scann.part_rows = placeholder(int)
    c.search.scann.dims_per_block = placeholder(int)
    c.search.scann.threshold = placeholder(float)
    c.search.scann.reorder = placeholder(int)
    c.search.scann.reorder_dtype = placeholder(str)
    c.search.scann.leaves = placeholder(int)
    c.search.scann.leaves_to_search = placeholder(int)
    c.search.scann.residual = placeholder(bool)
    c.search.scann.soar = placeholder(float)
    c.search.scann.training_rows = placeholder(int)
    c.search.scann.training_iterations = placeholder(int)

    c.hessian = ConfigDict()
    c.hessian.sample = 0  # R_train is taken of so many passages, drawn at random; 0: of all
    c.hessian.seed = 0  # of that draw
    c.hessian.component = 0  # k of the mixing rule; 0: 1000 of 65,536, in proportion
    c.hessian.weight = -1.0  # λ; -1: by the rule, which takes queries with k directions or more
    # In mean eigenvalues of a block; −1: what a sample of this size needs (Ledoit and Wolf).
    c.hessian.damping = 1e-3
    c.hessian.cutoff = 0.0  # directions of smaller eigenvalues, in the same unit, are left out
    # R_eval is made of all queries, of all but the one at hand (leave_one_out), or of the half
    # that it is not in (disjoint).
    c.hessian.evaluation = "all"

    c.several = ConfigDict()
    c.several.checkpoints = 3  # TracIn, TRAK and LESS take so many of those that training kept
    c.several.keep_stores = True  # else those of earlier checkpoints go when they were searched

    c.curvature = ConfigDict()
    c.curvature.sample = 4096  # passages that EK-FAC's and LoGra's factors are taken of; 0: all
    c.curvature.seed = 0
    c.curvature.damping = 0.1  # of EK-FAC, in mean eigenvalues of a matrix

    c.dense = ConfigDict()
    c.dense.model = ""  # of dense retrieval: a directory, or a name on the Hugging Face hub

    c.eval = ConfigDict()
    c.eval.queries = 0  # evaluate on so many queries; 0: all
    c.eval.top_k = 10
    c.eval.tail_patch_queries = 100  # 0: no tail-patch
    c.eval.tail_patch_learning_rate = 0.0  # 0: the training run's at the traced checkpoint
    c.eval.tail_patch_state = "restored"  # the optimizer's at the checkpoint; or fresh: zeros
    c.eval.known_rank = 10  # a fact counts as known if the target's tokens rank so high
    c.eval.samples = 20  # answers drawn from the model for a query; 0: none
    c.eval.sampled_queries = 100  # for so many queries; 0: all
    c.eval.frequency_edges = "1,10,100,1000,10000"  # where buckets of fact frequency begin
    c.eval.resamples = 10_000  # of the queries, for intervals
    c.eval.seed = 0  # of samples and intervals

    # What `experiments.plan` reckons with where there is no corpus to read; 0: the corpus is read.
    c.plan = ConfigDict()
    c.plan.passages = 0
    c.plan.tokens = 0
    c.plan.queries = 0

    c.mesh = ConfigDict()
    c.mesh.data = -1
    c.mesh.fsdp = 1
    c.mesh.tensor = 1
    return c
