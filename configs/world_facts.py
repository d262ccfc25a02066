"""The demo: countries, capitals, currencies, …; 20,000 sentences, a model of 1M parameters.

python -m experiments.trace --config=configs/world_facts.py --workdir=demo
"""

from configs import defaults


def get_config():
    """The config of the demo."""
    c = defaults.get_config()
    c.data.pool = "clean"
    return c
