"""A corpus as passages: on disk as in memory, killed or not, with ids that lead back."""

import contextlib
import json
import os
import shutil
import tracemalloc

import numpy as np
import pytest

from tda.data import corpora, long_texts, names, part_files, parts, pieces, tokenised, tokenising
from tda.data.chats import ChatTemplate
from tda.data.corpora import Corpus, CorpusError, Document
from tda.data.file_states import read_states
from tda.data.parts import Counts, Part
from tda.data.pretrained_tokenizer import PretrainedTokenizer
from tda.data.rows import parse_passages
from tda.data.tokenizer import Tokenizer
from tda.runtime import preemption
from tda.runtime.engine import Engine
from tda.runtime.fingerprint import hash_64_bits
from tests.data.test_pretrained_tokenizer import TEXTS, byte_level

LONG = " ".join(TEXTS) * 4
DOCUMENTS = [
    Document("short", TEXTS[0]),
    Document("ünïcode/x", LONG),
    Document("blank", " \n"),
    *(Document(f"d{i}", f"{TEXTS[i % 3]} {i}") for i in range(40)),
]


@pytest.fixture
def tokenizer():
    return PretrainedTokenizer(byte_level(), begin=[0])


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(pieces, "BATCH", 3)
    monkeypatch.setattr(pieces, "BATCHES_A_PART", 2)


class Listed:
    """Lists of documents as a corpus in pieces."""

    files, unit, skipped = {}, "document", 0

    def __init__(self, *lists):
        self.lists = lists or (DOCUMENTS,)
        self.pieces = [pieces.Piece((), len(x)) for x in self.lists]

    def describe(self):
        """Returns a name."""
        return {"corpus": "x"}

    def read(self, piece):
        """Yields the documents of a list."""
        yield from self.lists[piece]


