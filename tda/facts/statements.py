"""Facts stated in the words of their prompts, as training text for models that answer prompts.

A small model that saw facts only in running text answers few prompts about them; a model that also
saw other facts in the form of prompts answers more (the mixed training of Allen-Zhu and Li (2023),
"Physics of Language Models: Part 3.1"). The facts of the queries are never stated here.
"""

from collections.abc import Iterable, Iterator, Sequence

from tda.data.joining import join
from tda.facts.records import Fact


def statements(
    facts: Iterable[Fact], queries: Sequence[Fact], n: int, joiner: str | None = None
) -> Iterator[tuple[str, str]]:
    """States every fact that reveals no query's answer.

    Left out is each fact with the subject of a query, and each that joins a query's subject and
    object the other way round ("Paris is the capital of" for "The capital of France is").

    Args:
        facts: all facts of the corpus.
        queries: the facts that are asked for.
        n: number of prompts that state each fact, from prompt0 on; 1 to 3.
        joiner: the text between a prompt and the object; by default a space where one belongs
            (`tda.data.joining.choose_joiner`).

    Yields:
        (id, text), such as ("statement-FACT_ID-0", "The capital of France is Paris.").

    Raises:
        ValueError: n is not 1, 2 or 3.
    """
    if n not in (1, 2, 3):
        raise ValueError(f"facts are stated by n={n} prompts; it must be 1, 2 or 3")
    subjects = {f.entity0_uri for f in queries}
    reversed_pairs = {(f.entity1_uri, f.entity0_uri) for f in queries}
    for fact in facts:
        pair = fact.entity0_uri, fact.entity1_uri
        if fact.entity0_uri in subjects or pair in reversed_pairs:
            continue
        for i, prompt in enumerate((fact.prompt0, fact.prompt1, fact.prompt2)[:n]):
            if prompt is not None:
                yield f"statement-{fact.fact_id}-{i}", f"{join(prompt, fact.entity1, joiner)}."
