"""The defaults alone: a run on data of your own.

    python -m experiments.trace --config=configs/defaults.py --workdir=DIR \\
        --config.data.sentences=SENTENCES.jsonl --config.data.facts=FACTS.jsonl

Every key, its default and its meaning: tda/run/defaults.py, or `--help`.
"""

from tda.run.defaults import get_config

__all__ = ["get_config"]
