"""Fetching results: what comes whole is kept, what is broken off is told and not kept."""

import contextlib
import os
import socket
import threading

import pytest

from tda.viewer import download

RECORD = b'{"inputs_plaintext": "a", "targets_plaintext": "b", "proponents": ["c"]}\n'
WHOLE = RECORD * 100
HALF = RECORD * 50
LENGTH = b"Content-Length: %d\r\n\r\n" % len(WHOLE)
CHUNKED = b"Transfer-Encoding: chunked\r\n\r\n%x\r\n" % len(WHOLE)


@contextlib.contextmanager
def answering(answer: bytes):
    """The address of a server that says just this to whoever asks, and hangs up."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve():
            with contextlib.suppress(OSError):  # the test is over
                while True:
                    connection, _ = server.accept()
                    with connection:
                        connection.recv(1 << 16)
                        connection.sendall(answer)
                        connection.shutdown(socket.SHUT_WR)
                        connection.recv(1 << 16)

        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}/a.jsonl"
        server.shutdown(socket.SHUT_RDWR)


OK = b"HTTP/1.1 200 OK\r\n"


@pytest.mark.parametrize(
    "answer",
    [
        OK + LENGTH + WHOLE,
        OK + CHUNKED + WHOLE + b"\r\n0\r\n\r\n",
        b"HTTP/1.0 200 OK\r\n\r\n" + WHOLE,
    ],
    ids=["length", "chunks", "neither"],
)
def test_a_file_that_comes_whole(tmp_path, answer):
    told = []
    with answering(answer) as url:
        path = download.fetch(url, str(tmp_path), 1 << 20, lambda *x: told.append(x))
    assert open(path, "rb").read() == WHOLE and os.listdir(tmp_path) == ["a.jsonl"]
    assert told[-1] == (len(WHOLE), len(WHOLE) if answer.startswith(OK + LENGTH) else 0)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (OK + LENGTH + HALF, f"after {len(HALF):,} of {len(WHOLE):,} bytes; fetch it again"),
        (OK + LENGTH, f"after 0 of {len(WHOLE):,} bytes"),
        (OK + CHUNKED + HALF, f"after {len(HALF):,} bytes.*fetch it again"),
        (OK + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n", "after 0 bytes"),
        (b"nonsense\r\n\r\n", "cannot fetch"),
        (b"", "cannot fetch"),
        (b"HTTP/1.1 404 Not Found\r\n\r\n", "cannot fetch .*: Not Found"),
    ],
    ids=["half", "no body", "half a chunk", "no chunk", "no HTTP", "no answer", "not found"],
)
def test_a_download_that_breaks_off(tmp_path, answer, message):
    """Guards: half of the records, shown as if they were the file."""
    with answering(answer) as url, pytest.raises(OSError, match=message) as error:
        download.fetch(url, str(tmp_path), 1 << 20)
    assert url in str(error.value) and os.listdir(tmp_path) == []


def test_what_is_not_fetched(tmp_path):
    with answering(OK + LENGTH + WHOLE) as url:
        with pytest.raises(ValueError, match="has more than 1,000 bytes"):
            download.fetch(url, str(tmp_path), 1000)
        with pytest.raises(OSError, match="cannot fetch"):
            download.fetch(url.replace("/a.jsonl", "x/a.jsonl"), str(tmp_path), 1 << 20)
        with pytest.raises(ValueError, match="is not an http or https URL"):
            download.fetch("file:///etc/passwd", str(tmp_path), 1 << 20)
    assert os.listdir(tmp_path) == []
