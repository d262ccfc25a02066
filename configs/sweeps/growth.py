"""Does influence come closer to attribution as models grow? Four sizes by training tokens.

    python -m experiments.sweep --config=configs/world_facts.py:pooled \\
        --sweep=configs/sweeps/growth.py --workdir=DIR

MRR and recall by labels, where the corpus has any; AIS-MRR and recall by the judge of names;
tail-patch less what momentum does; and what proponents say. A model that has learnt its passages by
heart says little of larger corpora: give many documents and few epochs
(`--config=configs/open_wiki.py` with articles and sentences; its keys as in that file).
LDS with `--board --config=configs/counterfactual_world.py`, which retrains at every point
(results/README.md has the flags, with a counterfactual.learning_rate that suits the largest size).

Cost: twelve trainings (28 epochs of four sizes), and a pass over the corpus a point;
`python -m experiments.plan` with the config, --config.model.size and --hardware estimates a pass.
"""


def get_sweep():
    """Returns the grid of sizes, each with a learning rate that suits it, by epochs."""
    return {
        "fixed": {
            "methods": "trackstar,exp5,grad_cos,bm25",
            "judge.name": "lexical",
        },
        "axes": {
            "model.size, train.learning_rate": (
                ("micro", 3e-3),
                ("tiny", 3e-3),
                ("mini", 1.5e-3),
                ("small", 1.5e-3),
            ),
            "train.epochs": (1.0, 2.0, 4.0),
        },
        "plots": [
            {
                "name": "growth",
                "x": "training_tokens",
                "y": ("mrr", "ais_mrr", "ais_recall_at_10", "tail_patch_net", "tail_patch_log_net"),
                "lines": ["method", "model.size"],
                # BM25 knows no model, and is far above the others: its figures are in the table.
                "omit": dict.fromkeys(("mrr", "ais_mrr", "ais_recall_at_10"), ("bm25",)),
                "log_x": True,
            },
            {
                "name": "growth_by_size",
                "x": "parameters",
                "y": ("recall_at_10", "ais_mrr", "tail_patch_net"),
                "lines": ["method", "train.epochs"],
                "omit": dict.fromkeys(("recall_at_10", "ais_mrr"), ("bm25",)),
                "log_x": True,
            },
            {
                "name": "growth_kinds",
                "x": "parameters",
                "y": ("share: states the fact", "share: relation prior", "share: entity only"),
                "lines": ["method", "train.epochs"],
                "log_x": True,
            },
        ],
    }
