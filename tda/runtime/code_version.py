"""Identifies the code that computes: this package's files and the version of jax."""

import functools
import importlib.metadata
import pathlib

from tda.runtime.fingerprint import fingerprint_parts


@functools.cache
def describe() -> dict[str, str]:
    """Returns a hash of this package's code, and the versions of jax, by name."""
    root = pathlib.Path(__file__).parents[1]
    parts = []
    for file in sorted(root.rglob("*.py")):
        contents = file.read_bytes()
        parts += [f"{file.relative_to(root).as_posix()}\0{len(contents)}\0", contents]
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")}
    return {"tda": fingerprint_parts(parts)} | versions