def same(a, b):
    assert list(a.ids) == list(b.ids) and list(a.documents) == list(b.documents)
    for name in ("tokens", "starts", "scored"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


def test_a_table_counts_its_documents(tokenizer):
    table, counts = tokenised.tokenise_in_memory(DOCUMENTS, tokenizer, 24)
    several = len({n.split("#")[0] for n in table.ids if "#" in n})
    assert counts == Counts(len(DOCUMENTS), 1, several) and several > 3
    assert table.ids[0] == "short" and "blank" not in list(table.documents)


@pytest.mark.parametrize("own", [False, True])
def test_ids_lead_back_to_the_characters(tokenizer, own):
    """Guards: spans that are off by the space that a tokenizer puts in front."""
    if own:
        tokenizer = Tokenizer.train(TEXTS, 320)
    found, _ = tokenised.tokenise_in_memory(DOCUMENTS, tokenizer, 24)
    texts = {d.id: d.text for d in DOCUMENTS}
    spans = []
    for i, name in enumerate(found.ids):
        document, span = tokenised.place_of(name)
        assert document == found.documents[i]
        said = tokenizer.decode(found.tokens[found.starts[i] : found.starts[i + 1]])
        if document == "ünïcode/x":
            spans.append(span)
            # A cut between the bytes of one character leaves it in both passages.
            whole = texts[document][span].strip()
            said = said.strip("\ufffd \n\t")
            assert said in whole and len(whole) - len(said) <= 3
        elif span is None:
            assert said.strip() == texts[document].strip()
    assert spans[0].start == 0 and spans[-1].stop == len(LONG)
    assert all(a.stop >= b.start - 1 for a, b in zip(spans, spans[1:], strict=False))
    assert len(spans) > 5


def test_on_disk_as_in_memory(tokenizer, tmp_path):
    expected, counts = tokenised.tokenise_in_memory(DOCUMENTS, tokenizer, 24)
    source = Listed(DOCUMENTS[:20], [], DOCUMENTS[20:])
    table, same_counts = tokenised.tokenise_on_disk(tmp_path, source, tokenizer, 24)
    same(table, expected)
    assert same_counts == counts
    for name in ("lengths", "scored_lengths"):
        np.testing.assert_array_equal(getattr(table, name), getattr(expected, name))
    for name in ("token_count", "token_range", "longest", "shortest"):
        assert getattr(table, name) == getattr(expected, name), name
    rows = np.array([[len(table) - 1, 0], [7, 7]])
    np.testing.assert_array_equal(table.lengths_of(rows), expected.lengths_of(rows))
    for first, stop in ((0, None), (3, 4), (5, 5), (2, len(table) - 1)):
        assert table.count_scored(first, stop) == expected.count_scored(first, stop)
    for row in range(len(table)):
        for a, b in zip(table.sequence(row), expected.sequence(row), strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)
    assert isinstance(table.sequence(0)[0].base, np.memmap)
    assert table.ids.hashes().tolist() == [hash_64_bits(x) for x in expected.ids]
    assert table.documents.hashes().tolist() == [hash_64_bits(x) for x in expected.documents]
    # There already: the documents are not read again.
    gone = Listed([], [], [])
    again, _ = tokenised.tokenise_on_disk(tmp_path, gone, tokenizer, 24)
    same(again, expected)
    assert again.fingerprint() == table.fingerprint()
    with pytest.raises(CorpusError, match="made from another corpus; it differs in context"):
        tokenised.tokenise_on_disk(tmp_path, Listed(), tokenizer, 25)


def test_a_start_reads_no_part(tokenizer, tmp_path, monkeypatch):
    """Guards: checks of ids, lengths or tokens by row at every start."""
    tokenised.tokenise_on_disk(tmp_path, Listed(), tokenizer, 24)
    monkeypatch.setattr(part_files, "map_arrays", None)
    table, _ = tokenised.tokenise_on_disk(tmp_path, Listed(), tokenizer, 24)
    assert len(table) > 40 and table.count_scored() < table.token_count
    assert table.fingerprint() and table.longest and table.token_range and table.documents


def test_a_passage_takes_few_bytes_beside_its_tokens(tokenizer, tmp_path):
    """Guards: a byte of `scored` a token, where it follows from where passages start."""
    documents = [Document(f"d{i}", LONG * 3) for i in range(20)]
    table, _ = tokenised.tokenise_on_disk(tmp_path, Listed(documents), tokenizer, 512)
    assert not table.scored.all()
    size = sum(p.stat().st_size for p in (tmp_path / "parts").glob("*.safetensors"))
    assert size < 4.6 * table.token_count


def make_killed(directory, source, tokenizer, documents):
    """Tokenises until so many documents are read."""
    read = iter(range(documents))

    class Killed(Listed):
        def read(self, piece):
            for document in super().read(piece):
                if next(read, None) is None:
                    raise KeyboardInterrupt
                yield document

    with pytest.raises(KeyboardInterrupt):
        killed = Killed(*source.lists)
        tokenised.tokenise_on_disk(directory, killed, tokenizer, 24)


def contents(directory):
    return {p.name: p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def test_a_killed_run_goes_on_to_the_same_bytes(tokenizer, tmp_path, monkeypatch):
    """Guards: a resumed corpus with documents twice, or without some; parts made twice."""
    source = Listed(DOCUMENTS[:25], DOCUMENTS[25:])
    tokenised.tokenise_on_disk(tmp_path / "a", source, tokenizer, 24)
    for count in (5, 14, 15, 40):
        make_killed(tmp_path / "b", source, tokenizer, count)
    assert len(list((tmp_path / "b" / "parts").glob("*.safetensors"))) == 6
    damaged = tmp_path / "b" / "parts" / "000000-00001.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    made, make = [], pieces._make_part

    def counted(job, piece, number, batches):
        made.append((piece, number))
        return make(job, piece, number, batches)

    monkeypatch.setattr(pieces, "_make_part", counted)
    tokenised.tokenise_on_disk(tmp_path / "b", source, tokenizer, 24)
    assert made == [(0, 1), (1, 1), (1, 2)]
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_a_turn_makes_its_own_parts(tokenizer, tmp_path):
    """Guards: workers that each make all parts of a piece."""
    job = pieces.Job(Listed(), tokenizer, 24, tmp_path, {})
    made = []
    pieces.make_parts(job, pieces.Turn(0, 1, 3), lambda *part: made.append(part))
    assert pieces.list_parts(tmp_path) == {0: {1, 4, 7}} and len(made) == 3
    assert pieces.read_end(tmp_path, 0) is None
    for turn in (0, 2):
        pieces.make_parts(job, pieces.Turn(0, turn, 3), lambda *part: made.append(part))
    assert pieces.list_parts(tmp_path) == {0: set(range(8))}
    assert pieces.read_end(tmp_path, 0).parts == 8
    assert sum(documents for documents, _ in made) == len(DOCUMENTS)


def test_any_number_of_workers_makes_the_same_bytes(tmp_path, monkeypatch):
    """Guards: parts that depend on who makes them, pieces that only one worker can share."""
    tokenizer = Tokenizer.train(TEXTS, 320)
    folder = tmp_path / "corpus"
    folder.mkdir()
    rows = [json.dumps({"text": d.text}) for d in DOCUMENTS]
    # A worker's copy of the tokenizer reads special tokens in a text no more than the original.
    rows[0] = json.dumps({"text": f"{DOCUMENTS[0].text} A spelled <eos> stays text."})
    # Of one piece, so that two workers have to share it.
    (folder / "a.jsonl").write_text("\n".join(rows * 400))
    monkeypatch.setattr(pieces, "BATCH", 256)
    monkeypatch.setattr(pieces, "BATCHES_A_PART", 64)
    for workers in (1, 2):
        monkeypatch.setattr(tokenising, "count_workers", lambda _, n=workers: n)
        place = tmp_path / str(workers)
        tokenised.tokenise_on_disk(place, Corpus(folder), tokenizer, 24)
    assert len(contents(tmp_path / "1")) == 5
    assert contents(tmp_path / "1") == contents(tmp_path / "2")
    # A notice ends the workers long before their first part.
    preemption._watch.noticed.set()
    try:
        with pytest.raises(preemption.Preempted):
            place = tmp_path / "ended"
            tokenised.tokenise_on_disk(place, Corpus(folder), tokenizer, 24)
    finally:
        preemption._watch.noticed.clear()
    assert list(contents(place)) == ["made_from.json"]
    (folder / "a.jsonl").write_text('{"text": "x"}\n{"text": 5}')
    with pytest.raises(CorpusError, match="a.jsonl, line 2: 'text' is int"):
        tokenised.tokenise_on_disk(tmp_path / "3", Corpus(folder), tokenizer, 24)


def test_a_terminals_ctrl_c_reaches_no_worker():
    """Guards: tracebacks of workers that are still importing."""
    worker = tokenising._Worker("")
    try:
        assert os.getpgid(worker._process.pid) != os.getpgrp()
    finally:
        worker.stop()


def test_a_worker_gets_its_job_as_json(tmp_path):
    write_lines = (tmp_path / "a.jsonl").write_text
    write_lines('{"body": "<eos> x"}\n')
    source = Corpus([tmp_path / "a.jsonl"], text_field="body")
    chat = ChatTemplate("{{ messages }}", (("bos_token", "<s>"),))
    pretrained = PretrainedTokenizer(byte_level(), begin=[0], pad=3, parse_special=True, chat=chat)
    for tokenizer in (Tokenizer.train(TEXTS, 320), pretrained):
        states = read_states(source.files)
        job = pieces.Job(source, tokenizer, 24, tmp_path, states)
        read = tokenising._read_job(json.dumps(json.loads(tokenising._describe_job(job))))
        for name in ("begin", "end", "eos", "pad", "parse_special", "chat"):
            assert getattr(read.tokenizer, name) == getattr(tokenizer, name)
        texts = [*TEXTS, "<eos> <bos> <s>"]
        assert read.tokenizer.encode_spans(texts) == tokenizer.encode_spans(texts)
        assert (read.context, read.folder, read.states) == (24, tmp_path, states)
        assert read.source.describe() == source.describe()
        assert list(read.source) == list(source)
    write_lines('{"body": "<eos> xyz"}\n')
    with pytest.raises(CorpusError, match="were changed; repeat"):
        tokenising._read_job(tokenising._describe_job(job))


class OwnTokenizer(PretrainedTokenizer):
    """A user's class, of which JSON says nothing."""


def test_what_json_cannot_describe_is_tokenised_in_one_process(tokenizer, tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    corpus = Corpus(tmp_path / "a.jsonl")
    monkeypatch.setattr(tokenising, "count_workers", lambda _: 2)
    monkeypatch.setattr(tokenising, "_Worker", None)
    own = OwnTokenizer(byte_level(), begin=[0])
    for i, (source, one) in enumerate([(corpus, own), (Listed(), tokenizer)]):
        table, _ = tokenised.tokenise_on_disk(tmp_path / str(i), source, one, 24)
        assert len(table)
    with pytest.raises(TypeError, match="NoneType"):  # workers would be started for the rest
        tokenised.tokenise_on_disk(tmp_path / "2", corpus, tokenizer, 24)


def test_programs_on_other_hosts_cut_a_corpus_alike(tokenizer, tmp_path, monkeypatch):
    """Guards: tasks of an array whose numbers mean other parts where there are more processors."""
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS * 30))
    missing = {}

    class Task(Engine):
        programs = 3

        def compute(self, work):
            missing[workers] = work.list_missing()
            work.compute(missing[workers][::2])

    for workers in (1, 8):
        monkeypatch.setattr(tokenising, "count_workers", lambda _, n=workers: n)
        with contextlib.suppress(TypeError):  # the index lacks parts at first
            tokenised.tokenise_on_disk(
                tmp_path / "t", Corpus(tmp_path / "a.jsonl"), tokenizer, 24, Task()
            )
    assert missing == {1: [0, 1, 2], 8: [1]}


def read_all(table):
    ids, documents = list(table.ids), list(table.documents)
    hashes = table.ids.hashes(), table.documents.hashes()
    return [ids, documents, *hashes, table.tokens, table.starts, table.scored]


@pytest.mark.filterwarnings("ignore:.*made again")
def test_a_flipped_bit_is_found_and_its_part_made_again(tokenizer, tmp_path):
    """Guards: damage that no size shows, in each array of a part and in its header."""
    ids = Document("z", "", tokens=(5, 6, 7), scored=(True, False, True))
    source = Listed([*DOCUMENTS[:12], ids])
    table, _ = tokenised.tokenise_on_disk(tmp_path, source, tokenizer, 24)
    expected, written = read_all(table), contents(tmp_path)
    names = sorted(n for n in written if n.endswith(".safetensors"))
    assert len(names) > 2
    places = {(names[0], "header"): 30}
    for name in (names[0], names[-1]):  # one with spans, one with scored
        header, start = part_files._read_header(tmp_path / "parts" / name)
        del header["__metadata__"]
        places |= {(name, k): start + x["data_offsets"][0] for k, x in header.items()}
    assert {array for _, array in places} == {*parts.ARRAYS, "header"}
    for (name, _), place in places.items():
        path = tmp_path / "parts" / name
        damaged = bytearray(written[name])
        damaged[place] ^= 4
        path.write_bytes(damaged)
        opened, _ = tokenised.open_tokens(tmp_path)
        with pytest.raises(CorpusError, match=f"{name} is missing or damaged"):
            read_all(opened)
        again, _ = tokenised.tokenise_on_disk(tmp_path, source, tokenizer, 24)
        with pytest.warns(UserWarning, match=f"{name} is missing or damaged, and made again"):
            values = read_all(again)
        for x, y in zip(values, expected, strict=True):
            np.testing.assert_array_equal(x, y)
        assert contents(tmp_path) == written
    # A corpus that has changed meanwhile is not read in place of the lost part.
    path.write_bytes(damaged)
    source.lists = ([*DOCUMENTS[:12], Document("z", "other")],)
    again, _ = tokenised.tokenise_on_disk(tmp_path, source, tokenizer, 24)
    with pytest.raises(CorpusError, match="has changed; remove that directory"):
        read_all(again)


def test_a_copied_corpus_is_the_same_corpus(tokenizer, tmp_path):
    """Guards: an identity of times and places; a changed file of the same size taken for it."""
    folder, copy, tokens_folder = (tmp_path / n for n in ("corpus", "elsewhere/copy", "tokens"))
    folder.mkdir()
    for name in "ab":
        (folder / f"{name}.jsonl").write_text(json.dumps({"text": f"{TEXTS[0]} {name}"}))

    def make(path):
        corpus = Corpus(path)
        return tokenised.tokenise_on_disk(tokens_folder, corpus, tokenizer, 24)[0]

    table = make(folder)
    assert list(table.ids) == ["a.jsonl:0", "b.jsonl:0"]
    shutil.copytree(folder, copy)
    os.utime(copy / "a.jsonl", ns=(5, 5))
    assert make(copy).fingerprint() == table.fingerprint()
    # The copy's times were noted: it is not read again.
    states = json.loads((tokens_folder / "corpus.json").read_text())["files"]
    assert states["a.jsonl"][1] == 5
    text = (copy / "a.jsonl").read_text()
    (copy / "a.jsonl").write_text(text.replace(" a", " b"))
    with pytest.raises(CorpusError, match="another corpus; it differs in its files: a.jsonl"):
        make(copy)
    (copy / "a.jsonl").write_text(text)
    assert make(copy).fingerprint() == table.fingerprint()
    (copy / "c.jsonl").write_text(text)
    with pytest.raises(CorpusError, match="another corpus; it differs in its files: c.jsonl"):
        make(copy)


def test_a_file_that_changed_before_the_end_is_tokenised_again(tmp_path, monkeypatch):
    """Guards: parts of two versions of a file in one table."""
    tokenizer = PretrainedTokenizer(byte_level(), begin=[0])
    files = [tmp_path / "corpus" / f"{name}.jsonl" for name in "ab"]
    files[0].parent.mkdir()

    def write(word):
        for file in files:
            rows = [{"id": f"{file.name}{i}", "text": f"{TEXTS[0]} {word}"} for i in range(20)]
            file.write_text("\n".join(map(json.dumps, rows)))

    monkeypatch.setattr(corpora, "_PIECE_BYTES", 1)
    write("one")
    make, made = pieces._make_part, iter(range(5))

    def killed(*arguments):
        if next(made, None) is None:
            raise KeyboardInterrupt
        return make(*arguments)

    monkeypatch.setattr(pieces, "_make_part", killed)
    for place in ("a", "b"):
        with pytest.raises(KeyboardInterrupt):
            corpus = Corpus(files[0].parent)
            tokenised.tokenise_on_disk(tmp_path / place, corpus, tokenizer, 24)
        write("two")
        os.utime(files[1], ns=(7, 7))
    monkeypatch.setattr(pieces, "_make_part", make)
    for place in "ab":
        corpus = Corpus(files[0].parent)
        tokenised.tokenise_on_disk(tmp_path / place, corpus, tokenizer, 24)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_a_file_that_changed_between_two_turns_is_refused(tokenizer, tmp_path, order):
    """Guards: parts of two versions of a file in one table, which two processes read."""
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS * 9))

    class Task(Engine):
        programs = 2

        def compute(self, work):
            work.compute(order[:1])
            file.write_text("".join(json.dumps({"text": t + "!"}) + "\n" for t in TEXTS * 9))
            work.compute(order[1:])

    with pytest.raises(CorpusError, match="a.jsonl was changed while it was read; repeat"):
        tokenised.tokenise_on_disk(tmp_path / "a", Corpus(file), tokenizer, 24, Task())
    table, _ = tokenised.tokenise_on_disk(tmp_path / "a", Corpus(file), tokenizer, 24)
    expected, _ = tokenised.tokenise_on_disk(tmp_path / "b", Corpus(file), tokenizer, 24)
    assert table.fingerprint() == expected.fingerprint()


