"""Every key of a config, with its default, its meaning in a line, and the values it may have."""

import math
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from tda.runtime.patterns import compile_pattern

# The signs of numbers that may not be 0, and of those whose default of −1 stands for a rule; all
# other numbers are 0 or more.
POSITIVE, SIGNED = "positive", "signed"
# By key: the default, the meaning, which `--help` shows, and perhaps a number's sign. A type stands
# for a key without a default: the rule's value holds until the key is set.
KEYS: dict[str, tuple] = {
    "seed": (0, "seed of the initial parameters, the order of batches and random controls"),
    "methods": ("trackstar,grad_cos,grad_dot,bm25", "rows of the table: names in tda/methods.py"),
    # The corpus and the queries.
    "data.name": (
        "world_facts",
        "world_facts, trex (the paper's release) or lama (LAMA's files, in data.dir); unused with "
        "the paths below",
    ),
    "data.sentences": ("", "JSON lines (.jsonl, .jsonl.gz) of the corpus"),
    "data.facts": ("", "JSON lines of the queries"),
    "data.corpus": (
        "",
        "plain documents without labels in place of data.sentences: a file, pattern or folder of "
        "JSON lines, Parquet, CSV or text files, several files with commas, or a TFDS name "
        "(docs/large_corpora.md)",
    ),
    "data.share": (
        1.0,
        "share of the documents of data.corpus or data.also_train_on to take, by a hash of their "
        "ids",
        POSITIVE,
    ),
    "data.queries": (
        "",
        "JSON lines with prompt and target, to ask data.corpus, or in another form of "
        "tda/facts/query_sets.py; or data.facts",
    ),
    "data.text_field": (
        "text",
        "field or column of data.corpus with the text; of several with commas the first there is",
    ),
    "data.id_field": ("", "the same for the id; empty: id, doc_id or the like, if any"),
    "data.dir": (
        "",
        "TFDS's directory, empty: WORKDIR/data, or for data.corpus its usual one; or LAMA's `data`",
    ),
    "data.pool": (
        "all",
        "facts to ask: all; clean (one object, stated, no repetition); or, of data.corpus, named "
        "(a passage names subject and target)",
    ),
    "data.exclude_relations": ("", "comma-separated relations not to ask, such as P527"),
    "data.n_sentences": (0, "sample of the corpus, with all that states a query; 0: all"),
    "data.n_queries": (0, "sample of the queries; 0: all"),
    "data.train_on": (
        "corpus",
        "training text: corpus, all (also what n_sentences leaves out), or rest (that alone)",
    ),
    "data.also_train_on": (
        "",
        "plain documents that the model learns from too and that are not traced, named as "
        "data.corpus; for a corpus with labels",
    ),
    "data.statements": (0, "train also on facts not asked, each stated by 0 to 3 of its prompts"),
    "data.statements_of": ("all", "which facts: all, or those that the corpus states (corpus)"),
    "data.prompt": (0, "which of a fact's prompts to ask: 0, 1 or 2"),
    "data.joiner": (
        str,
        "text between prompt and target; unset: a space where English puts one "
        "(tda/data/joining.py)",
    ),
    "data.seed": (0, "seed of the samples"),
    "tokenizer.vocab_size": (4096, "size of the vocabulary to learn", POSITIVE),
    # The model.
    "model.size": ("tiny", "a size in tda/model/sizes.py"),
    "model.pretrained": (
        "",
        "start from this model and its tokenizer: a Hugging Face directory, a .gguf file or a "
        "package that holds one; train.epochs=0 traces it unchanged",
    ),
    "model.context": (128, "positions of a passage at most", POSITIVE),
    "model.dtype": (
        "auto",
        "dtype of computation: float32, bfloat16, or auto (bfloat16 on accelerators)",
    ),
    "model.attention": (
        "blocked",
        "blocked, or fused: cuDNN's kernel, on NVIDIA GPUs in bfloat16; elsewhere as blocked",
    ),
    "model.remat": (False, "recompute activations in the backward pass to save memory"),
    # Training.
    "train.epochs": (10.0, "passes over the training text"),
    "train.tokens_per_batch": (2048, "positions of a batch", POSITIVE),
    "train.optimizer": ("adam", "optimizer: adam, adamw or adafactor"),
    "train.learning_rate": (1e-3, "largest learning rate", POSITIVE),
    "train.schedule": ("cosine", "schedule after the warm-up: cosine, linear or constant"),
    "train.warmup": (100, "steps of linear warm-up"),
    "train.final": (
        0.1,
        "last learning rate over the largest; with 0, set eval.tail_patch_learning_rate",
    ),
    # Only some optimizers have these (tda/run/train.py); unset, each has its usual value.
    "train.b1": (float, "b1 of adam and adamw; unset: 0.9"),
    "train.b2": (float, "b2 of adam and adamw; unset: 0.99"),
    "train.eps": (float, "eps of adam and adamw; unset: 1e-8"),
    "train.eps_root": (float, "eps_root of adam and adamw, added under the root; unset: 0"),
    "train.weight_decay": (float, "weight decay of adamw; unset: 0"),
    "train.clip": (1.0, "largest global norm of a gradient"),
    "train.save_every": (500, "steps between checkpoints", POSITIVE),
    "train.keep": (1, "how many of the last checkpoints to keep; 0: all"),
    "train.capture": (
        False,
        "keep the gradients of the examples of every step, for the method captured",
    ),
    "train.traced": (1.0, "share of the training after which to trace; below 1 needs keep=0"),
    # Gradients.
    "gradients.correction": ("factored", "optimizer correction: factored, adam or low_rank(R)"),
    "gradients.second_moments": (
        "auto",
        "source of V: optimizer, estimate, or auto (the optimizer's where the checkpoint has them)",
    ),
    "gradients.estimate_batches": (200, "batches to estimate second moments from", POSITIVE),
    "gradients.output": ("loss", "differentiated output: loss, margin or logit"),
    "gradients.include": ("", "regular expression of parameters; empty: the layers' matrices"),
    "gradients.exclude": ("", "regular expression of parameters to leave out"),
    "gradients.untapped": (
        "leave",
        "parameters that no tap reaches: leave, reference (slow) or error",
    ),
    "gradients.tokens_per_batch": (4096, "positions of a batch to encode", POSITIVE),
    # Projection.
    "projection.side": (16, "a block of the encoding has side × side dimensions", POSITIVE),
    "projection.blocks": (
        8,
        "contiguous blocks of layers, each with attention and MLP apart",
        POSITIVE,
    ),
    "projection.seed": (0, "seed of the projection matrices"),
    "projection.family": ("gaussian", "distribution of their entries: gaussian or rademacher"),
    "projection.pooling": (
        "blocks",
        "matrices that share a block: blocks (of layers), layer, matrix",
    ),
    # The store.
    "store.dtype": (
        "int8",
        "float32, bfloat16, int8, 4bit, 3bit, 2bit (bits with a scale for every 64 numbers), or "
        "none: no store, the corpus is encoded while it is searched, and once more for R unless R "
        "is sampled",
    ),
    "store.rank": (
        0,
        "pairs of vectors that each matrix's block is stored as (projection.pooling=matrix); 0: "
        "its numbers themselves",
    ),
    "store.root": (
        "",
        "directory of this run's stores, local, gs://BUCKET/PATH or s3://BUCKET/PATH; empty: "
        "stores/ in the workdir",
    ),
    "store.shard_bytes": (256 << 20, "size of a file; a host encodes whole files", POSITIVE),
    # Search.
    "search.index": ("none", "none (exact), or scann: approximate, for large corpora"),
    "search.depth": (100, "passages to ask an index for; deeper ranks are unknown", POSITIVE),
    "search.recall_queries": (100, "queries to measure an index's recall on; 0: none"),
    "search.memory_gib": (
        8.0,
        "memory of an index, or of the second stage's queries, GiB",
        POSITIVE,
    ),
    # Each replaces the rule's value (tda/retrieval/scann/settings.py).
    "search.scann.part_rows": (int, "rows of a part of the index at most"),
    "search.scann.dims_per_block": (int, "numbers that a 4-bit code stands for; 0: no codes"),
    "search.scann.threshold": (float, "threshold of anisotropic quantisation, from 0 to below 1"),
    "search.scann.reorder": (int, "rows of a part to score again by their encodings"),
    "search.scann.reorder_dtype": (str, "dtype of those encodings: float32, bfloat16 or int8"),
    "search.scann.leaves": (int, "partitions of a part by k-means; 0: none"),
    "search.scann.leaves_to_search": (int, "partitions that a query looks into"),
    "search.scann.residual": (bool, "code a row less its partition's centre"),
    "search.scann.soar": (float, "λ of SOAR's second partition of a row; 0: one partition"),
    "search.scann.training_rows": (int, "rows of a part to learn codes and partitions from"),
    "search.scann.training_iterations": (int, "iterations of k-means"),
    # The second stage: methods that score candidates without projection (rerank_…).
    "rerank.passages": (100, "passages that each of rerank.candidates finds; 0: all are scored"),
    "rerank.candidates": ("trackstar", "methods whose first passages are scored again"),
    # R.
    "hessian.sample": (0, "passages to sum R_train over, drawn at random; 0: all"),
    "hessian.seed": (0, "seed of that draw"),
    "hessian.component": (0, "k of the mixing rule; 0: 1000 for 65,536 dimensions, in proportion"),
    "hessian.weight": (
        -1.0,
        "λ of R_eval in the mixture; -1: by the rule, for k or more queries",
        SIGNED,
    ),
    "hessian.damping": (
        -1.0,
        "in mean eigenvalues of a block; -1: what the sample's size needs (Ledoit and Wolf)",
        SIGNED,
    ),
    "hessian.cutoff": (0.0, "leave out directions of smaller eigenvalues, in the same unit"),
    "hessian.structure": (
        "auto",
        "of R of a matrix: dense; kronecker, a factor for rows and for columns; auto: by passages",
    ),
    "hessian.evaluation": (
        "all",
        "queries of R_eval: all, leave_one_out, or disjoint (the half without the query)",
    ),
    # Methods over several checkpoints; EK-FAC and LoGra; dense retrieval.
    "several.checkpoints": (3, "checkpoints that TracIn, TRAK and LESS use", POSITIVE),
    "several.keep_stores": (True, "keep the stores of earlier checkpoints after their search"),
    "curvature.sample": (4096, "passages to take the factors of EK-FAC and LoGra from; 0: all"),
    "curvature.seed": (0, "seed of that draw and of EK-FAC's labels"),
    "curvature.damping": (0.1, "damping of EK-FAC, in mean eigenvalues of a matrix", POSITIVE),
    "dense.model": ("", "sentence encoder: a directory, or a name on the Hugging Face hub"),
    # Evaluation.
    "eval.queries": (0, "queries to evaluate on; 0: all"),
    "eval.top_k": (10, "proponents of a query to write and to patch with", POSITIVE),
    "eval.tail_patch_queries": (100, "queries of the tail-patch; 0: no tail-patch"),
    "eval.tail_patch_learning_rate": (0.0, "0: the training's at the traced checkpoint"),
    "eval.tail_patch_state": ("restored", "optimizer state: restored, or fresh (zeros)"),
    "eval.known_rank": (10, "a fact is known if each token of the target ranks so high", POSITIVE),
    "eval.prior_prompts": (
        10,
        "prompts about other subjects after which a target's log p is its prior; 0: none",
    ),
    "eval.samples": (20, "answers to draw from the model for a query; 0: none"),
    "eval.sampled_queries": (100, "queries to draw answers for; 0: all"),
    "eval.frequency_edges": ("1,10,100,1000,10000", "where buckets of fact frequency begin"),
    "eval.resamples": (10_000, "resamples of the queries for intervals", POSITIVE),
    "eval.seed": (0, "seed of answers and intervals"),
    # Who judges whether proponents entail their query (docs/evaluation.md).
    "judge.name": ("", "lexical, nli, or a plugin's; empty: nobody"),
    "judge.model": ("", "model of nli: a directory, or a name on the Hugging Face hub"),
    "judge.sentences": (3, "sentences of a window, the best of which counts; 0: whole passages"),
    "judge.threshold": (0.5, "a passage whose score is above it entails its query"),
    "judge.batch": (32, "pairs that the model scores at a time", POSITIVE),
    "judge.tokens": (512, "tokens of a premise and its claim at most", POSITIVE),
    "metrics.writers": (
        "",
        "where metrics go beside train.jsonl and metrics.json: tensorboard, wandb, or both with a "
        "comma",
    ),
    # For `experiments.counterfactual`: a training on the corpus that continues the traced model.
    "counterfactual.epochs": (2.0, "passes over the corpus of that training", POSITIVE),
    "counterfactual.tokens_per_batch": (1024, "positions of a batch of it", POSITIVE),
    "counterfactual.learning_rate": (1e-3, "its largest learning rate", POSITIVE),
    "counterfactual.warmup": (8, "steps of its linear warm-up"),
    "counterfactual.eps_root": (1e-8, "its optimizer's eps_root; above 0 it is smooth in its data"),
    "counterfactual.unit": (
        "passage",
        "unit to drop: passage, document, relation, subject, token, or a field of data.sentences",
    ),
    "counterfactual.held_out": (0, "left-out sentences to ask in place of the facts; 0: facts"),
    "counterfactual.fractions": ("0.05", "comma-separated shares of the units to drop"),
    "counterfactual.subsets": (100, "random sets of units to drop, a retraining each", POSITIVE),
    "counterfactual.orders": (1, "orders of the data that all sets are retrained in", POSITIVE),
    "counterfactual.together": (1, "retrainings that one program runs at a time", POSITIVE),
    "counterfactual.methods": (
        "metagradient,adjoint_batch,adjoint,adjoint_ekfac,adjoint_none,in_run_adam,in_run,"
        "ekfac_cg,source,shampoo_whole,ekfac_whole,dot_whole,cosine_whole,adam_dot_whole,"
        "adam_cosine_whole",
        "methods of the bank's own, beside those of methods (tda/run/bank_scores.py)",
    ),
    "counterfactual.queries_at_once": (1, "queries whose metagradients are one batch", POSITIVE),
    "counterfactual.fisher": (
        256,
        "passages of the adjoint's mean Fisher matrix, and of CG",
        POSITIVE,
    ),
    "counterfactual.own_top": (0, "queries to retrain without each method's own top 1 %; 0: none"),
    "counterfactual.seed": (0, "seed of the sets, and of the first order"),
    "counterfactual.resamples": (1000, "resamples of subsets and queries for intervals", POSITIVE),
    # For `experiments.plan`, where there is no corpus to read.
    "plan.passages": (0, "passages of the corpus; 0: read it"),
    "plan.tokens": (0, "tokens of the corpus"),
    "plan.queries": (0, "number of queries"),
    "mesh.data": (-1, "devices along the data axis; -1: all that are left", SIGNED),
    "mesh.fsdp": (1, "devices that share the parameters", POSITIVE),
    "mesh.tensor": (1, "devices that share a matrix product", POSITIVE),
}


