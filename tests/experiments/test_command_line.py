"""The command line: packaged configs by name, help, and the command `tda` of an installed copy."""

import os
import pathlib
import shutil
import subprocess
import sys
import zipfile

import pytest

import tda.__main__ as command
from configs import world_facts
from experiments import command_line
from tda.run import defaults

# Modules that mains import.
SHARED = ("launch", "command_line", "engine_flags")
ROOT = pathlib.Path(__file__).parents[2]


def test_a_packaged_config_is_found_by_name_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("configs/world_facts.py", "world_facts.py", "world_facts"):
        assert command_line.find_packaged(name) == str(ROOT / "configs/world_facts.py")
    for name in ("configs/sweeps/lambda.py", "lambda"):
        assert command_line.find_packaged(name, "sweeps") == str(ROOT / "configs/sweeps/lambda.py")
    (tmp_path / "world_facts.py").touch()
    assert command_line.find_packaged("world_facts.py") == "world_facts.py"
    assert command_line.find_packaged("absent.py") == "absent.py"
    # Mistake: a folder that is misspelt, and a packaged config in the place of the caller's.
    for name in ("mine/world_facts.py", str(tmp_path / "no" / "lambda.py")):
        assert command_line.find_packaged(name, "" if "mine" in name else "sweeps") == name
    # Guards: an argument of get_config that was dropped without a word.
    path = command_line.find_packaged("counterfactual_world:small")
    assert path == f"{ROOT}/configs/counterfactual_world.py:small"
    config = command_line._read_config(["main", f"--config={path}"])
    assert config.counterfactual.subsets == 40


def test_the_demo_pools_its_gradients_on_request():
    config = command_line._read_config(["main", "--config=configs/world_facts.py:pooled"])
    assert (config.projection.pooling, config.projection.blocks) == ("blocks", 4)
    assert world_facts.get_config().projection.pooling == "matrix"
    with pytest.raises(ValueError, match="world_facts.py:pool: give pooled"):
        world_facts.get_config("pool")


def test_only_the_config_flag_is_resolved(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = str(ROOT / "configs/world_facts.py")
    argv = ["x", "--config", "world_facts", "-config=world_facts", "--workdir=world_facts"]
    expected = ["x", "--config", path, f"-config={path}", "--workdir=world_facts"]
    assert command_line._with_config_path(argv) == expected


def test_the_command_lists_every_main_in_a_line():
    lines = command.describe().splitlines()
    mains = {p.stem for p in (ROOT / "experiments").glob("[a-z]*.py")} - set(SHARED)
    assert {line.split()[0] for line in lines[5:]} == mains | {"demo"}
    assert max(map(len, lines)) <= 100


def run(*arguments, cwd, python_path=ROOT):
    return subprocess.run(
        [sys.executable, "-m", "tda", *arguments],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(python_path)},
        capture_output=True,
        text=True,
    )


def test_help_shows_flags_and_the_keys_of_the_config(tmp_path):
    shown = run("trace", "--help", cwd=tmp_path).stdout
    for key, (_, meaning, *_) in defaults.KEYS.items():
        assert f"\n  {key}=" in shown and meaning.split()[0] in shown
    assert "--groups=" in shown and "--groups=" in run("table1", "--help", cwd=tmp_path).stdout
    assert "--workdir=" in shown and max(map(len, shown.splitlines())) <= 100


def test_what_the_command_does_not_know_is_refused(tmp_path):
    refused = run("trance", cwd=tmp_path)
    assert refused.returncode == 1
    assert "unknown command 'trance'; use demo, trace, table1" in refused.stderr


@pytest.mark.parametrize(
    ("main", "flags"),
    [
        ("view", ["--results=absent.jsonl"]),
        ("ask", ["--model=absent", "--corpus=absent", "--prompt=a", "--workdir=w"]),
    ],
)
def test_mains_without_a_config_load_plugins(tmp_path, main, flags):
    (tmp_path / "plug.py").write_text("print('the plugin is loaded')")
    done = run(main, "--plugin=plug", *flags, cwd=tmp_path, python_path=f"{ROOT}:{tmp_path}")
    assert done.stdout.startswith("the plugin is loaded") and done.returncode == 1
    assert done.stderr.startswith("error: ") and "absent" in done.stderr


@pytest.mark.slow
def test_the_wheel_puts_tda_alone_into_site_packages(tmp_path):
    source = tmp_path / "source"  # a build leaves files in the folder that it is of
    for folder in ("tda", "experiments", "configs"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, source / folder, ignore=ignored)
    for file in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(source)]
    subprocess.run(build, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    subprocess.run([*pip, "install", "--no-deps", "-t", str(site), str(wheel)], check=True)
    version = wheel.name.split("-")[1]
    assert {p.name for p in site.iterdir()} == {"tda", f"tda_jax-{version}.dist-info", "bin"}
    assert [p.name for p in (site / "bin").iterdir()] == ["tda"]
    names = zipfile.ZipFile(wheel).namelist()
    for file in (
        "py.typed",
        "configs/sweeps/lambda.py",
        "facts/world_facts/cities.csv",
        "facts/world_facts/wording.json",
        "viewer/static/index.html",
    ):
        assert f"tda/{file}" in names
    # The package of the checkout is not on the path here.
    assert "tda COMMAND" in run("--help", cwd=tmp_path, python_path=site).stdout
    shown = run("sweep", "--help", cwd=tmp_path, python_path=site).stdout
    assert "tda sweep --config=configs/world_facts.py" in shown and "hessian.weight=" in shown
    planned = run("plan", "--config=paper_c4", "--hardware=v5p-256", cwd=tmp_path, python_path=site)
    assert planned.returncode == 0 and "87.0 TiB" in planned.stdout, planned.stderr
