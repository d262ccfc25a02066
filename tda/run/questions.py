"""Queries and their choices as tokens, by the config's prompt, joiner and context."""

from collections.abc import Iterable, Sequence

from ml_collections import ConfigDict

from tda.data.tokens import TokenTable, tokenise_queries
from tda.facts.records import Fact


def tokenise(facts: Sequence[Fact], config: ConfigDict, tokenizer) -> TokenTable:
    """Returns every fact's prompt with its target.

    Raises:
        ValueError: one, or a choice beside it, does not fit the context; the message names it.
    """
    # Here, since a model may be trained for days before the choices are asked.
    tokenise_choices(facts, config, tokenizer)
    return _tokenise(((f, f.entity1) for f in facts), config, tokenizer)


def tokenise_choices(facts: Iterable[Fact], config: ConfigDict, tokenizer) -> TokenTable:
    """Returns every fact's prompt with each choice beside its target, in order."""
    choices = ((f, choice) for f in facts for choice in f.other_choices)
    return _tokenise(choices, config, tokenizer)


def _tokenise(targets: Iterable[tuple[Fact, str]], config: ConfigDict, tokenizer) -> TokenTable:
    data = config.data
    queries = ((f.fact_id, f.prompt(data.prompt), target) for f, target in targets)
    return tokenise_queries(queries, tokenizer, config.model.context, data.joiner)
