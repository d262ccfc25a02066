"""The server: what it serves, what it refuses, and what a page of another site cannot do."""

import json
import re
import time

import pytest
from starlette.testclient import TestClient

from tda import results
from tda.viewer import server
from tda.viewer.collection import Collection
from tda.viewer.guard import HEADERS, TOKEN_HEADER
from tda.viewer.notes import Notes
from tests.viewer.big_file import records

HOST = "http://127.0.0.1:8484"


class Answers:
    """A stand-in for a run that is asked."""

    heat_methods = ("grad_cos",)

    def describe(self, progress):
        return {"methods": [], "passages": 1, "parameters": 1}

    def complete(self, progress, prompt, tokens):
        raise ValueError(f"{prompt!r} does not fit")

    def trace(self, progress, query, methods, k):
        if query.prompt == "slow":
            for i in range(1000):
                progress("searching", i, 1000)
                time.sleep(0.01)
        return {"asked": [query.prompt, query.target, query.tokens, methods, k]}

    def heat(self, progress, query, method, passage):
        raise RuntimeError("a bug")


@pytest.fixture
def folder(tmp_path):
    """A workdir with two results files, a table, plots and a file that is nobody's business."""
    (tmp_path / "w" / "results").mkdir(parents=True)
    for name, seed in (("trackstar", 0), ("bm25", 1)):
        results.write(tmp_path / "w" / "results" / f"{name}.jsonl", records(23, 3, 50, seed))
    (tmp_path / "w" / "table.md").write_text("| a |\n|---|\n| 1 |\n")
    (tmp_path / "w" / "plots").mkdir()
    (tmp_path / "w" / "plots" / "a.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    (tmp_path / "secret.svg").write_text("secret")
    (tmp_path / "w" / "plots" / "b.svg").symlink_to(tmp_path / "secret.svg")
    return tmp_path


@pytest.fixture
def collection(folder):
    found = Collection(folder / "w", Notes(folder / "w" / "notes.jsonl"))
    for name in ("trackstar", "bm25"):
        found.add(folder / "w" / "results" / f"{name}.jsonl")
    return found


@pytest.fixture
def client(collection, monkeypatch):
    monkeypatch.setattr(server, "UPLOAD_LIMIT", 100_000)
    app = server.create_app(collection, Answers())
    return TestClient(app, base_url=HOST)


def token(client):
    return re.search(r'data-token="([^"]+)"', client.get("/").text)[1]


def post(client, path, body, **headers):
    return client.post(path, json=body, headers={TOKEN_HEADER: token(client)} | headers)


def test_the_page_and_its_own_files(client):
    page = client.get("/")
    assert page.status_code == 200 and '<script type="module" src="static/main.js">' in page.text
    assert not re.search(r"<script(?! type=\"module\" src)|<style|\son\w+=|style=", page.text)
    for name, kind in (("main.js", "text/javascript"), ("base.css", "text/css")):
        found = client.get(f"/static/{name}")
        assert found.status_code == 200 and found.headers["content-type"].startswith(kind)
    for name, value in HEADERS.items():
        assert page.headers[name] == value
    assert "'unsafe" not in HEADERS["content-security-policy"]
    assert token(client) == token(client) and len(token(client)) >= 32


def test_data_come_in_pieces(client, collection):
    index = client.get("/data/index.json").json()
    assert [f["label"] for f in index["files"]] == ["trackstar", "bm25"]
    assert [f["title"] for f in index["files"]] == ["TrackStar", "BM25"]
    assert index["live"] and index["heat_methods"] == ["grad_cos"] and not index["urls"]
    assert index["tables"] == [{"name": "table.md", "text": "| a |\n|---|\n| 1 |\n"}]
    expected = list(records(23, 3, 50, 1))
    assert client.get("/data/1/records-2.json").json() == expected[20:]
    rows = client.get("/data/1/summaries-0.json").json()
    assert rows["prompt"] == [r["inputs_plaintext"] for r in expected]
    # Under most ids the other file has another question.
    shared = client.get("/data/overlap-0-1.json").json()
    assert len(shared) == 23 and set(shared) == {0, None}
    for name in collection.pieces():
        assert client.get(f"/data/{name}.json").status_code == 200, name
    for wrong in ("1/records-3", "2/records-0", "1/summaries-1", "overlap-0-2", "x", "0/record-1"):
        found = client.get(f"/data/{wrong}.json")
        assert found.status_code == 404 and "there are no data" in found.json()["error"]


def test_a_file_written_anew_is_shown_at_the_next_look(client, folder):
    results.write(folder / "w" / "results" / "bm25.jsonl", records(5, 3, 50))
    assert client.get("/data/index.json").json()["files"][1]["rows"] == 5
    assert len(client.get("/data/1/records-0.json").json()) == 5


def test_a_page_gets_no_records_of_a_file_that_has_changed_since(client, folder):
    """Guards: another page's reload, after which one page showed rows of two versions of a file."""
    before = [f["digest"] for f in client.get("/data/index.json").json()["files"]]
    results.write(folder / "w" / "results" / "bm25.jsonl", records(23, 3, 50, 2))
    address = f"/data/1/records-0.json?digest={before[1]}"
    assert client.get(address).status_code == 200  # still those of the index
    client.get("/data/index.json")
    answer = client.get(address)
    assert answer.status_code == 409 and "reload the page" in answer.json()["error"]
    shared = f"/data/overlap-0-1.json?digest={before[0]}&digest="
    assert client.get(shared + before[1]).status_code == 409
    after = client.get("/data/index.json").json()["files"][1]["digest"]
    assert client.get(shared + after).status_code == 200


@pytest.mark.parametrize(
    "path",
    ["/static/../server.py", "/static/%2e%2e/server.py", "/static/..%2fserver.py", "/data/../x",
     "/plots/../table.md", "/plots/plot-0.svg/../../notes.jsonl", "/plots/%2e%2e%2fsecret.svg",
     "/static/%00", "/data/0%2frecords-0/..%2f.json", "//etc/passwd", "/plots/plot-1.svg"],
)  # fmt: skip
def test_no_path_outside_is_read(client, path):
    found = client.get(path)
    assert found.status_code == 404 and "secret" not in found.text and "def " not in found.text


def test_plots_of_the_workdir_alone(client):
    (plot,) = client.get("/data/index.json").json()["plots"]
    assert plot == {"name": "plots/a.svg", "file": "plot-0.svg"}
    found = client.get("/plots/plot-0.svg")
    assert found.status_code == 200 and found.headers["x-content-type-options"] == "nosniff"
    # An SVG that is opened by itself runs nothing.
    assert found.headers["content-security-policy"].startswith("default-src 'none'; style-src")


def test_notes_are_kept_and_counted(client, folder):
    asked = NOTE | {"passage_id": "c4-0-1", "comment": "é"}
    found = post(client, "/api/notes", asked)
    assert found.status_code == 200 and found.json()["notes"][0]["comment"] == "é"
    assert client.get("/data/notes.json").json() == found.json()
    assert len((folder / "w" / "notes.jsonl").read_text().splitlines()) == 1
    odd = json.dumps(asked | {"comment": "\ud800"}).encode()
    headers = {TOKEN_HEADER: token(client), "content-type": "application/json"}
    kept = client.post("/api/notes", content=odd, headers=headers)
    assert kept.status_code == 200 and kept.json()["notes"][0]["comment"] == "\ud800"
    wrong = post(client, "/api/notes", asked | {"type": "x"})
    assert wrong.status_code == 400 and "unknown type" in wrong.json()["error"]
    assert post(client, "/api/notes", {"example_id": 3}).status_code == 400


NOTE = {"example_id": "a", "prompt": "p", "target": "t", "passage_id": "b"} | {
    "type": "states",
    "comment": "",
    "method": "c",
}


@pytest.mark.parametrize(
    "headers",
    [
        {TOKEN_HEADER: ""},
        {TOKEN_HEADER: "guessed"},
        {"origin": "http://evil.example"},
        {"origin": "http://127.0.0.1:9999"},
        {"origin": "null"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
        {"host": "evil.example"},
        {"host": "127.0.0.1.evil.example:8484"},
    ],
)
@pytest.mark.parametrize("path", ["/api/notes", "/api/upload?name=a", "/api/live/trace"])
def test_writes_from_elsewhere_are_refused(client, folder, headers, path):
    found = post(client, path, NOTE, **headers)
    assert found.status_code == 403, found.text
    assert not (folder / "w" / "notes.jsonl").exists()


def test_reads_from_elsewhere_are_refused(client):
    for headers in ({"sec-fetch-site": "cross-site"}, {"host": "evil.example"}):
        for path in ("/data/index.json", "/static/main.js", "/api/jobs/1"):
            assert client.get(path, headers=headers).status_code == 403
    link = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
    assert client.get("/", headers=link).status_code == 200
    assert client.get("/data/index.json", headers=link).status_code == 403
    assert "access-control-allow-origin" not in client.get("/data/index.json").headers


def test_only_json_is_taken(client):
    headers = {TOKEN_HEADER: token(client)}
    for kind, body, status in (
        ("text/plain", json.dumps(NOTE), 415),
        ("application/x-www-form-urlencoded", "a=b", 415),
        ("application/json", "{", 400),
        ("application/json", "[]", 400),
        ("application/json", "[" * 100_000, 400),
        ("application/json", json.dumps(NOTE | {"comment": "x" * 2_000_000}), 413),
    ):
        found = client.post("/api/notes", content=body, headers=headers | {"content-type": kind})
        assert found.status_code == status, (kind, body[:20])


def test_an_upload_is_shown(client):
    body = "".join(json.dumps(r) + "\n" for r in records(12, 2, 30)).encode()
    headers = {TOKEN_HEADER: token(client)}
    found = client.post("/api/upload?name=../../my file.jsonl", content=body, headers=headers)
    assert found.status_code == 200 and found.json() == {"label": "my_file"}
    again = client.post("/api/upload?name=trackstar.jsonl", content=body, headers=headers)
    assert again.json() == {"label": "trackstar_2"}
    files = client.get("/data/index.json").json()["files"]
    assert [f["label"] for f in files] == ["trackstar", "bm25", "my_file", "trackstar_2"]
    assert len(client.get("/data/2/records-1.json").json()) == 2
    large = client.post("/api/upload?name=a", content=b"x" * 200_000, headers=headers)
    assert large.status_code == 413 and "larger than 100,000" in large.json()["error"]
    wrong = client.post("/api/upload?name=a", content=b"PNG\n", headers=headers)
    assert wrong.status_code == 400 and "is a record" in wrong.json()["error"]


def test_addresses_are_opened_only_where_allowed(client, collection):
    found = post(client, "/api/open", {"url": "http://127.0.0.1:1/a.jsonl"})
    assert found.status_code == 403 and "--allow_urls" in found.json()["error"]
    free = TestClient(server.create_app(collection, allow_urls=True), base_url=HOST)
    for url, why in (
        ("file:///etc/passwd", "not an http or https URL"),
        ("http://127.0.0.1:1/a.jsonl", "cannot fetch"),
    ):
        found = post(free, "/api/open", {"url": url})
        assert found.status_code == 400 and why in found.json()["error"]


def ended(client, number):
    for _ in range(500):
        job = client.get(f"/api/jobs/{number}").json()
        if job["state"] not in ("waiting", "running"):
            return job
        time.sleep(0.01)
    raise AssertionError("it does not end")


def test_live_questions_run_as_jobs(client):
    query = {"prompt": "a", "target": "b"}
    question = {"query": query, "methods": ["grad_cos"], "k": 3}
    started = post(client, "/api/live/trace", question).json()
    job = ended(client, started["number"])
    assert job["state"] == "done" and job["result"] == {"asked": ["a", "b", None, ["grad_cos"], 3]}
    said = question | {"query": query | {"tokens": [[1, 2], [3]]}}
    job = ended(client, post(client, "/api/live/trace", said).json()["number"])
    assert job["result"]["asked"][2] == [[1, 2], [3]]
    wrong = post(client, "/api/live/complete", {"prompt": "x", "tokens": 3}).json()
    assert ended(client, wrong["number"])["error"] == "'x' does not fit"
    heat = {"query": query, "method": "c", "passage": "d"}
    bug = ended(client, post(client, "/api/live/heat", heat).json()["number"])
    assert bug["state"] == "failed" and bug["error"] == "RuntimeError: a bug"
    malformed = [
        {"query": query | wrong}
        for wrong in (
            {"prompt": None},
            {"tokens": [[1]]},
            {"tokens": [[1], ["2"]]},
            {"tokens": "1"},
            {"contrast": None},
        )
    ]
    for body in ({"k": 0}, {"k": True}, {"methods": "bm25"}, {"query": None}, *malformed):
        assert post(client, "/api/live/trace", question | body).status_code == 400
    assert post(client, "/api/live/guess", {}).status_code == 404
    assert client.get("/api/jobs/999").status_code == 404


def test_a_job_tells_how_far_it_is_and_can_be_stopped(client):
    question = {"query": {"prompt": "slow", "target": "b"}, "methods": [], "k": 3}
    number = post(client, "/api/live/trace", question).json()["number"]
    waiting = post(client, "/api/live/trace", question).json()["number"]
    for _ in range(500):
        job = client.get(f"/api/jobs/{number}").json()
        if job["done"] > 1:
            break
        time.sleep(0.01)
    assert job["state"] == "running" and job["what"] == "searching" and job["total"] == 1000
    headers = {TOKEN_HEADER: token(client)}
    assert client.delete(f"/api/jobs/{number}").status_code == 403
    for n in (waiting, number):
        assert client.delete(f"/api/jobs/{n}", headers=headers).status_code == 200
    assert ended(client, number)["state"] == ended(client, waiting)["state"] == "cancelled"


def test_without_workdir_there_is_no_live_and_no_note(folder):
    collection = Collection()
    collection.add(folder / "w" / "results" / "bm25.jsonl")
    client = TestClient(server.create_app(collection), base_url=HOST)
    index = client.get("/data/index.json").json()
    assert not index["live"] and not index["notes"] and index["plots"] == []
    assert post(client, "/api/live/describe", {}).status_code == 409
    assert "--workdir" in post(client, "/api/notes", NOTE).json()["error"]


def test_another_address_is_served_only_by_name(collection):
    app = server.create_app(collection, hosts=("gpu-box",))
    assert TestClient(app, base_url="http://gpu-box:80").get("/").status_code == 200
    assert TestClient(app, base_url="http://other:80").get("/").status_code == 403
