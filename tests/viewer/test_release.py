"""A release: what is in the folder, what its card says, and what it does not give away."""

import gzip
import json
import re

import pytest

from tda import results
from tda.viewer.collection import Collection
from tda.viewer.export import ExportError
from tda.viewer.release import release
from tests.viewer.big_file import records

CORPUS = "/home/someone/secret é/leads.jsonl.gz"


@pytest.fixture
def workdir(tmp_path):
    path = tmp_path / "run"
    (path / "results").mkdir(parents=True)
    items = list(records(12, 3, 30))
    items[5]["proponent_tail_patch"] = [0.1, 0.2, 0.3]
    for name in ("trackstar", "bm25"):
        results.write(path / "results" / f"{name}.jsonl", items)
    metrics = {"mrr": 0.5, "judge": {"model": "/home/someone/nli"}}
    (path / "metrics.json").write_text(json.dumps({"trackstar": metrics, "bm25": {"mrr": 0.9}}))
    train = dict(epochs=2.0, optimizer="adam", learning_rate=1e-3, tokens_per_batch=2048)
    data = {"corpus": f"{CORPUS},c4/en", "sentences": "", "name": "world_facts"}
    config = {"model": {"pretrained": "", "size": "tiny"}, "train": train, "data": data}
    config["judge"] = {"model": "/home/someone/nli"}
    (path / "config.json").write_text(json.dumps(config))
    (path / "table.md").write_text("| method |\n\nBy /home/someone/nli.\n\n## Details\n\nx\n")
    return path


def test_every_method_and_the_models_outputs_are_there(workdir, tmp_path):
    size = release(str(workdir), str(tmp_path / "out"))
    out = tmp_path / "out"
    assert size == sum(p.stat().st_size for p in out.rglob("*") if p.is_file())
    names = {p.name for p in out.iterdir()}
    assert {"index.html", "data", "static", "README.md", ".nojekyll", "metrics.json"} <= names
    for name in ("trackstar", "bm25"):
        packed = (out / "results" / f"{name}.jsonl.gz").read_bytes()
        assert gzip.decompress(packed) == (workdir / "results" / f"{name}.jsonl").read_bytes()
    queries = [json.loads(line) for line in (out / "queries.jsonl").read_text().splitlines()]
    assert len(queries) == 12 and len(queries[0]["8b_generations"]) == 20
    assert not any(name.startswith(("proponent", "opponent")) for q in queries for name in q)


def test_the_card_names_what_is_there(workdir, tmp_path):
    release(str(workdir), str(tmp_path / "out"))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| `trackstar` | TrackStar | yes | mixed | yes |" in card
    # A field that a sample of the queries has, and none that no query has.
    assert "`proponent_tail_patch`" in card and "`target_prior_nats`" not in card
    assert "index.html#view=query&files=trackstar&filter=confidence%20%3E%3D%200.5" in card
    assert "not%20bm25.rank%20%3D%201" in card and "## Details" not in card


def test_no_folder_of_the_machine_is_published(workdir, tmp_path):
    release(str(workdir), str(tmp_path / "out"))
    texts = [p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()]
    assert not any(b"someone" in text or b"secret" in text for text in texts)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["data"]["corpus"] == "leads.jsonl.gz,c4/en"
    assert config["judge"]["model"] == "nli"


@pytest.mark.parametrize(
    ("key", "value", "published"),
    [
        ("gradients.include", "/mlp/|/attention/", "/mlp/|/attention/"),
        ("data.joiner", "/", "/"),
        ("data.corpus", f"c4/en, {CORPUS}, ../someone/b.csv", "c4/en, leads.jsonl.gz, b.csv"),
        ("data.also_train_on", "~/someone/*.jsonl,wiki", "*.jsonl,wiki"),
        ("data.sentences", "/home/someone, secret/s.jsonl", "s.jsonl"),
        ("data.queries", "someone/q.jsonl", "q.jsonl"),
        ("data.dir", "/", "/"),
        ("model.pretrained", "/home/someone/model/", "model"),
        ("dense.model", "org/encoder", "org/encoder"),
        ("store.root", "gs://bucket/stores", "gs://bucket/stores"),
    ],
)
def test_only_paths_are_shortened(workdir, tmp_path, key, value, published):
    config = json.loads((workdir / "config.json").read_text())
    section, name = key.split(".")
    config.setdefault(section, {})[name] = value
    (workdir / "config.json").write_text(json.dumps(config))
    release(str(workdir), str(tmp_path / "out"))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config[section][name] == published
    card = (tmp_path / "out" / "README.md").read_text()
    assert "[config.json](config.json)" in card and "someone" not in card
    assert "view=query&files=trackstar" in card and "`data/`, `static/`" in card


def test_a_file_that_a_plugins_key_names_is_shortened(workdir, tmp_path):
    config = json.loads((workdir / "config.json").read_text()) | {"plugin": {"x": str(workdir)}}
    (workdir / "config.json").write_text(json.dumps(config))
    release(str(workdir), str(tmp_path / "out"))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["plugin"]["x"] == workdir.name


def test_a_later_release_keeps_the_licence_alone(workdir, tmp_path):
    card = tmp_path / "out" / "README.md"
    release(str(workdir), str(tmp_path / "out"))
    card.write_text(card.read_text().replace("license:", "license: cc-by-4.0") + "old")
    (workdir / "metrics.json").write_text('{"bm25": {"mrr": 0.9}}')
    release(str(workdir), str(tmp_path / "out"))
    assert "\nlicense: cc-by-4.0\n" in card.read_text() and not card.read_text().endswith("old")
    assert [p.name for p in (tmp_path / "out" / "results").iterdir()] == ["bm25.jsonl.gz"]


def test_what_is_no_finished_run_is_refused(workdir, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "README.md").write_text("another project")
    with pytest.raises(ExportError, match="holds other files"):
        release(str(workdir), str(tmp_path / "full"))
    assert (tmp_path / "full" / "README.md").read_text() == "another project"
    (workdir / "config.json").unlink()
    with pytest.raises(ValueError, match="no config.json; a release needs a run that has finished"):
        release(str(workdir), str(tmp_path / "out"))


def test_the_page_leads_to_the_files(workdir, tmp_path, page):
    release(str(workdir), str(tmp_path / "out"))
    page.open((tmp_path / "out" / "index.html").as_uri() + "#view=overview")
    assert page.texts(".overview > p a")[:2] == ["data card", "queries"]
    # The card's links to views show the queries that pass their filter.
    card = (tmp_path / "out" / "README.md").read_text()
    (address,) = re.findall(r"\(index.html(#.*confidence%20.*)\)", card)
    page.open((tmp_path / "out" / "index.html").as_uri() + address)
    confident = sum(item["8b_confidence"] >= 0.5 for item in records(12, 3, 30))
    assert f"{confident} of 12" in page.texts("#side")[0]


def test_a_collection_has_no_links_of_its_own(workdir):
    assert Collection(workdir).index()["links"] == []
