"""Packaging: metadata, and the mapping of the top-level folders into the package.

`kernels/` and `criterions/` stand beside `fairseq_evomoe/` in the source tree and are installed
inside it. No folder here may become a top-level package, since another project is named `kernels`.
"""

from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent
VERSION = next(
    line.split('"')[1]
    for line in (HERE / "fairseq_evomoe/__init__.py").read_text().splitlines()
    if line.startswith("__version__")
)

setup(
    name="fairseq-evomoe",
    version=VERSION,
    description="Mixture-of-experts layers that evolve (EvoMoE), as a plugin for fairseq",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.11",
    package_dir={
        "fairseq_evomoe.kernels": "kernels",
        "fairseq_evomoe.criterions": "criterions",
    },
    packages=[
        "fairseq_evomoe",
        "fairseq_evomoe.compat",
        "fairseq_evomoe.criterions",
        "fairseq_evomoe.hf",
        "fairseq_evomoe.kernels",
        "fairseq_evomoe.kernels.experts",
        "fairseq_evomoe.kernels.gate",
        "fairseq_evomoe.kernels.lookup",
        "fairseq_evomoe.kernels.transformer",
        "fairseq_evomoe.memory",
        "fairseq_evomoe.models",
        "fairseq_evomoe.modules",
        "fairseq_evomoe.modules.gates",
        "fairseq_evomoe.parallel",
        "fairseq_evomoe.tasks",
        "fairseq_evomoe.tools",
        "fairseq_evomoe.tools.to_hf",
    ],
    package_data={
        "fairseq_evomoe": ["py.typed"],
        "fairseq_evomoe.kernels": ["csrc/*"],
        "fairseq_evomoe.kernels.experts": ["csrc/*"],
        "fairseq_evomoe.kernels.lookup": ["csrc/*"],
        "fairseq_evomoe.kernels.transformer": ["csrc/*"],
    },
    install_requires=[
        # fairseq's main branch, which imports on Python 3.11, is published under this name
        "fairseq-fixed==0.12.3.1",
        "numpy>=1.26",
        "sacrebleu>=2.4",
        "scipy>=1.11",
        "sentencepiece>=0.2",
        # fairseq asks for it at every command, used or not
        "tensorboardX>=2.6",
        "torch>=2.6",
        "tqdm>=4.60",
        "triton>=3.2; platform_system == 'Linux'",
    ],
    extras_require={
        "dev": [
            *("accelerate", "build", "hypothesis", "mypy", "peft", "pytest", "pytest-xdist"),
            *("protobuf", "ruff", "safetensors", "tokenizers>=0.22", "transformers>=5.24,<6"),
            "zstandard",
        ],
        "docs": ["furo", "myst-parser", "sphinx"],
        "export": ["safetensors"],
        # the interface of experts and caches is that of 5.24
        "hf": ["protobuf", "safetensors", "tokenizers>=0.22", "transformers>=5.24,<6"],
        "hub": ["datasets"],
        "langid": ["py3langid"],
        "plots": ["matplotlib"],
        "tensorboard": ["tensorboard"],
        "zstd": ["zstandard"],
    },
    entry_points={
        "console_scripts": [
            f"evomoe-{name}=fairseq_evomoe.tools.{name}:main"
            for name in (
                *("average", "doctor", "export", "memorise", "merge", "prune", "report", "upcycle"),
            )
        ]
    },
)
