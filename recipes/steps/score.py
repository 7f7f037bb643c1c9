"""Score hypotheses by BLEU and chrF (sacreBLEU), next to baselines that need no model.

    python score.py --source test.en --reference test.de --hypothesis test.hyp [--tags test.tags]

The source, reference and hypothesis files must have the same number of lines, because a lost line
would shift all lines after it. With --show N, the script also prints N translations.
"""

import argparse
import json
import sys
from collections import Counter, defaultdict
from pathlib import Path

from sacrebleu.metrics import BLEU, CHRF
from sacrebleu.significance import PairedTest


def read(path: Path) -> list[str]:
    lines = path.read_text(encoding="utf-8").split("\n")
    return lines[:-1] if lines[-1] == "" else lines


def word_by_word(source: list[str], table: dict[str, str]) -> list[str]:
    """Replace each word by its target word in `table`; words without one are copied."""
    return [" ".join(table.get(w, w) for w in line.split()) for line in source]


def frequency_table(source: list[str], target: list[str]) -> dict[str, str]:
    """Map each source word to the target word with the largest Dice coefficient over the pairs."""
    ours, theirs, both = Counter(), Counter(), defaultdict(Counter)
    for s, t in zip(source, target, strict=True):
        s_words, t_words = set(s.split()), set(t.split())
        ours.update(s_words)
        theirs.update(t_words)
        for w in s_words:
            both[w].update(t_words)
    best = lambda w: max(both[w], key=lambda v: (2 * both[w][v] / (ours[w] + theirs[v]), v))
    return {w: best(w) for w in ours}


def against(hypothesis: list[str], baseline: list[str], reference: list[str]) -> dict[str, float]:
    """Test whether the difference from the baseline may be chance.

    The test is a paired bootstrap with 1000 resamples (Koehn 2004).
    """
    if len(baseline) != len(reference):
        sys.exit(f"the baseline has {len(baseline)} lines but the reference {len(reference)}")
    test = PairedTest(
        [("baseline", baseline), ("this", hypothesis)],
        {"BLEU": BLEU(references=[reference]), "chrF": CHRF(references=[reference])},
        references=None,
        test_type="bs",
        n_samples=1000,
    )
    found = {}
    for name, (theirs, ours) in test()[1].items():
        if not hasattr(ours, "p_value"):
            continue
        found[name] = round(ours.score - theirs.score, 2)
        found[f"{name}_p"] = round(float(ours.p_value), 4)
        print(
            f"  against the baseline: {name} {theirs.score:.2f} -> {ours.score:.2f}, "
            f"p = {ours.p_value:.3f}, 95 % interval {ours.mean:.2f} +- {ours.ci:.2f}"
        )
    return found


def comet_score(source: list[str], hypothesis: list[str], reference: list[str]) -> float:
    """Return the system score of wmt22-comet-da, which is downloaded at the first use."""
    try:
        from comet import download_model, load_from_checkpoint
    except ImportError:
        sys.exit("--comet needs unbabel-comet: pip install unbabel-comet")
    model = load_from_checkpoint(download_model("Unbabel/wmt22-comet-da"))
    rows = zip(source, hypothesis, reference, strict=True)
    return model.predict([{"src": s, "mt": h, "ref": r} for s, h, r in rows]).system_score


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--name", default="test")
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--reference", type=Path, required=True)
    parser.add_argument("--hypothesis", type=Path, required=True)
    parser.add_argument(
        "--train-source", type=Path, help="with --train-target, score a frequency baseline too"
    )
    parser.add_argument("--train-target", type=Path)
    parser.add_argument(
        "--tags",
        type=Path,
        help="file with a JSON list of phenomena per line; exact match is printed for each one",
    )
    parser.add_argument(
        "--baseline", type=Path, help="another model's hypotheses, for a paired bootstrap"
    )
    parser.add_argument("--comet", action="store_true", help="also compute COMET")
    parser.add_argument("--show", type=int, default=0, help="print this many translations")
    parser.add_argument(
        "--json", type=Path, help="append the result to this file as a line of JSON"
    )
    args = parser.parse_args()

    source, reference, hypothesis = map(read, (args.source, args.reference, args.hypothesis))
    if not len(source) == len(reference) == len(hypothesis):
        sys.exit(
            f"{args.name}: {len(source)} source, {len(reference)} reference and {len(hypothesis)} "
            "hypothesis lines; sentences were lost, so there is no score"
        )
    bleu, chrf = BLEU(), CHRF()
    score = bleu.corpus_score(hypothesis, [reference])
    exact = [h == r for h, r in zip(hypothesis, reference, strict=True)]
    result = {
        "name": args.name,
        "bleu": round(score.score, 2),
        "chrf": round(chrf.corpus_score(hypothesis, [reference]).score, 2),
        "exact": round(100 * sum(exact) / len(exact), 1),
        "lines": len(source),
        "signature": str(bleu.get_signature()),
    }
    print(
        f"{args.name}: BLEU {result['bleu']:.2f}  chrF {result['chrf']:.2f}  "
        f"exact {result['exact']:.1f} %  ({len(source)} lines)  {result['signature']}"
    )
    result["bleu_copy"] = round(BLEU().corpus_score(source, [reference]).score, 2)
    print(f"  copy of the source: BLEU {result['bleu_copy']:.2f}")
    if args.train_source and args.train_target:
        table = frequency_table(read(args.train_source), read(args.train_target))
        literal = word_by_word(source, table)
        result["bleu_frequency"] = round(BLEU().corpus_score(literal, [reference]).score, 2)
        print(f"  most frequent word for each word: BLEU {result['bleu_frequency']:.2f}")
    if args.baseline:
        result["against_baseline"] = against(hypothesis, read(args.baseline), reference)
    if args.comet:
        result["comet"] = round(comet_score(source, hypothesis, reference), 4)
        print(f"  COMET {result['comet']:.4f}")
    if args.tags:
        by_tag = defaultdict(list)
        for tags, hit in zip(read(args.tags), exact, strict=True):
            for tag in json.loads(tags):
                by_tag[tag].append(hit)
        result["exact_by_tag"] = {
            t: round(100 * sum(v) / len(v), 1) for t, v in sorted(by_tag.items())
        }
        shown = ", ".join(f"{t} {v:.0f} %" for t, v in result["exact_by_tag"].items())
        print(f"  exact match by phenomenon: {shown}")
    for i in range(min(args.show, len(source))):
        print(f"  {source[i]}\n    model     {hypothesis[i]}\n    reference {reference[i]}")
    if args.json:
        with args.json.open("a", encoding="utf-8") as f:
            f.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
