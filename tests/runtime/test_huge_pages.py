"""A program that restarts itself, once, with its arguments."""

import os
import subprocess
import sys

from tda.runtime import huge_pages

PROGRAM = """
import os, sys
from tda.runtime import huge_pages
huge_pages._on_request = lambda: sys.argv[1] == "asked"
huge_pages.use()
print(os.environ.get("GLIBC_TUNABLES"), sys.argv[1:])
"""


def run(*arguments, **environment):
    kept = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    command = [sys.executable, "-c", PROGRAM, *arguments]
    return subprocess.run(
        command, env=kept | environment, capture_output=True, text=True, check=True
    ).stdout


def test_a_program_restarts_once_with_its_arguments():
    assert run("asked", "a b") == "glibc.malloc.hugetlb=1 ['asked', 'a b']\n"


def test_it_does_not_where_that_changes_nothing():
    assert run("not", "a b") == "None ['not', 'a b']\n"
    assert run("asked", GLIBC_TUNABLES="") == " ['asked']\n"


def test_the_systems_setting_is_read(tmp_path, monkeypatch):
    for text, asked in (("always [madvise] never", True), ("[always] madvise never", False)):
        (tmp_path / "enabled").write_text(text)
        monkeypatch.setattr(huge_pages, "_KERNEL_SETTING", tmp_path / "enabled")
        assert huge_pages._on_request() == asked
    monkeypatch.setattr(huge_pages, "_KERNEL_SETTING", tmp_path / "absent")
    assert not huge_pages._on_request()
