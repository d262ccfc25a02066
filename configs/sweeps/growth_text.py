"""Growth on real text: three sizes by training tokens, none of which is seen twice; two seeds.

    python -m experiments.sweep --config=configs/trex_sweeps.py \\
        --sweep=configs/sweeps/growth_text.py --workdir=DIR --parallel=2 \\
        --config.data.sentences=trex_lama_sentences.jsonl.gz \\
        --config.data.facts=trex_lama_facts.jsonl.gz \\
        --config.data.also_train_on=enwiki2015_AA.jsonl.gz

A model that learns its passages by heart says little of larger corpora (`tokens` and `growth` have
8 and 4 epochs). Here 10,000 sentences are traced, and the model reads them once or in part, among
all other sentences of T-REx, whole articles, and facts in the words of the prompts. A block for
each matrix, with about as many dimensions at every size.

Cost: two hours on 2 CPU cores, two points at a time, half of it the largest model's; 16 GB of disk.
Expected MRR of TrackStar (seed 0) after a quarter and after all of the text: micro 0.23 and 0.19,
tiny 0.19 and 0.28, mini 0.19 and 0.35; see results/README.md.
"""


def get_sweep():
    """Returns the grid of sizes by the share of the training text, and seeds."""
    return {
        "fixed": {
            "methods": "trackstar,trackstar_query_logit,exp5,grad_cos,bm25",
            "data.train_on": "all",
            "data.statements_of": "all",
            "data.id_field": "title",
            "data.share": 0.03,
            "tokenizer.vocab_size": 4096,
            "judge.name": "lexical",
            "eval.tail_patch_queries": 50,
        },
        "axes": {
            "seed": (0, 1),
            "model.size, train.learning_rate, projection.side": (
                ("micro", 3e-3, 32),
                ("tiny", 3e-3, 32),
                ("mini", 1.5e-3, 26),
            ),
            "train.epochs": (0.25, 1.0),
        },
        "plots": [
            {
                "name": "growth_text",
                "x": "parameters",
                "y": ("mrr", "recall_at_10", "tail_patch_net", "tail_patch_log_net"),
                "lines": ["method", "train.epochs"],
                # BM25 knows no model, and is far above the others: its figures are in the table.
                "omit": dict.fromkeys(("mrr", "recall_at_10"), ("bm25",)),
                "log_x": True,
            },
            {
                "name": "growth_text_kinds",
                "x": "parameters",
                "y": ("share: states the fact", "share: relation prior", "share: entity only"),
                "lines": ["method", "train.epochs"],
                "log_x": True,
            },
        ],
    }
