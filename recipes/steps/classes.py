"""Convert a GLUE-style data set to the format that fairseq's sentence_prediction task reads.

    python recipes/steps/classes.py --data SST-2 --spm text/spm.model --dict text/bin/dict.txt \\
        --out bin

The folder --data has train.tsv and dev.tsv (or valid.tsv), each with a header line. --text names
one or two text columns and --label the label column. In GLUE these are sentence and label (SST-2),
or sentence1 sentence2 and label (RTE). classes.json in --out lists the classes; in a label, spaces
become "_", since fairseq's dictionary has one word per class.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import sentencepiece as spm
import text_files

RESERVED = ("<s>", "<pad>", "</s>", "<unk>")


def table(path: Path, columns: list[str]) -> list[list[str]]:
    """Return the rows of a TSV file, reduced to the columns with the given names in its header.

    Raises:
        SystemExit: the file cannot be read, a column is missing, or a row is short.
    """
    header, *rows = (line.split("\t") for line in text_files.lines(path, "--data"))
    missing = [c for c in columns if c not in header]
    if missing:
        sys.exit(f"{path}: no column {missing[0]}; it has {', '.join(header)}")
    if not rows:
        sys.exit(f"{path} has no row after its header")
    at = [header.index(c) for c in columns]
    for n, row in enumerate(rows, 2):
        if len(row) <= max(at):
            sys.exit(f"{path}, line {n} has only {len(row)} columns")
    return [[row[i] for i in at] for row in rows]


def one_word(label: str, where: str) -> str:
    """Return a label as one word of a dictionary.

    Raises:
        SystemExit: the label is empty, or is a word that fairseq keeps for itself.
    """
    word = "_".join(label.split())
    if not word or word in RESERVED or word.startswith("madeupword"):
        sys.exit(
            f"{where}: {label!r} cannot be a label, since it is empty or has a meaning of its own"
        )
    return word


def classes_of(labels: list[str], words: list[str], path: Path) -> set[str]:
    """Return the different words, and refuse two labels that became the same word."""
    by_word: dict[str, str] = {}
    for label, word in zip(labels, words, strict=True):
        other = by_word.setdefault(word, label)
        if other != label:
            sys.exit(
                f"{path}: the labels {other!r} and {label!r} differ in spaces alone; rename one"
            )
    return set(by_word)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--spm", required=True, help="sentencepiece model of the pretraining")
    parser.add_argument("--dict", required=True, help="dictionary of the pretraining")
    parser.add_argument("--text", nargs="+", default=["sentence"])
    parser.add_argument("--label", default="label")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    processor = spm.SentencePieceProcessor(model_file=args.spm)
    valid = "dev" if Path(text_files.existing(args.data / "dev.tsv")).exists() else "valid"
    raw = args.out / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    parts = [f"input{i}" for i in range(len(args.text))]
    known: dict[str, set[str]] = {}
    for split, name in (("train", "train"), ("valid", valid)):
        path = args.data / f"{name}.tsv"
        rows = table(path, [*args.text, args.label])
        for i, part in enumerate(parts):
            texts = (text_files.normalise(r[i]) for r in rows)
            pieces = (" ".join(processor.encode(t, out_type=str)) + "\n" for t in texts)
            text_files.write(raw / f"{split}.{part}", "".join(pieces))
        labels = [one_word(row[-1], f"{path}, line {n}") for n, row in enumerate(rows, 2)]
        known[split] = classes_of([row[-1] for row in rows], labels, path)
        text_files.write(raw / f"{split}.label", "".join(f"{x}\n" for x in labels))
        print(f"{split}: {len(rows):,} rows, {len(known[split])} classes")
    if new := known["valid"] - known["train"]:
        sys.exit(
            f"{args.data / valid}.tsv has the label {min(new)!r}, which train.tsv does not have"
        )
    for part in (*parts, "label"):
        command = ["fairseq-preprocess", "--only-source", "--workers", "1"]
        command += [] if part == "label" else ["--srcdict", args.dict]
        prefixes = [f"--{s}pref={raw / s}.{part}" for s in ("train", "valid")]
        done = subprocess.run(
            [*command, *prefixes, "--destdir", str(args.out / part)], capture_output=True, text=True
        )
        if done.returncode:
            sys.exit(done.stderr[-2000:])
    text_files.write(args.out / "classes.json", json.dumps(sorted(known["train"])) + "\n")


if __name__ == "__main__":
    main()
