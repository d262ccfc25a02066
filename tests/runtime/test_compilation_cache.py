"""Compiled programs on disk: loaded by the next process, unless the user says otherwise."""

import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax._src import compilation_cache as jax_internals
from jax.experimental.compilation_cache import compilation_cache as jax_cache

from tda.runtime import compilation_cache

_OPTIONS = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
_PROGRAM = """
import jax
from tda.runtime import compilation_cache

hits = []
jax.monitoring.register_event_listener(
    lambda event, **_: hits.append(event) if event.endswith("cache_hits") else None
)
jax.jit(lambda x: x + 1)(1.0)  # before the cache is set, as a model that is loaded first
compilation_cache.use()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
print(jax.jit(lambda x: jax.numpy.linalg.svd(jax.numpy.outer(x, x))[1].sum())(jax.numpy.ones(4)))
print(len(hits), jax.config.jax_compilation_cache_dir)
"""


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """The state of a process that has not decided yet, with a cache folder of its own."""
    before = {name: getattr(jax.config, name) for name in _OPTIONS}
    jax.config.update("jax_compilation_cache_dir", None)
    jax_cache.reset_cache()
    # As jax has it: the cache that all tests share has mended it already.
    as_jax_has_it = jax_internals.get_executable_and_time.__wrapped__
    monkeypatch.setattr(jax_internals, "get_executable_and_time", as_jax_has_it)
    monkeypatch.setattr(compilation_cache, "_is_decided", False)
    monkeypatch.delenv(compilation_cache.VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    yield tmp_path / "tda"
    for name, value in before.items():
        jax.config.update(name, value)
    jax_cache.reset_cache()


def compile_program(size: int) -> jax.Array:
    """Compiles a program anew, whatever this process has compiled."""
    return jax.jit(lambda x: jnp.linalg.qr(jnp.outer(x, x))[0].sum())(jnp.ones(size))


def test_the_next_process_loads_what_this_one_compiled_in_silence(tmp_path):
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    del environment["TDA_COMPILATION_CACHE"]
    runs = [
        subprocess.run(
            [sys.executable, "-c", _PROGRAM], env=environment, capture_output=True, text=True
        )
        for _ in range(2)
    ]
    (first, folder), (second, _) = (r.stdout.split()[-2:] for r in runs)
    assert (first, int(second) > 0) == ("0", True)
    assert runs[0].stdout.split()[0] == runs[1].stdout.split()[0]
    assert pathlib.Path(folder).is_relative_to(tmp_path / "tda")
    assert [r.stderr for r in runs] == ["", ""]


@pytest.mark.parametrize("decide", ["argument", "variable", "jax", "disabled"])
def test_the_users_choice_stands(fresh, monkeypatch, tmp_path, decide):
    expected = None
    if decide == "variable":
        monkeypatch.setenv(compilation_cache.VARIABLE, "off")
    if decide == "jax":
        expected = str(tmp_path / "jax")
        jax.config.update("jax_compilation_cache_dir", expected)
    if decide == "disabled":
        jax.config.update("jax_enable_compilation_cache", False)
    try:
        compilation_cache.use("off" if decide == "argument" else None)
        # A later call, as that of tda.trace in a main, does not turn it on.
        monkeypatch.delenv(compilation_cache.VARIABLE, raising=False)
        compilation_cache.use()
        assert jax.config.jax_compilation_cache_dir == expected and not fresh.exists()
    finally:
        jax.config.update("jax_enable_compilation_cache", True)


def test_a_home_that_cannot_be_written_is_no_error_but_a_named_folder_is(fresh, monkeypatch):
    fresh.write_text("a file where the folder would be")
    compilation_cache.use()
    assert jax.config.jax_compilation_cache_dir is None
    monkeypatch.setattr(compilation_cache, "_is_decided", False)
    with pytest.raises(OSError, match="tda cannot hold compiled programs .* give a folder"):
        compilation_cache.use(str(fresh))


def test_a_folder_that_others_can_write_is_not_trusted(fresh):
    compilation_cache.use()
    programs = pathlib.Path(jax.config.jax_compilation_cache_dir)
    assert programs.stat().st_mode & 0o077 == 0
    programs.chmod(0o777)
    with pytest.raises(PermissionError, match="others can write"):
        compilation_cache._check_owner(programs)


def test_a_program_that_a_kill_cut_short_is_compiled_and_written_again(fresh, monkeypatch):
    monkeypatch.setattr(compilation_cache, "_LEAST_SECONDS", 0.0)
    compilation_cache.use()
    expected = compile_program(5)
    path = max(fresh.glob("*/*-cache"), key=lambda p: p.stat().st_size)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.warns(UserWarning, match="Error reading persistent compilation cache entry"):
        assert compile_program(5) == expected
    assert len(path.read_bytes()) > len(whole) // 2
    assert compile_program(5) == expected


def test_the_oldest_programs_go_when_all_take_too_much(fresh, monkeypatch):
    monkeypatch.setattr(compilation_cache, "_MOST_BYTES", 100)
    for number, version in enumerate(("jaxlib-1-a", "jaxlib-2-a", "jaxlib-2-b")):
        (fresh / version).mkdir(parents=True)
        path = fresh / version / "p-cache"
        path.write_bytes(bytes(40))
        os.utime(path, (number, number))
    compilation_cache._remove_oldest(fresh)
    assert [p.parent.name for p in fresh.glob("*/p-cache")] == ["jaxlib-2-b"]


def test_only_the_false_alarm_is_dropped(capfd):
    with compilation_cache._dropping_false_alarms():
        os.write(2, b"E cpu_aot_loader.cc:195] Target machine feature +prefer-no-gather is not\n")
        os.write(2, b"E cpu_aot_loader.cc:195] Target machine feature +avx512f is not\n")
    os.write(2, b"later\n")
    assert capfd.readouterr().err.splitlines() == [
        "E cpu_aot_loader.cc:195] Target machine feature +avx512f is not",
        "later",
    ]