# The values of keys that name a choice.
CHOICES = {
    "data.name": ("world_facts", "trex", "lama"),
    "data.pool": ("all", "clean", "named"),
    "data.train_on": ("corpus", "all", "rest"),
    "data.statements_of": ("all", "corpus"),
    "data.prompt": (0, 1, 2),
    "model.dtype": ("auto", "float32", "bfloat16"),
    "model.attention": ("blocked", "fused"),
    "train.optimizer": ("adam", "adamw", "adafactor"),
    "train.schedule": ("cosine", "linear", "constant"),
    "gradients.second_moments": ("auto", "optimizer", "estimate"),
    "gradients.output": ("loss", "margin", "logit"),
    "gradients.untapped": ("leave", "reference", "error"),
    "projection.family": ("gaussian", "rademacher"),
    "projection.pooling": ("blocks", "layer", "matrix"),
    "store.dtype": ("float32", "bfloat16", "int8", "4bit", "3bit", "2bit", "none"),
    "search.index": ("none", "scann"),
    "hessian.evaluation": ("all", "leave_one_out", "disjoint"),
    "hessian.structure": ("auto", "dense", "kronecker"),
    "eval.tail_patch_state": ("restored", "fresh"),
}


# Limits that may be infinite.
_UNBOUNDED = ("train.clip", "search.memory_gib")


