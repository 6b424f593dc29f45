from setuptools import find_packages, setup

TEST = ["pytest>=8,<10", "pytest-xdist>=3.6,<4", "hypothesis>=6.100,<7", "PyYAML>=6,<7", "kubernetes-validate>=1.31,<2"]
HF = ["torch>=2.9,<3", "transformers>=5,<6", "tokenizers>=0.22,<1", "safetensors>=0.7,<1"]

setup(
    name="lm-pretraining",
    version="0.1.0",
    description="Language-model pretraining research in JAX: every family in one core",
    long_description=open("README.md", encoding="utf-8").read(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["lm", "lm.*", "experiments", "experiments.*"]),
    entry_points={"console_scripts": ["lm = lm.main.verbs:main"]},
    install_requires=[
        "jax>=0.10.2,<0.13",
        "flax>=0.12.8,<0.14",
        "optax>=0.2.8,<0.3",
        "orbax-checkpoint>=0.12.8,<0.13",
        "tensorflow-datasets>=4.9.9,<5",
        "importlib_resources>=6,<8",  # tensorflow-datasets needs it on Python 3.11 and does not say so.
        "grain>=0.2.18,<0.3",
        "array_record>=0.8.1,<0.9",
        "sentencepiece>=0.2.1,<0.3",
        "absl-py>=2.1,<3",
        "numpy>=2,<3",
        "scipy>=1.13,<2",
        "zstandard>=0.22,<1",
        "etils[epath]>=1.12,<2",
        "protobuf>=5,<8",
        "fsspec>=2024.6",
        "rich>=13,<16",
        "matplotlib>=3.9,<4",
        "tensorboardX>=2.6.2,<3",
    ],
    extras_require={
        "tpu": ["jax[tpu]>=0.10.2,<0.13"],
        "cuda": ["jax[cuda12]>=0.10.2,<0.13"],
        # The compilers of both, in the versions that belong to this jax, and neither CUDA nor a driver.
        "plan": ["jax[tpu,cuda12-local]>=0.10.2,<0.13"],
        "hf": HF,
        "test": TEST,
        "dev": [*TEST, "ruff>=0.14,<1", "mypy>=1.18,<3"],
    },
)
