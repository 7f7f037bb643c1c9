"""Prints what the project needs besides fairseq, which is built while the rest is installed.

    python recipes/lib/requirements.py plots,langid

The arguments are the extras, separated by commas. fairseq's own requirements are among the lines.
"""

import runpy
import sys
from pathlib import Path
from typing import Any

import setuptools

OF_FAIRSEQ = (
    *("bitarray", "cffi", "hydra-core", "omegaconf", "packaging", "regex", "scikit-learn"),
    "torchaudio",
)
"""What fairseq requires and this project does not ask for by itself."""


def main() -> None:
    extras = [name for name in sys.argv[1].split(",") if name]
    given: dict[str, Any] = {}
    setuptools.setup = given.update
    runpy.run_path(str(Path(__file__).parents[2] / "setup.py"))
    needed = [line for line in given["install_requires"] if not line.startswith("fairseq")]
    for name in extras:
        if name not in given["extras_require"]:
            sys.exit(f"extras={name}: choose from {', '.join(sorted(given['extras_require']))}")
        needed += given["extras_require"][name]
    print(*needed, *OF_FAIRSEQ, sep="\n")


if __name__ == "__main__":
    main()
