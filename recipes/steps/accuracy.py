"""Print the best validation accuracy that the log of a fine-tuned classifier reports.

python recipes/steps/accuracy.py --name "mlm SST-2" --log train.log --json scores.jsonl
"""

import argparse
import json
import re
from pathlib import Path

import text_files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--name", required=True, help="of the classifier")
    parser.add_argument("--log", type=Path, required=True, help="what fairseq-train printed")
    parser.add_argument("--json", type=Path, help="file to which a line of JSON is appended")
    args = parser.parse_args()
    text = text_files.whole(args.log, "--log")
    rows = [json.loads(r) for r in re.findall(r"\| valid \| (\{.*\})", text)]
    if not rows:
        parser.exit(1, f"{args.log}: no validation in it, was it written with --log-format json?\n")
    best = max(float(r["valid_accuracy"]) for r in rows)
    print(f"{args.name}: best accuracy {best:.2f} of {len(rows)} epochs")
    if args.json:
        row = {"name": args.name, "accuracy": best, "epochs": len(rows)}
        text_files.append_json(args.json, row)


if __name__ == "__main__":
    main()
