"""Convert a GLUE-style data set to the format that fairseq's sentence_prediction task reads.

    python recipes/steps/classes.py --data SST-2 --spm text/spm.model --dict text/bin/dict.txt \\
        --out bin

The folder --data has train.tsv and dev.tsv (or valid.tsv), each with a header line. --text names
one or two text columns and --label the label column. In GLUE these are sentence and label (SST-2),
or sentence1 sentence2 and label (RTE).
"""

import argparse
import csv
import subprocess
import sys
from pathlib import Path

import sentencepiece as spm
from clean import normalise


def table(path: Path, columns: list[str]) -> list[list[str]]:
    """Return the rows of a TSV file, reduced to the columns with the given names in its header.

    Raises:
        SystemExit: the file or a column is missing, or a row is short.
    """
    if not path.is_file():
        sys.exit(f"no such file: {path}")
    with path.open(encoding="utf-8", newline="") as f:
        rows = list(csv.reader(f, delimiter="\t", quoting=csv.QUOTE_NONE))
    missing = [c for c in columns if c not in rows[0]]
    if missing:
        sys.exit(f"{path}: no column {missing[0]}; it has {', '.join(rows[0])}")
    at = [rows[0].index(c) for c in columns]
    for n, row in enumerate(rows[1:], 2):
        if len(row) <= max(at):
            sys.exit(f"{path}, line {n} has only {len(row)} columns")
    return [[row[i] for i in at] for row in rows[1:]]


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
    valid = "dev" if (args.data / "dev.tsv").exists() else "valid"
    raw = args.out / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    parts = [f"input{i}" for i in range(len(args.text))]
    for split, name in (("train", "train"), ("valid", valid)):
        rows = table(args.data / f"{name}.tsv", [*args.text, args.label])
        for i, part in enumerate(parts):
            pieces = (" ".join(processor.encode(normalise(r[i]), out_type=str)) for r in rows)
            (raw / f"{split}.{part}").write_text("\n".join(pieces) + "\n", encoding="utf-8")
        labels = "\n".join(r[-1] for r in rows) + "\n"
        (raw / f"{split}.label").write_text(labels, encoding="utf-8")
        print(f"{split}: {len(rows):,} rows, {len({r[-1] for r in rows})} classes")
    for part in (*parts, "label"):
        command = ["fairseq-preprocess", "--only-source", "--workers", "1"]
        command += [] if part == "label" else ["--srcdict", args.dict]
        prefixes = [f"--{s}pref={raw / s}.{part}" for s in ("train", "valid")]
        done = subprocess.run(
            [*command, *prefixes, "--destdir", str(args.out / part)], capture_output=True, text=True
        )
        if done.returncode:
            sys.exit(done.stderr[-2000:])


if __name__ == "__main__":
    main()
