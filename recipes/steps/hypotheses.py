"""Turn the output of fairseq-generate into text, one line per test sentence, in their order.

    python recipes/steps/hypotheses.py --generated test.gen --spm pieces/spm.model \\
        --lines text/test.de --out test.hyp

The pieces are put together by the sentencepiece model itself, because characters that are not in
its vocabulary are spelled as bytes, which fairseq's --remove-bpe leaves in the text.
"""

import argparse
import sys
from pathlib import Path

import sentencepiece as spm
import text_files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--generated", type=Path, required=True, help="without --remove-bpe")
    parser.add_argument("--spm", type=Path, required=True, help="sentencepiece model")
    parser.add_argument("--lines", type=Path, required=True, help="text with as many lines")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    processor = spm.SentencePieceProcessor(model_file=str(args.spm))
    found: dict[int, str] = {}
    for line in text_files.lines(args.generated, "--generated"):
        if line.startswith("H-"):
            number, _, pieces = line.removeprefix("H-").split("\t")
            # with --nbest, the best comes first
            found.setdefault(int(number), processor.decode(pieces.split(" ")))
    wanted = sum(1 for _ in text_files.lines(args.lines, "--lines"))
    lost = [n for n in range(wanted) if n not in found]
    if lost or len(found) != wanted:
        sys.exit(
            f"--generated: {args.generated} has {len(found)} translations for {wanted} lines"
            + (f"; the first one that is missing is that of line {lost[0] + 1}" if lost else "")
        )
    text_files.write(args.out, "".join(f"{found[n]}\n" for n in range(wanted)))


if __name__ == "__main__":
    main()