def test_a_file_that_moved_to_another_piece_is_tokenised_again(tmp_path, monkeypatch):
    """Guards: parts of the old second piece taken for the new one's, and lost documents."""
    tokenizer = PretrainedTokenizer(byte_level(), begin=[0])
    folder = tmp_path / "corpus"
    folder.mkdir()

    def write(name, word, count):
        rows = [{"id": f"{word}{i}", "text": f"{TEXTS[0]} {word}"} for i in range(count)]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))

    for name in "abc":
        write(name, name, 20)
    monkeypatch.setattr(corpora, "_PIECE_BYTES", (folder / "a.jsonl").stat().st_size + 1)
    make = pieces._make_part

    def killed(job, piece, *arguments):
        if piece == 2:
            raise KeyboardInterrupt
        return make(job, piece, *arguments)

    monkeypatch.setattr(pieces, "_make_part", killed)
    with pytest.raises(KeyboardInterrupt):
        tokenised.tokenise_on_disk(tmp_path / "t", Corpus(folder), tokenizer, 24)
    monkeypatch.setattr(pieces, "_make_part", make)
    # Now the first two files share a piece, and the third one is the second.
    write("a", "a", 4)
    write("b", "new", 8)
    assert [len(p.files) for p in Corpus(folder).pieces] == [2, 1]
    table, _ = tokenised.tokenise_on_disk(tmp_path / "t", Corpus(folder), tokenizer, 24)
    documents = dict.fromkeys(table.documents)
    assert [d.rstrip("0123456789") for d in documents] == ["a"] * 4 + ["new"] * 8 + ["c"] * 20


