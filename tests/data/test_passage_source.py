"""Sources of passages that are read by number: tokenised as files are, and as little at a time."""

import json
import pathlib
import weakref

import pytest

from tda.data import part_files, passage_source, pieces, tokenised
from tda.data.corpora import Corpus, CorpusError
from tda.data.mapped import MappedTable
from tda.data.passage_source import PassageSource, can_be_read_again
from tda.data.pretrained_tokenizer import PretrainedTokenizer
from tda.encoding import inputs
from tda.encoding.settings import TextSettings
from tests.data.test_pretrained_tokenizer import TEXTS, byte_level

ROWS = [{"id": f"d{i}", "text": f"{TEXTS[i % 3]} {i}"} for i in range(40)]
ROWS[7]["text"] = " ".join(TEXTS) * 4


class ByNumber:
    """Rows by number, as Grain's sources have them."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.rows[i]


@pytest.fixture
def tokenizer(monkeypatch):
    for module in (pieces, passage_source):
        monkeypatch.setattr(module, "BATCH", 3)
    monkeypatch.setattr(pieces, "BATCHES_A_PART", 2)
    return PretrainedTokenizer(byte_level(), begin=[0])


def tokenise(path, rows, tokenizer):
    source = PassageSource(rows, None, None)
    return tokenised.tokenise_on_disk(path, source, tokenizer, 24)


def parts_of(path):
    return {p.name: p.read_bytes() for p in pathlib.Path(path, "parts").glob("*.safetensors")}


@pytest.mark.parametrize("library", [None, "grain", "datasets"])
def test_parts_have_the_bytes_of_those_of_a_file(tmp_path, tokenizer, library):
    rows = ByNumber(ROWS)
    if library == "grain":
        rows = pytest.importorskip("grain").MapDataset.source(ROWS)
    elif library == "datasets":
        rows = pytest.importorskip("datasets").Dataset.from_list(ROWS)
    file = tmp_path / "corpus.jsonl"
    file.write_text("".join(f"{json.dumps(row)}\n" for row in ROWS))
    of_file = tmp_path / "file"
    tokenised.tokenise_on_disk(of_file, Corpus(file), tokenizer, 24)
    reading = TextSettings(tokenizer, 24, None, None, tmp_path / "rows")
    table = inputs.TextCorpus(rows, reading).table
    assert isinstance(table, MappedTable) and table.ids[0] == "d0"
    parts = parts_of(tmp_path / "rows" / "tokens")
    assert len(parts) == 7 and parts == parts_of(of_file)


def test_no_more_than_a_part_is_in_memory(tmp_path, tokenizer, monkeypatch):
    class Text(str):
        pass

    alive, most = {"text": 0, "part": 0}, {"text": 0, "part": 0}

    def count(kind, thing):
        def forget():
            alive[kind] -= 1

        alive[kind] += 1
        weakref.finalize(thing, forget)
        most[kind] = max(most[kind], alive[kind])

    class Fresh(ByNumber):
        def __getitem__(self, i):
            text = Text(ROWS[i]["text"])
            count("text", text)
            return {"id": f"d{i}", "text": text}

    write, tokens = part_files.write, []

    def counted_write(path, arrays, *rest):
        count("part", arrays["tokens"])
        tokens.append(len(arrays["tokens"]))
        return write(path, arrays, *rest)

    monkeypatch.setattr(part_files, "write", counted_write)
    table, _ = tokenise(tmp_path, Fresh(ROWS), tokenizer)
    assert most["part"] == 1 and len(tokens) == 7 and sum(tokens) == table.token_count
    # A few blocks of 3: the one that is compared, the tokenizer's, and what iterators hold.
    assert 3 <= most["text"] <= 12


def test_a_killed_call_resumes_and_a_finished_one_tokenises_nothing(
    tmp_path, tokenizer, monkeypatch
):
    make, made = pieces._make_part, []

    def killed_at_the_third(job, piece, number, batches):
        if len(made) == 2:
            made.append("kill")
            raise KeyboardInterrupt
        made.append(number)
        return make(job, piece, number, batches)

    monkeypatch.setattr(pieces, "_make_part", killed_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        tokenise(tmp_path, ByNumber(ROWS), tokenizer)
    tokenise(tmp_path, ByNumber(ROWS), tokenizer)
    table, _ = tokenise(tmp_path, ByNumber(ROWS), tokenizer)
    assert made == [0, 1, "kill", 2, 3, 4, 5, 6]
    (tmp_path / "parts" / "000000-00001.safetensors").unlink()
    with pytest.warns(UserWarning, match="missing or damaged, and made again"):
        assert len(tokenise(tmp_path, ByNumber(ROWS), tokenizer)[0].tokens) == table.token_count
    changed = [*ROWS[:-1], ROWS[-1] | {"text": "Another text."}]
    with pytest.raises(CorpusError, match="another corpus; it differs in passages"):
        tokenise(tmp_path, ByNumber(changed), tokenizer)


def test_passages_that_change_while_they_are_read_reach_no_part(tmp_path, tokenizer):
    class Changing(ByNumber):
        reads = 0

        def __getitem__(self, i):
            self.reads += 1
            return f"{TEXTS[0]} {i} {i > 20 and self.reads // len(ROWS)}"

    with pytest.raises(CorpusError, match="a Changing that gave other passages"):
        tokenise(tmp_path / "a", Changing(ROWS), tokenizer)
    assert len(parts_of(tmp_path / "a")) <= 3

    class Exhausted(ByNumber):
        rest = iter(ROWS)

        def __iter__(self):
            return self.rest

    with pytest.raises(CorpusError, match="an? Exhausted that gave other passages"):
        tokenise(tmp_path / "b", Exhausted(ROWS), tokenizer)


def test_lists_and_iterators_stay_in_memory():
    for passages, expected in ((ROWS, False), (iter(ROWS), False), (ByNumber(ROWS), True)):
        assert can_be_read_again(passages) is expected
