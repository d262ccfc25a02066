"""Stores in object storage: a server that speaks S3, and one that speaks Google's protocol."""

import http.server
import json
import threading
import urllib.parse

import numpy as np
import pytest

from tda import store as stores
from tda.store.location import Location

BLOCKS = {"a": 4, "b": 4}


@pytest.fixture
def s3(monkeypatch):
    moto = pytest.importorskip("moto.server")
    import boto3

    for name, value in {
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(name, value)
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        boto3.client("s3", region_name="us-east-1").create_bucket(Bucket="bucket")
        yield "s3://bucket/some/where"
    finally:
        server.stop()


class _Bucket(http.server.BaseHTTPRequestHandler):
    """Objects in memory behind the few calls of Google's JSON interface that are used here."""

    objects: dict[str, tuple[int, bytes]] = {}
    protocol_version = "HTTP/1.1"
    # Head and body are two writes, of which the second would wait 40 ms for the first's receipt.
    disable_nagle_algorithm = True

    def _answer(self, code, body=b"", **headers):
        self.send_response(code)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def _request(self):
        address = urllib.parse.urlsplit(self.path)
        name = urllib.parse.unquote(address.path.partition("/o/")[2])
        return name, dict(urllib.parse.parse_qsl(address.query))

    def do_GET(self):
        name, query = self._request()
        if not name:
            start, end = query.get("startOffset", ""), query.get("endOffset", "\x7f")
            names = [n for n in sorted(self.objects) if start <= n < end]
            names = [n for n in names if n.startswith(query.get("prefix", ""))]
            items = [{"name": n, "generation": str(self.objects[n][0])} for n in names]
            return self._answer(200, json.dumps({"items": items}).encode())
        if name not in self.objects:
            return self._answer(404)
        generation, body = self.objects[name]
        code, headers = 200, {"x_goog_generation": str(generation)}
        if "Range" in self.headers:
            first, _, last = self.headers["Range"].partition("=")[2].partition("-")
            size = len(body)
            start = int(first) if first else size - int(last)
            stop = int(last) + 1 if first and last else size
            headers["Content_Range"] = f"bytes {start}-{min(stop, size) - 1}/{size}"
            code, body = 206, body[start:stop]
        return self._answer(code, body, **headers)

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        _, query = self._request()
        generation = self.objects.get(query["name"], (0, b""))[0]
        if int(query.get("ifGenerationMatch", generation)) != generation:
            return self._answer(412)
        generation = 1 + max((g for g, _ in self.objects.values()), default=0)
        self.objects[query["name"]] = generation, body
        answer = {"name": query["name"], "generation": str(generation)}
        self._answer(200, json.dumps(answer).encode())

    def do_DELETE(self):
        name, _ = self._request()
        self._answer(204 if self.objects.pop(name, None) else 404)

    def log_message(self, *args):
        pass


@pytest.fixture
def gs(monkeypatch):
    _Bucket.objects = {}
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Bucket)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "token")
    yield "gs://bucket/some/where"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("dtype", ["float32", "2bit"])