def test_one_id_in_two_parts_is_refused(tokenizer, tmp_path, monkeypatch):
    """Guards: duplicates that only a comparison across parts shows."""
    source = Listed(DOCUMENTS, [Document("d7", TEXTS[1])])
    for most in (names._SORTED, 3):
        monkeypatch.setattr(names, "_SORTED", most)
        with pytest.raises(CorpusError, match="two documents have the id 'd7'"):
            tokenised.tokenise_on_disk(tmp_path, source, tokenizer, 24)
    # Two names of one hash are two names.
    monkeypatch.setattr(parts, "hash_64_bits", lambda name: 5)
    tokenised.tokenise_on_disk(tmp_path / "b", Listed(), tokenizer, 24)


def test_what_cannot_be_is_told(tokenizer, tmp_path):
    with pytest.raises(CorpusError, match="two documents have the id 'short'"):
        tokenised.tokenise_in_memory([*DOCUMENTS, DOCUMENTS[0]], tokenizer, 24)
    for nothing in ([], [Document("a", " ")]):
        with pytest.raises(CorpusError, match="the corpus has no text"):
            tokenised.tokenise_in_memory(nothing, tokenizer, 24)
    half = "Oslo \ud83d"
    for wrong, message in (
        (Document("p7", half), r"document 'p7': the text has half a character, \\ud83d at 5 "),
        (Document("p8", "Oslo", prompt=half), "document 'p8': the prompt has half a character"),
        (Document(half, "Oslo"), r"document 'Oslo \\ud83d': the id has half a character"),
        (Document("p8", None), "document 'p8': the text is NoneType, not a string"),
    ):
        with pytest.raises(CorpusError, match=message):
            tokenised.tokenise_in_memory([*DOCUMENTS, wrong], tokenizer, 24)
        with pytest.raises(CorpusError, match=message):
            source = Listed([*DOCUMENTS, wrong])
            tokenised.tokenise_on_disk(tmp_path, source, tokenizer, 24)
    with pytest.raises(ValueError, match="context=0 holds only the tokens before every text"):
        tokenised.tokenise_in_memory(DOCUMENTS, tokenizer, 0)


