"""Step 3: keep the pairs that are worth training on, and count the dropped ones by reason.

    python recipes/steps/clean.py --source-lang en --target-lang de --train text/train \\
        --out text/clean --held-out text/newstest2014 --filter-languages

Text is normalised (see text_files.normalise). A pair is dropped if it is empty, repeated,
untranslated, part of a held-out set, or if it holds U+FFFD, the sign for a character that somebody
could not decode. With --filter-languages, a pair is also dropped if
py3langid finds one side to be in the language of the other. Only hashes of the pairs are kept in
memory.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from hashlib import blake2b
from pathlib import Path

import corpus
import text_files

Pair = tuple[str, str]


def read_pairs(prefix: str, source: str, target: str, flag: str = "") -> Iterator[Pair]:
    """Yield the normalised line pairs of `prefix.source` and `prefix.target`.

    Raises:
        SystemExit: a file cannot be read, or the two files differ in their number of lines; `flag`
            is the option that named them.
    """
    paths = [f"{prefix}.{language}" for language in (source, target)]
    ours, theirs = (sum(1 for _ in text_files.lines(path, flag)) for path in paths)
    if ours != theirs:
        text_files.stop(prefix, flag, f"has {ours} {source} lines but {theirs} {target} lines")
    rows = zip(*(text_files.lines(path, flag) for path in paths), strict=True)
    for pair in corpus.progress(rows, Path(prefix).name, ours):
        yield text_files.normalise(pair[0]), text_files.normalise(pair[1])


def fingerprint(pair: Pair) -> int:
    """Return a 64-bit hash of a pair.

    A collision drops a pair. With 40 million pairs, that happens in one of 20,000 corpora.
    """
    return int.from_bytes(blake2b("\t".join(pair).encode(), digest_size=8).digest())


def languages_of(source: str, target: str) -> Callable[[Pair], bool]:
    """Return a function that tells whether neither side is in the other's language, by py3langid.

    Raises:
        SystemExit: py3langid is not installed.
    """
    try:
        import py3langid
    except ImportError:
        sys.exit("--filter-languages needs py3langid: pip install py3langid")
    py3langid.set_languages([source, target])

    def right(pair: Pair) -> bool:
        # a few words are not enough to tell, since names and numbers look like any language
        return all(
            len(text.split()) < 6 or py3langid.classify(text)[0] == lang
            for text, lang in zip(pair, (source, target), strict=True)
        )

    return right


def clean(
    pairs: Iterable[Pair],
    held_out: Iterable[Pair],
    dropped: Counter,
    right: Callable[[Pair], bool] | None = None,
) -> Iterator[Pair]:
    """Yield the pairs worth keeping, in order, and count the others by reason in `dropped`."""
    tests, seen = {fingerprint(p) for p in held_out}, set()
    for pair in pairs:
        key = fingerprint(pair)
        if not pair[0] or not pair[1]:
            dropped["empty"] += 1
        elif "\ufffd" in pair[0] + pair[1]:
            dropped["damaged characters"] += 1
        elif key in tests:
            dropped["in a test set"] += 1
        elif key in seen:
            dropped["repeated"] += 1
        elif pair[0] == pair[1] and len(pair[0].split()) > 3:
            dropped["source equals target"] += 1
        elif right is not None and not right(pair):
            dropped["wrong language"] += 1
        else:
            seen.add(key)
            yield pair


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source-lang", required=True)
    parser.add_argument("--target-lang", required=True)
    parser.add_argument("--train", required=True, help="path without the language suffix")
    parser.add_argument(
        "--held-out", nargs="*", default=[], help="sets that must not be trained on"
    )
    parser.add_argument("--out", required=True, help="path without the language suffix")
    parser.add_argument("--filter-languages", action="store_true")
    parser.add_argument(
        "--hold-out-every", type=int, default=0, help="write every n-th kept pair to --valid"
    )
    parser.add_argument("--valid", help="path without the language suffix")
    args = parser.parse_args()
    languages = args.source_lang, args.target_lang
    right = languages_of(*languages) if args.filter_languages else None
    held_out = [p for x in args.held_out for p in read_pairs(x, *languages, "--held-out")]

    dropped: Counter = Counter()
    prefixes = [args.out, *([args.valid] if args.hold_out_every else [])]
    paths = [Path(f"{prefix}.{lang}") for prefix in prefixes for lang in languages]
    kept = apart = 0
    with text_files.writing(*paths) as files:
        rows = clean(read_pairs(args.train, *languages, "--train"), held_out, dropped, right)
        for i, pair in enumerate(rows):
            valid = args.hold_out_every and i % args.hold_out_every == 0
            apart += bool(valid)
            kept += not valid
            for f, text in zip(files[2:] if valid else files[:2], pair, strict=True):
                f.write(text + "\n")
    reasons = ", ".join(f"{n:,} {why}" for why, n in dropped.items()) or "nothing"
    total = kept + apart + sum(dropped.values())
    held = f", {apart:,} held out for validation" if apart else ""
    print(f"clean: {total:,} pairs read, {kept:,} kept{held}; dropped: {reasons}")


if __name__ == "__main__":
    main()
