"""Step 1: download the files of a corpus, or copy them from a folder that has them.

    python recipes/steps/download.py recipes/wmt14_en_de/corpus.toml --out archives [--mirror DIR]

An interrupted download resumes where it stopped. The size is checked against the server's
Content-Length, and the sha256 against SHA256SUMS in the output folder. A file that is not listed
there is added when it is complete, and checked in every later run. You can also list it beforehand.
"""

import argparse
import hashlib
import shutil
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import corpus
import text_files
from tqdm import tqdm

SUMS = "SHA256SUMS"


def digest(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def read_sums(folder: Path) -> dict[str, str]:
    """Read SHA256SUMS, in the format of sha256sum, as {file: sha256}."""
    path = folder / SUMS
    rows = text_files.read(path) if path.exists() else []
    return {name: sha for sha, name in (row.split(maxsplit=1) for row in rows)}


def fetch(url: str, path: Path, *, tries: int = 5, pause: float = 2.0) -> None:
    """Download `url` to `path`, resuming from what an earlier try has left.

    Raises:
        OSError: no try succeeded.
    """
    partial = path.with_name(path.name + ".partial")
    for attempt in range(tries):
        have = partial.stat().st_size if partial.exists() else 0
        # some servers reject urllib's default User-Agent
        headers = {"User-Agent": "fairseq-evomoe"} | ({"Range": f"bytes={have}-"} if have else {})
        request = urllib.request.Request(url, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                resumed = answer.status == 206
                length = int(answer.headers.get("Content-Length") or 0)
                have = have if resumed else 0
                bar = tqdm(
                    desc=path.name, total=have + length or None, initial=have, unit="B",
                    unit_scale=True, disable=None,
                )  # fmt: skip
                with partial.open("ab" if resumed else "wb") as f, bar:
                    while chunk := answer.read(2**20):
                        f.write(chunk)
                        bar.update(len(chunk))
            size = partial.stat().st_size
            if length and size != have + length:
                raise OSError(f"{size} bytes instead of {have + length}")
            partial.replace(path)
            return
        except urllib.error.HTTPError as error:
            if error.code == 416:
                # The server has nothing after the partial file, which may be complete or belong to
                # another file. Start over.
                partial.unlink()
            elif error.code < 500 or attempt + 1 == tries:
                raise
        except OSError:
            if attempt + 1 == tries:
                raise
        time.sleep(pause * 2**attempt)
    raise OSError(f"{url}: no answer in {tries} tries")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--mirror", type=Path, help="copy the files from this folder instead of downloading them"
    )
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    sums = read_sums(args.out)
    for name, url in corpus.files(args.corpus).items():
        path = args.out / name
        if args.mirror and not (args.mirror / name).exists():
            print(f"{name} is not in {args.mirror}; its text must be there as plain files")
            continue
        if not path.exists() and args.mirror:
            shutil.copyfile(args.mirror / name, path.with_name(name + ".partial"))
            path.with_name(name + ".partial").replace(path)
        elif not path.exists():
            try:
                fetch(url, path)
            except OSError as error:
                sys.exit(
                    f"cannot fetch {url}: {error}\nRun again to resume, or give a folder with the "
                    "files: --data DIR"
                )
        sha = digest(path)
        if sums.setdefault(name, sha) != sha:
            sys.exit(
                f"{path}: sha256 {sha} instead of {sums[name]} ({args.out / SUMS}): damaged or "
                "changed; delete it to download it again"
            )
        rows = "".join(f"{sha}  {name}\n" for name, sha in sorted(sums.items()))
        text_files.write(args.out / SUMS, rows)
        print(f"{path}: {path.stat().st_size:,} bytes, sha256 {sha[:12]}")


if __name__ == "__main__":
    main()