def test_places_of_ids():
    assert tokenised.place_of("a/b#12-40") == ("a/b", slice(12, 40))
    assert tokenised.place_of("a#b") == ("a#b", None)


def test_long_documents_are_encoded_a_few_at_a_time(tokenizer, tmp_path, monkeypatch):
    """Guards: memory that grows with the documents of a part, however long they are."""
    expected, counts = tokenised.tokenise_in_memory(DOCUMENTS, tokenizer, 24)
    monkeypatch.setattr(pieces, "BATCH", 256)
    monkeypatch.setattr(pieces, "BATCHES_A_PART", 64)
    monkeypatch.setattr(long_texts, "PIECE", 300)
    monkeypatch.setattr(pieces, "PART_CHARACTERS", 600)
    calls, encode_spans = [], tokenizer.encode_spans

    def watched(texts):
        calls.append(texts)
        return encode_spans(texts)

    monkeypatch.setattr(tokenizer, "encode_spans", watched)
    table, same_counts = tokenised.tokenise_on_disk(tmp_path, Listed(), tokenizer, 24)
    same(table, expected)
    files = list((tmp_path / "parts").glob("*.safetensors"))
    assert same_counts == counts and len(files) > 2
    assert all(len(texts) == 1 or sum(map(len, texts)) <= 300 for texts in calls)
    assert max(map(len, calls)) > 1


