"""Fetch Multi30k task 1, raw English-German text, and check what arrived.

    python download.py --out data

Every file is checked by its number of lines; a file that is there and whole is not fetched again.
The captions derive from Flickr30k and are meant for research.
"""

import argparse
import gzip
import os
import sys
import urllib.error
import urllib.request
from pathlib import Path

REPOSITORY = "https://raw.githubusercontent.com/multi30k/dataset"
COMMIT = "a3d2e0d26b56f3846f66a952536ffed4e401d05a"
FILES = {
    "train": ("train", 29000),
    "valid": ("val", 1014),
    "test2016": ("test_2016_flickr", 1000),
    "test2017": ("test_2017_flickr", 1000),
}


def lines_of(text: bytes) -> int:
    return len(text.decode("utf-8").splitlines())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--base", default=f"{REPOSITORY}/{COMMIT}/data/task1/raw", help="mirror")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name, (remote, lines) in FILES.items():
        for lang in ("en", "de"):
            path = args.out / f"{name}.{lang}"
            if path.exists() and lines_of(path.read_bytes()) == lines:
                continue
            url = f"{args.base}/{remote}.{lang}.gz"
            try:
                with urllib.request.urlopen(url, timeout=60) as answer:
                    text = gzip.decompress(answer.read())
            except (OSError, urllib.error.URLError) as error:
                sys.exit(f"cannot fetch {url}: {error}\nGive a folder with the files: --data DIR")
            if lines_of(text) != lines:
                sys.exit(f"{url}: {lines_of(text)} lines instead of {lines}: incomplete download")
            partial = path.with_name(path.name + ".partial")
            partial.write_bytes(text)
            os.replace(partial, path)
            print(f"{path}: {lines} lines")


if __name__ == "__main__":
    main()
