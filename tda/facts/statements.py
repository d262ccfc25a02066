"""Facts stated in the words of their prompts: training text for a model that is to answer prompts.

A small model that saw facts only in running text answers few prompts about them; one that also saw
other facts in the prompts' form answers more (the mixed training of Allen-Zhu and Li (2023),
"Physics of Language Models: Part 3.1"). The asked facts themselves are never stated here.
"""

from collections.abc import Iterable, Iterator, Sequence

from tda.facts.records import Fact


def statements(facts: Iterable[Fact], asked: Sequence[Fact], n: int) -> Iterator[tuple[str, str]]:
    """States every fact that tells nothing of an asked one.

    Left out is each fact with the subject of a query, and each that joins a query's subject and
    object the other way round ("Paris is the capital of" for "The capital of France is").

    Args:
        facts: all facts of the corpus.
        asked: the queries.
        n: state each fact by so many of its prompts, the first ones that it has; 1 to 3.

    Yields:
        (id, text), such as ("statement-FACT_ID-0", "The capital of France is Paris.").

    Raises:
        ValueError: n is not 1, 2 or 3.
    """
    if n not in (1, 2, 3):
        raise ValueError(f"facts are stated by n={n} prompts; it must be 1, 2 or 3")
    subjects = {f.entity0_uri for f in asked}
    reversed_pairs = {(f.entity1_uri, f.entity0_uri) for f in asked}
    for fact in facts:
        pair = fact.entity0_uri, fact.entity1_uri
        if fact.entity0_uri in subjects or pair in reversed_pairs:
            continue
        for i, prompt in enumerate((fact.prompt0, fact.prompt1, fact.prompt2)[:n]):
            if prompt is not None:
                yield f"statement-{fact.fact_id}-{i}", f"{prompt} {fact.entity1}."
