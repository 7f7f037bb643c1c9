"""Convert a data set of documents, from a hub or a folder, to train.txt, valid.txt and test.txt.

    python recipes/steps/documents.py --dataset Skylion007/openwebtext --out archives --every 2000

The data set is loaded with Hugging Face's `datasets`, which resumes broken downloads and caches
what it has. In the output a line is a paragraph, and an empty line ends a document. Of every N
documents (--every N), the first goes to valid.txt and the second to test.txt, so that every run
makes the same split. The files get their names when all three are complete.
"""

import argparse
import sys
from pathlib import Path

import corpus
import text_files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", required=True, help="name on the hub, or a folder")
    parser.add_argument("--column", default="text")
    parser.add_argument("--every", type=int, default=2000)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if args.every < 3:
        sys.exit(f"--every {args.every}: give at least 3, one document each for train, valid, test")
    splits = ("train", "valid", "test")
    if all((args.out / f"{s}.txt").exists() for s in splits):
        return
    from datasets import load_dataset

    try:
        found = load_dataset(args.dataset, split="train")
    except Exception as error:
        sys.exit(f"cannot load {args.dataset}: {error}\nRun again to resume, or give --data DIR")
    if args.column not in found.column_names:
        sys.exit(f"{args.dataset}: no column {args.column}; it has {', '.join(found.column_names)}")
    args.out.mkdir(parents=True, exist_ok=True)
    counts = dict.fromkeys(splits, 0)
    with text_files.writing(*(args.out / f"{s}.txt" for s in splits)) as files:
        for i, row in enumerate(corpus.progress(found, "documents", len(found))):
            split = {0: "valid", 1: "test"}.get(i % args.every, "train")
            lines = [x for x in map(str.strip, (row[args.column] or "").split("\n")) if x]
            if lines:
                files[splits.index(split)].write("\n".join(lines) + "\n\n")
                counts[split] += 1
        empty = [s for s in splits if not counts[s]]
        if empty:
            sys.exit(
                f"{len(found)} documents leave none for {empty[0]}; lower --every {args.every}"
            )
    print(", ".join(f"{s}: {n:,} documents" for s, n in counts.items()))


if __name__ == "__main__":
    main()
