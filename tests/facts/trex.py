"""Where the T-REx data is, for the tests that read it."""

import os
import pathlib

import pytest

DATA = pathlib.Path(
    os.environ.get("TDA_DATA", pathlib.Path(__file__).parents[2].parent / "shared" / "data")
)
SENTENCES = DATA / "trex_lama_sentences.jsonl.gz"
FACTS = DATA / "trex_lama_facts.jsonl.gz"
needed = pytest.mark.skipif(
    not DATA.is_dir(), reason="the T-REx data is not here; set TDA_DATA to it"
)
