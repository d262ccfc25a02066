"""A results file of the size of the paper's: 5,415 queries × 10 proponents of C4's length.

python -m tests.viewer.big_file OUT.jsonl
"""

import random
import sys

from tda import results

QUERIES, PROPONENTS = 5415, 10
_RELATIONS = [f"P{n}" for n in (17, 19, 20, 27, 30, 36, 37, 101, 103, 106, 131, 136, 138, 159, 176)]
_WORDS = (
    "the of and to in for is on that with by this was are from at as it be an or which have has "
    "their more can other about new all one would who its also after first when people time two "
    "into city state country river author novel company born capital language science history "
    "music river museum bridge painter physicist kingdom province website click price download"
).split()


def texts(rng: random.Random, count: int, mean: int) -> list[str]:
    """Texts whose lengths are spread as those of web documents, `mean` characters on average."""
    out = []
    for _ in range(count):
        length = int(rng.lognormvariate(0, 0.8) * mean / 1.377)
        words = rng.choices(_WORDS, k=length // 5 + 5)
        out.append(" ".join(words).capitalize() + ".")
    return out


def records(queries: int = QUERIES, proponents: int = PROPONENTS, mean: int = 1900, seed: int = 0):
    """Records with all of the release's fields, one after the other."""
    rng = random.Random(seed)
    pool = texts(rng, 3000, mean)
    for i in range(queries):
        drawn = [rng.randrange(len(pool)) for _ in range(proponents)]
        scores = sorted((rng.betavariate(2, 9) for _ in drawn), reverse=True)
        pairs = zip(drawn, scores, strict=True)
        target = rng.choice(["Paris", "Oslo", "Rome", "physics", "Ontario"])
        entails = [round(rng.betavariate(0.4, 1.2), 4) for _ in drawn]
        yield results.record(
            f"q{i:05}",
            "trex",
            f"Entity {i} of {rng.choice(['Norway', 'Texas', 'Japan'])} is located in",
            target,
            [(f"c4-{seed}-{d}", f"{pool[d]} {target}.", s) for d, s in pairs],
            [],
            fact_id=f"q{i:05}",
            relation=rng.choice(_RELATIONS),
            groundtruth=target if rng.random() < 0.6 else "London",
            is_8b_correct=rng.random() < 0.6,
            **{
                "8b_generations": rng.choices([target, "London", "Berlin"], k=20),
                "8b_confidence": round(rng.random(), 2),
            },
            c4_frequency=int(10 ** rng.uniform(0, 6)),
            proponent_correct=[rng.random() < 0.2 for _ in drawn],
            proponent_ais_scores=entails,
            proponent_ais_best_windows=[f"{pool[d][-30:]} {target}." for d in drawn],
        )


def note_on(item: dict, passage: str, kind, comment: str = "", method: str = "bm25") -> dict:
    """A note on a passage of a record's query."""
    return {
        "example_id": item["example_id"],
        "prompt": item["inputs_plaintext"],
        "target": item["targets_plaintext"],
        "passage_id": passage,
        "type": kind,
        "comment": comment,
        "method": method,
    }


def main() -> None:
    """Writes the file that the command line names."""
    results.write(sys.argv[1], records())


if __name__ == "__main__":
    main()
