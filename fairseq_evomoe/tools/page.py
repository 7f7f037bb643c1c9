"""`evomoe-report page`: show runs, experts and scores on one self-contained HTML page."""

import argparse
import html
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fairseq_evomoe.tools import checkpoint, markup
from fairseq_evomoe.tools.cost import BYTES, per_token
from fairseq_evomoe.tools.health import health
from fairseq_evomoe.tools.health import summary as in_a_sentence
from fairseq_evomoe.tools.markup import table
from fairseq_evomoe.tools.run_log import RunLog, is_done, read_log
from fairseq_evomoe.tools.text import read_lines


def summary(logs: Sequence[RunLog]) -> str:
    """Format a table with one row per run: its latest metrics and its best validation loss."""
    rows = []
    for log in logs:
        last = log.train[-1]
        best = min((r["loss"] for r in log.valid), default=None)
        experts = last.get("moe_active_experts", 1.0)
        rows.append(
            [
                *(log.name, int(last["num_updates"]), int(last["tokens"]), last.get("wall", 0.0)),
                *(last["loss"], "" if best is None else best, experts),
                last.get("moe_load_max_mean", ""),
                last.get("moe_dead_experts", ""),
            ]
        )
    head = ["run", "updates", "target tokens", "seconds", "last training loss"]
    head += ["best valid loss", "active experts", "busiest / mean load", "dead experts"]
    return table(head, rows, name="Runs side by side")


SIGNS = {"good": "✓ good", "look": "? look", "bad": "✗ bad"}
"""Verdict -> how it is shown, readable without colour."""


def health_table(log: RunLog) -> str:
    """Format what the log says about the health of a run: a sentence and a table."""
    found = health(log)
    rows = [[f.question, SIGNS[f.verdict], f.answer, f.threshold] for f in found]
    head = ["question", "verdict", "what was seen", "what would be good"]
    shown = table(head, rows, name=f"Health of {log.name}")
    return f"<p>{html.escape(in_a_sentence(found))}</p>{shown}"


