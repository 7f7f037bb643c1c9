"""Read the perplexity per word from fairseq-eval-lm's output, or bits per piece of a masked LM.

python recipes/steps/perplexity.py --name gpt --log eval.log --counts text/counts.json --json scores
"""

import argparse
import json
import re
import sys
from pathlib import Path

import text_files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--name", required=True)
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--counts", type=Path, required=True)
    parser.add_argument(
        "--json", type=Path, required=True, help="append the result to this file as a line of JSON"
    )
    args = parser.parse_args()
    text = text_files.whole(args.log, "--log")
    counts = json.loads(text_files.whole(args.counts, "--counts"))["test"]
    causal = re.search(r"Evaluated ([\d,]+) tokens.*\n(?:.*\n)*?.*Loss \(base 2\): ([\d.]+)", text)
    masked = re.findall(r"\| test \| (\{.*\})", text)
    result: dict = {"name": args.name}
    if causal:
        tokens, bits = int(causal[1].replace(",", "")), float(causal[2])
        if tokens != counts["pieces"]:
            sys.exit(
                f"{args.log}: {tokens} tokens were scored but the test set has {counts['pieces']}"
            )
        result |= {"bits": bits, "tokens": tokens, "words": counts["words"]}
        result["word_perplexity"] = round(2 ** (bits * tokens / counts["words"]), 2)
        print(
            f"{args.name}: {bits:.3f} bits per piece over {tokens:,} pieces, perplexity "
            f"{result['word_perplexity']:,.2f} per word ({counts['words']:,} words)"
        )
    elif masked:
        result["bits"] = float(json.loads(masked[-1])["test_loss"])
        print(f"{args.name}: {result['bits']:.3f} bits a masked piece")
    else:
        sys.exit(f"{args.log} contains no loss of fairseq-eval-lm or fairseq-validate")
    text_files.append_json(args.json, result)


if __name__ == "__main__":
    main()