@pytest.mark.parametrize("where", ["s3", "gs"])
def test_a_store_in_object_storage_equals_one_on_disk(request, tmp_path, where, dtype):
    address = request.getfixturevalue(where)
    data = np.random.default_rng(0).normal(size=(10, 8)).astype(np.float32)
    data[5, 2] = np.nan
    ids, texts = [f"p{i}" for i in range(10)], [f"Text é {i}" for i in range(10)]
    size = 4 * stores.Form(dtype, tuple(BLOCKS.values())).row_bytes
    finished = []
    for path in (f"{address}/{dtype}", tmp_path / "local"):
        assert not stores.finished(path)
        store = stores.create(path, ids, BLOCKS, {"x": 1}, dtype, size, texts=texts)
        assert store.missing() == [0, 1, 2]
        invalid = [store.write(i, data[store.shards()[i]]) for i in (2, 0)]
        assert invalid == [[], []] and store.missing() == [1] and not stores.finished(path)
        with pytest.raises(stores.StoreError, match=r"unfinished: shards \[1\]"):
            list(store.scan(2))
        assert store.write(1, data[4:8]) == ["p5"] and stores.finished(path)
        store = stores.append(path, ["q0", "q1"], {"x": 1}, size, texts=["a", "b"])
        store.write(3, data[:2])
        assert store.withdraw(ids=["q0"]) == 1
        finished.append(stores.open_store(path, {"x": 1}))
    remote, local = finished
    assert remote.manifest == local.manifest
    rows = range(local.rows)
    assert remote.passages(rows) == local.passages(rows)
    assert remote.withdrawn.tolist() == [10] and remote.row_of("q1") == 11
    assert remote.passages([11, 3]) == local.passages([11, 3])
    for rows, expected in zip(remote.scan(2), local.scan(2), strict=True):
        np.testing.assert_array_equal(rows.decoded(local.form), expected.decoded(local.form))
    np.testing.assert_array_equal(remote.read([7, 0]), local.read([7, 0]))
    names = [n for n in remote.location.names() if "gradients/c." in n]
    assert names == [n for n in local.location.names() if n in names]
    for name in names:  # shards are the same bytes, whoever wrote them
        assert remote.location.read(name) == local.location.read(name)
    assert remote.damage(0) is None and remote.damaged_passages() == {}
    raw = bytearray(remote.location.read("0/gradients/c.0.0"))
    raw[3] ^= 1
    remote.location.write("0/gradients/c.0.0", bytes(raw))
    assert "damaged" in remote.damage(0)
    remote.remove(0)
    assert remote.missing() == [0]


@pytest.mark.parametrize("where", ["s3", "gs"])
def test_only_leftovers_of_a_killed_creation_are_removed_from_a_bucket(request, where):
    """Guards: a folder of a bucket that is named by mistake, and emptied."""
    address = request.getfixturevalue(where)
    foreign = Location(f"{address}/foreign")
    for name in ("thesis.txt", "sub/results.npy", "0/ids/rows/zarr.json"):
        foreign.write(name, b"notes")
    before = foreign.names()
    assert len(before) == 3
    with pytest.raises(stores.StoreError, match="is no store: it has sub/results.npy.*choose anot"):
        stores.create(foreign.name, ["a", "b"], BLOCKS, {})
    assert foreign.names() == before
    left = Location(f"{address}/left")
    # The first two stand for folders, as consoles make them.
    for name in ("", "0/", "0/documents/rows/c/0", "0/passages/000000.array_record"):
        left.write(name, b"")
    store = stores.create(left.name, ["a", "b"], BLOCKS, {})
    store.write(0, np.zeros((2, store.width), np.float32))
    assert [p.id for p in store.passages([0, 1])] == ["a", "b"]
    assert not [n for n in left.names() if "documents" in n]


@pytest.mark.parametrize("where", ["s3", "gs"])
def test_withdrawals_in_a_bucket_are_all_kept(request, where):
    """One store has read the list before another wrote it; then one writes between."""
    address = request.getfixturevalue(where) + "/withdrawn"
    one = stores.create(address, ["a", "b", "c", "d"], BLOCKS, {})
    one.write(0, np.zeros((4, one.width), np.float32))
    two = stores.open_store(address)
    assert len(one.withdrawn) == 0
    assert two.withdraw(ids=["a"]) == 1 and one.withdraw(ids=["a", "b"]) == 1
    assert one.withdrawn.tolist() == [0, 1]
    lists = []

    def joined(stored):
        lists.append(stored["rows"])
        if len(lists) == 1:
            two.withdraw(ids=["d"])
        return {"rows": sorted({*stored["rows"], 2})}

    one.location.update_json("withdrawn.json", joined)
    assert lists == [[0, 1], [0, 1, 3]]
    assert stores.open_store(address).withdrawn.tolist() == [0, 1, 2, 3]