def test_tokens_take_few_bytes_while_they_are_collected(tokenizer):
    """Guards: Python lists of numbers and pairs, 72 to 660 bytes a token."""
    part = Part(tokenizer, 24)
    documents = [Document(f"d{i}", LONG) for i in range(50)]
    assert not list(part.add(documents[:1]))
    tracemalloc.start()
    for document in documents[1:]:
        assert not list(part.add([document]))
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 12 * len(part.arrays()["tokens"])


def test_rows_of_token_ids_are_taken_as_they_are(tokenizer):
    ids = tokenizer.sequence(LONG)
    rows = list(parse_passages([ids, np.array(ids[:9]), {"input_ids": ids[:5] + [2, 2], "id": "m",
                                "attention_mask": [1] * 5 + [0, 0]}]))  # fmt: skip
    table, counts = tokenised.tokenise_in_memory(rows, tokenizer, 24)
    assert counts == Counts(3, 0, 1)
    place = [i for i, name in enumerate(table.documents) if name == "0"]
    joined = [table.tokens[table.starts[i] : table.starts[i + 1]].tolist() for i in place]
    # Parts overlap by a token, which the first of them predicts.
    assert joined[0] + [t for part in joined[1:] for t in part[1:]] == ids
    assert table.ids[0] == "0#0-25" and list(table.ids)[-2:] == ["1", "m"]
    assert table.tokens[table.starts[-2] :].tolist() == ids[:5]
    assert table.scored.sum() == len(ids) - 1 + 8 + 4
    for row, message in (
        ({"input_ids": [1.5]}, "'input_ids' are not a list of whole numbers"),
        ({"input_ids": [1, 2], "labels": [-100, -100]}, "'labels' leave every token out"),
        ({"input_ids": [1, 2], "labels": [2, -100]}, "'labels' differ from 'input_ids'"),
        ({"input_ids": [1, 2], "labels": [1]}, "'labels' has another length"),
    ):
        with pytest.raises(CorpusError, match=message):
            list(parse_passages([row]))