def bleu_rows(reference: Path, hypotheses: Sequence[tuple[str, Path]]) -> str:
    """Format a table of BLEU and chrF with 95 % intervals from 1000 bootstrap resamples.

    Raises:
        ValueError: the files have different numbers of lines.
    """
    from sacrebleu.metrics import BLEU, CHRF

    truth, rows = read_lines(reference), []
    signature = ""
    for name, path in hypotheses:
        found = read_lines(path)
        if len(found) != len(truth):
            raise ValueError(f"{path} has {len(found)} lines, but {reference} has {len(truth)}")
        row = [name]
        for metric in (BLEU(), CHRF()):
            score = metric.corpus_score(found, [truth], n_bootstrap=1000)
            row += [f"{score.score:.2f}", f"{score._mean:.2f} ± {score._ci:.2f}"]
            signature = signature or str(metric.get_signature())
        rows.append(row)
    head = ["hypotheses", "BLEU", "95 % interval", "chrF", "95 % interval"]
    note = f'<p class="note">{html.escape(signature)}; 1000 resamples</p>'
    return table(head, rows, name="Scores") + note


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        heading: of the section.
        content: its HTML.
        run: number of the run that it is about; None if it is about all, or about none.
        rules: style rules that it needs.
    """

    heading: str
    content: str
    run: int | None = None
    rules: str = ""

    def __str__(self) -> str:
        about = "" if self.run is None else f' class="of-run-{self.run}"'
        return f"<section{about}><h2>{html.escape(self.heading)}</h2>{self.content}</section>"


def model_sections(args: argparse.Namespace, picture: Any) -> Iterator[Section]:
    """Yield the sections about a checkpoint.

    They show what a token costs, how similar the experts are, sentences with the experts of their
    pieces, which words each expert gets, and how many experts a token uses.
    """
    from fairseq_evomoe.modules.moe_layer import moe_layers
    from fairseq_evomoe.tools import pictures
    from fairseq_evomoe.tools.samples import samples
    from fairseq_evomoe.tools.specialists import activity, similarity, specialists, watch

    model, cfg, task = checkpoint.build(args.checkpoint, args.data)
    costs = per_token(model, cfg.model, context=args.context, dtype=args.dtype)
    names = ["macs", "dense_macs", "bytes", "dense_bytes", "parameters", "dense_parameters"]
    rows = [[kind, *(row[n] / 1e6 for n in names)] for kind, row in costs.items()]
    rows.sort(key=lambda row: row[0] == "total")
    head = ["per token, millions", "MACs", "dense", "bytes read", "dense", "weights", "dense"]
    yield Section("What a token costs", table(head, rows, name="What a token costs"))

    layers = [layer for _, layer in moe_layers(model)]
    if not layers:
        return
    note = "Cosine of each pair of experts' weights. Equal experts have 1."
    drawn = picture("likeness", pictures.likeness(similarity(model)), note)
    yield Section("How alike the experts are", drawn)
    task.load_dataset(args.subset)
    shown = list(samples(model, task, subset=args.subset, count=args.samples))
    if shown:
        note = (
            '<p class="note">The small number behind a piece is the expert that it went to, the '
            "first one if there are several; experts differ in colour and in the line below too. "
            "Weights appear under the pointer.</p>"
        )
        yield Section(
            "Sentences with the experts of their pieces",
            note + "".join(markup.sample(s, i) for i, s in enumerate(shown, 1)),
            rules=markup.expert_rules(max(layer.cfg.moe_expert_count for layer in layers)),
        )
    seen = watch(model, task, subset=args.subset, max_tokens=args.max_tokens)
    found = specialists(seen)
    languages = {
        "encoder": getattr(cfg.task, "source_lang", None),
        "decoder": getattr(cfg.task, "target_lang", None),
    }
    rows = []
    for layer, experts in found.items():
        language = languages.get(layer.split(".")[0]) or ""
        for e, expert in enumerate(experts):
            words = ", ".join(
                f"{w} ({share:.0%} of {round(n / share)})" for w, n, share in expert.words
            )
            where = f"{layer} {language}".strip()
            rows.append([where, e, f"{expert.share:.1%}", words or "no over-represented word"])
    head = [
        "layer, language",
        "expert",
        "share of load",
        "over-represented words (share of the word's pieces that came here, of how many)",
    ]
    yield Section("Which words go where", table(head, rows, name="Words of the experts"))
    used = {layer: activity(s) for layer, s in seen.items()}
    if all(a.mean == round(a.mean) for a in used.values()):
        return
    rows = []
    for layer, a in used.items():
        rows += [
            [layer, f"words of frequency class {i} ({n} words)", tokens, mean]
            for i, (n, tokens, mean) in enumerate(a.by_frequency, 1)
        ]
        rows += [
            [layer, f"positions {first} to {last} of the sentence", tokens, mean]
            for first, last, tokens, mean in a.by_place
        ]
    head = ["layer", "which tokens", "tokens", "active experts"]
    name = "How many experts a token uses"
    yield Section(name, table(head, rows, name=name))


def sections(args: argparse.Namespace, logs: Sequence[RunLog]) -> Iterator[Section]:
    """Yield each section that the given files have data for."""
    from fairseq_evomoe.tools import pictures

    def picture(name: str, drawing: pictures.Drawing, caption: str) -> str:
        if args.png:
            args.png.mkdir(parents=True, exist_ok=True)
        png = args.png / f"{name}.png" if args.png else None
        return markup.figure(pictures.svg(drawing, name, png=png), caption)

    for i, log in enumerate(logs):
        yield Section(f"Is the training healthy? {log.name}", health_table(log), i)
    if logs:
        yield Section("Runs", summary(logs))
        caption = "Task loss over updates, target tokens and seconds"
        yield Section("Loss", picture("losses", pictures.losses(logs), caption))
    # all runs are drawn, so that a run has one look on the whole page
    if any(log.layers for log in logs):
        caption = "Temperature, active experts, entropy and load over updates"
        yield Section("Evolution", picture("evolution", pictures.evolution(logs), caption))
    for i, log in enumerate(logs):
        if log.layers:
            caption = f"Share of the load of each expert of {log.name}; darker means more"
            drawn = picture(f"load-{log.name}", pictures.load(log), caption)
            yield Section(f"Load of the experts: {log.name}", drawn, i)
    if args.checkpoint:
        yield from model_sections(args, picture)
    if args.hypothesis:
        yield Section("Translation", bleu_rows(args.reference, args.hypothesis))


def named(text: str) -> tuple[str, Path]:
    """Parse NAME=PATH, or PATH alone, for which the name of its folder is used."""
    name, _, path = text.rpartition("=")
    return name or Path(path).absolute().parent.name, Path(path)


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--log", type=named, action="append", default=[], metavar="[NAME=]FILE",
        help="output of fairseq-train with --log-format json; may be given several times",
    )  # fmt: skip
    parser.add_argument("--checkpoint", type=Path, help="model whose experts and costs are shown")
    parser.add_argument("--data", help="folder with the checkpoint's dictionaries and data")
    parser.add_argument("--subset", default="valid", help="data set on which words are counted")
    parser.add_argument("--max-tokens", type=int, default=4000)
    parser.add_argument(
        "--samples", type=int, default=3, help="number of sentences shown with their experts"
    )
    parser.add_argument(
        "--context", type=int, default=512, help="number of positions that a token attends to"
    )
    parser.add_argument("--dtype", choices=BYTES, default="fp32")
    parser.add_argument("--reference", type=Path, help="detokenised text; needs --hypothesis")
    parser.add_argument(
        "--hypothesis", type=named, action="append", default=[], metavar="[NAME=]FILE",
        help="detokenised output, scored against --reference; may be given several times",
    )  # fmt: skip
    parser.add_argument(
        "--watch", type=int, metavar="SECONDS",
        help="write the page again every SECONDS until all trainings of --log are done; a browser "
        "that shows it follows",
    )  # fmt: skip
    parser.add_argument("--title", default="Training report")
    parser.add_argument("--output", type=Path, required=True, help="HTML file to write")
    parser.add_argument("--png", type=Path, help="folder for the figures as PNG files")


def write(args: argparse.Namespace, *, refresh: int | None = None) -> int:
    """Write the page and return its size in bytes.

    Args:
        args: of the command.
        refresh: seconds after which a browser loads the page again; None means never.
    """
    logs = [read_log(path, name) for name, path in args.log]
    found = list(sections(args, logs))
    body, rules = "".join(map(str, found)), "".join(section.rules for section in found)
    if len(logs) > 1:
        boxes, more = markup.switches([log.name for log in logs])
        body, rules = boxes + body, rules + more
    page = markup.document(args.title, body, rules=rules, refresh=refresh)
    partial = args.output.with_name(args.output.name + ".partial")
    partial.write_text(page, encoding="utf-8")
    partial.replace(args.output)
    return len(page.encode())


def watch_logs(args: argparse.Namespace) -> None:
    """Write the page again and again until every training is done, or until Ctrl-C.

    A log that does not exist yet, or has no training lines yet, is waited for. What takes a pass
    over a data set is left for the end.
    """
    paths = [path for _, path in args.log]
    quick = argparse.Namespace(**{**vars(args), "checkpoint": None, "hypothesis": []})
    try:
        while not all(path.exists() and is_done(path) for path in paths):
            try:
                write(quick, refresh=args.watch)
                said = str(args.output)
            except (FileNotFoundError, ValueError) as error:
                said = f"waiting: {error}"
            print(f"{time.strftime('%H:%M:%S')} {said}", flush=True)
            time.sleep(args.watch)
    except KeyboardInterrupt:
        print("stopped; the page shows what there is")


def run(args: argparse.Namespace) -> None:
    """Write the page.

    Raises:
        ValueError: there is nothing to report on, matplotlib is missing, or a file is unusable.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ValueError("evomoe-report page needs matplotlib: pip install matplotlib") from error
    if not (args.log or args.checkpoint or args.hypothesis):
        raise ValueError("there is nothing to report on; give --log, --checkpoint or --hypothesis")
    if bool(args.hypothesis) != bool(args.reference):
        raise ValueError("--hypothesis and --reference go together; give both")
    if args.samples < 0:
        raise ValueError(f"--samples {args.samples}: give a number of sentences, 0 or more")
    if args.watch is not None:
        if args.watch < 1 or not args.log:
            raise ValueError(f"--watch {args.watch}: give seconds above 0, and a --log to follow")
        watch_logs(args)
    print(json.dumps({"page": str(args.output), "bytes": write(args)}))
