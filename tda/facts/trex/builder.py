"""TFDS builder `trex`: the facts and the sentences of the authors' release, or of local files.

Source: Chang et al. (2024), "Scalable Influence and Fact Tracing for Large Language Model
Pretraining", https://github.com/PAIR-code/pretraining-tda. The sentences are from T-REx
(CC-BY-SA-4.0).
"""

from collections.abc import Iterator
from typing import Any

import tensorflow_datasets as tfds

from tda.data.jsonl import Paths, expand
from tda.facts import features
from tda.facts.files import iter_facts, iter_sentences
from tda.runtime.fingerprint import fingerprint, fingerprint_files

RELEASE = "https://storage.googleapis.com/tda-resources/2410.17413/public/"
N_SHARDS = 20
_FACTS = {"sample": "trex_facts_sample.jsonl", "full": "trex_facts.jsonl"}

_CITATION = """@article{chang2024scalable,
  title={Scalable Influence and Fact Tracing for Large Language Model Pretraining},
  author={Chang, Tyler A. and Rajagopal, Dheeraj and Bolukbasi, Tolga and Dixon, Lucas and
    Tenney, Ian},
  journal={arXiv preprint arXiv:2410.17413},
  year={2024}
}"""


class Builder(tfds.core.GeneratorBasedBuilder):
    """The release's facts and sentences, in the order of its files.

    Configs are `sample` (the sampled queries) and `full` (every fact); both take all 19.6M
    sentences, a download of 6 GB. With `sentences` and `facts`, local files of the same form are
    read instead and nothing is downloaded; a config named by their contents keeps the datasets
    of different files apart.

    Args:
        sentences: Local JSON lines of sentences: a file, a glob pattern, or a list of files.
        facts: Local JSON lines of facts.
        **kwargs: For `tfds.core.GeneratorBasedBuilder`, such as `data_dir` and `config`.
    """

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [
        tfds.core.BuilderConfig(
            name="sample", description="The 5,415 sampled queries, all sentences."
        ),
        tfds.core.BuilderConfig(name="full", description="All 1.2M facts, all sentences."),
    ]

    def __init__(
        self, *, sentences: Paths | None = None, facts: Paths | None = None, **kwargs: Any
    ):
        if (sentences is None) != (facts is None):
            raise ValueError("give both sentences= and facts=, or neither to use the release")
        self._local = None
        if sentences is not None:
            if kwargs.get("config") is not None:
                raise ValueError("config= chooses from the release; leave it out for local files")
            self._local = {"sentences": expand(sentences), "facts": expand(facts)}
            digests = {k: fingerprint_files(files) for k, files in self._local.items()}
            kwargs["config"] = tfds.core.BuilderConfig(
                name=f"local_{fingerprint(digests)}", description="Local JSON lines."
            )
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        # Unshuffled: the record number is then the corpus row, the same on every machine.
        return self.dataset_info_from_configs(
            description="Facts, and Wikipedia sentences with the facts they state (T-REx).",
            features=features.record_features(),
            homepage="https://github.com/PAIR-code/pretraining-tda",
            citation=_CITATION,
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
        files = self._local or dl_manager.download(
            {
                "sentences": [
                    f"{RELEASE}trex_sentences.jsonl-{i:05d}-of-{N_SHARDS:05d}"
                    for i in range(N_SHARDS)
                ],
                "facts": RELEASE + _FACTS[self.builder_config.name],
            }
        )
        return {split: self._generate_examples(split, files[split]) for split in files}

    def _generate_examples(self, split: str, files: Paths) -> Iterator[tuple[str, dict[str, Any]]]:
        if split == "sentences":
            for sentence in iter_sentences(files):
                yield sentence.sentence_id, features.encode(sentence)
        else:
            for fact in iter_facts(files):
                yield fact.fact_id, features.encode(fact)
