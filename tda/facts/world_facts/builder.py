"""TFDS builder `world_facts`: the embedded corpus, generated, with nothing to download."""

from collections.abc import Iterator
from typing import Any

import tensorflow_datasets as tfds

from tda.facts import features
from tda.facts.world_facts.corpus import generate


class Builder(tfds.core.GeneratorBasedBuilder):
    """20,000 short sentences about countries and cities, and the facts that they state."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        # Unshuffled: the record number is then the corpus row, the same on every machine.
        return self.dataset_info_from_configs(
            description="Facts from GeoNames (CC-BY-4.0), stated by templates with a long tail.",
            features=features.record_features(),
            homepage="https://www.geonames.org",
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
        del dl_manager
        sentences, facts = generate()
        return {
            "sentences": ((s.sentence_id, features.encode(s)) for s in sentences),
            "facts": ((fact.fact_id, features.encode(fact)) for fact in facts),
        }

    def _generate_examples(self) -> Iterator:
        raise NotImplementedError("_split_generators gives the examples of both splits itself")