def test_labels_say_which_token_ids_the_loss_counts(tokenizer):
    """Guards: labels ignored, or shifted by the attention mask."""
    row = {"input_ids": [9, 3, 4, 5, 6], "labels": [9, -100, -100, 5, 6], "id": "a",
           "attention_mask": [0, 1, 1, 1, 1]}  # fmt: skip
    table, _ = tokenised.tokenise_in_memory(parse_passages([row]), tokenizer, 24)
    assert table.tokens.tolist() == [3, 4, 5, 6]
    assert table.scored.tolist() == [False, False, True, True]


@pytest.mark.parametrize("context", [64, 8])
def test_the_loss_of_a_completion_is_on_it_alone(tokenizer, context):
    row = {"prompt": "The capital of Norway is", "completion": "Oslo.", "id": "c"}
    rows = list(parse_passages([row]))
    assert rows == [Document("c", "Oslo.", "The capital of Norway is")]
    table, _ = tokenised.tokenise_in_memory(rows, tokenizer, context)
    assert tokenizer.decode(table.tokens[table.scored]).strip() == "Oslo."
    for i in range(len(table)):
        assert table.scored[table.starts[i] : table.starts[i + 1]].any()
    ids, is_target = tokenizer.encode_query(row["prompt"], row["completion"])
    if context == 64:
        assert table.tokens.tolist() == ids.tolist()
        np.testing.assert_array_equal(table.scored, is_target)


def test_documents_without_a_token_to_predict_become_no_passage():
    """Guards: passages whose gradient is zero, with a score above that of all opponents."""
    bare = PretrainedTokenizer(byte_level())
    rows = list(parse_passages(["a", TEXTS[0], [7], {"input_ids": [5, 6], "labels": [5, -100]}]))
    table, counts = tokenised.tokenise_in_memory(rows, bare, 64)
    assert list(table.ids) == ["1"] and counts == Counts(4, 3, 0)
    # A token that begins every text predicts the only one after it.
    begun = PretrainedTokenizer(byte_level(), begin=[0])
    table, counts = tokenised.tokenise_in_memory(rows, begun, 64)
    assert list(table.ids) == ["0", "1"] and counts.blank == 2
    with pytest.raises(CorpusError, match="has no text: .* or of a single token"):
        tokenised.tokenise_in_memory(rows[:1], bare, 64)
