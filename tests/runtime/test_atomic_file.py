"""Files that appear whole or not at all."""

import pytest

from tda.runtime import atomic_file


def test_the_file_appears_at_the_end(tmp_path):
    path = tmp_path / "a.txt"
    with atomic_file.open_atomic(path) as out:
        out.write("é")
        assert not path.exists()
    assert path.read_bytes() == "é".encode()
    with atomic_file.open_atomic(path, "wb") as out:
        out.write(b"\x00")
        assert path.read_bytes() == "é".encode()
    assert path.read_bytes() == b"\x00"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_an_error_leaves_what_was_there(tmp_path):
    """Guards: half a file in the place of a good one."""
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_file.open_atomic(path) as out:
        out.write("new")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