def check_values(config: ConfigDict) -> None:
    """Checks each value of a config by itself.

    Raises:
        ValueError: a value is not possible; the message names the key.
    """
    values = flat(config)
    for key, choices in CHOICES.items():
        if values[key] not in choices:
            *others, last = map(str, choices)
            listed = f"{', '.join(others)} or {last}"
            raise ValueError(f"unknown {key}={values[key]!r}; use {listed}")
    for key, value in values.items():
        sign = KEYS.get(key, ())[2:]  # a plugin may have keys of its own
        if isinstance(value, int | float):
            if not math.isfinite(value) and key not in _UNBOUNDED:
                raise ValueError(f"{key}={value} must be a finite number")
            if value <= 0 and POSITIVE in sign:
                least = "1 or more" if isinstance(value, int) else "above 0"
                raise ValueError(f"{key}={value} must be {least}")
            if value < 0 and SIGNED in sign and value != -1:
                raise ValueError(f"{key}={value} must not be negative, unless it is -1")
            if value < 0 and SIGNED not in sign:
                raise ValueError(f"{key}={value} must not be negative")
    for key in ("gradients.include", "gradients.exclude"):
        compile_pattern(key, values[key])
    if not 0 < values["train.traced"] <= 1:
        raise ValueError(f"train.traced={values['train.traced']} must be above 0, and 1 at most")
    if values["hessian.weight"] > 1:
        raise ValueError(f"hessian.weight={values['hessian.weight']} must be 1 at most, or -1")


def flat(config: ConfigDict, prefix: str = "") -> dict[str, Any]:
    """Returns the values of a config by key, such as `train.epochs`."""
    values: dict[str, Any] = {}
    for key, value in config.items():
        is_section = isinstance(value, ConfigDict)
        values |= flat(value, f"{prefix}{key}.") if is_section else {prefix + key: value}
    return values


def get_config() -> ConfigDict:
    """Returns a config of the defaults."""
    config = ConfigDict()
    for key, (default, *_) in KEYS.items():
        *sections, name = key.split(".")
        section = config
        for parent in sections:
            if parent not in section:
                section[parent] = ConfigDict()
            section = section[parent]
        section[name] = placeholder(default) if isinstance(default, type) else default
    return config
