"""A directory that cannot be made is named with what is in its way."""

import pathlib

import pytest

from tda.run.engines import EngineFlags
from tda.runtime import ending
from tda.runtime.directories import DirectoryError, make_directory


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("file", "--workdir=D is a file; give a directory"),
        ("file/a/b", "--workdir=D cannot be made: {0}/file is a file; give a directory"),
        ("link", "--workdir=D is a link that leads nowhere; give a directory"),
    ],
)
def test_a_file_in_the_place_of_a_directory_is_named(tmp_path, place, message):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "absent")
    with pytest.raises(DirectoryError) as refused:
        make_directory(tmp_path / place, "--workdir=D")
    assert str(refused.value) == message.format(tmp_path)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("gs://bucket/run", "gs://bucket/run is an address; give a directory that is mounted"),
        ("~/run", "~/run begins with ~, which nothing replaces here; write the whole path"),
    ],
)
def test_no_folder_is_made_for_an_address_or_a_tilde(tmp_path, monkeypatch, path, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DirectoryError, match=message):
        make_directory(path)
    assert not list(tmp_path.iterdir())


def test_a_directory_that_the_system_refuses_is_named(tmp_path, monkeypatch):
    make_directory(tmp_path / "a" / "b")
    make_directory(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(pathlib.Path, "mkdir", refuse)
    with pytest.raises(DirectoryError, match="write to .*c: Permission denied; choose another"):
        make_directory(tmp_path / "c")


@pytest.mark.parametrize("workdir", ["file", "file/w", "absent"])
def test_an_error_beside_a_workdir_that_cannot_be_is_one_line(tmp_path, capsys, workdir):
    """Guards: the traceback of the failed attempt to write the traceback there."""
    (tmp_path / "file").touch()
    try:
        raise DirectoryError("the reason")
    except DirectoryError as error:
        with pytest.raises(SystemExit):
            ending.exit_with(error, str(tmp_path / workdir))
    assert capsys.readouterr().err == "error: the reason\n"


def test_each_task_of_an_array_keeps_a_traceback_of_its_own(tmp_path, capsys):
    for groups in ("3/64", "11/64", "none", None):
        try:
            raise DirectoryError(f"the reason of {groups}")
        except DirectoryError as error:
            with pytest.raises(SystemExit):
                ending.exit_with(error, str(tmp_path), EngineFlags(groups).task)
    said = capsys.readouterr().err
    assert "error in task 3: the reason of 3/64\n" in said and "error: the reason of None\n" in said
    texts = {path.name: path.read_text().splitlines()[-1] for path in tmp_path.iterdir()}
    assert {name: text.rpartition(" ")[2] for name, text in texts.items()} == {
        "error-3.txt": "3/64",
        "error-11.txt": "11/64",
        "error.txt": "None",
    }
    ending.forget_errors(str(tmp_path))
    assert not list(tmp_path.iterdir())
