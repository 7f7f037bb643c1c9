"""`evomoe-report page`: show runs, experts and scores on one self-contained HTML page."""

import argparse
import html
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fairseq_evomoe.tools import checkpoint
from fairseq_evomoe.tools.cost import BYTES, per_token
from fairseq_evomoe.tools.health import health
from fairseq_evomoe.tools.health import summary as in_a_sentence
from fairseq_evomoe.tools.run_log import RunLog, read_log
from fairseq_evomoe.tools.text import read_lines

STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:80rem;margin:2rem auto;padding:0 1rem;color:#111}
table{border-collapse:collapse;margin:1rem 0}th,td{padding:.25rem .7rem;
border-bottom:1px solid #ccc;text-align:right;vertical-align:top}
th:first-child,td:first-child,td.text{text-align:left}
svg{max-width:100%;height:auto}figcaption,.note{color:#444}figure{margin:1rem 0}
"""


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Format an HTML table. Cells with long text get the class `text`, which aligns them left."""

    def cell(value: Any) -> str:
        shown = str(value)
        if isinstance(value, float | int):
            shown = f"{value:,.4g}" if isinstance(value, float) else f"{value:,}"
        kind = ' class="text"' if isinstance(value, str) and len(value) > 20 else ""
        return f"<td{kind}>{html.escape(shown)}</td>"

    top = "".join(f"<th>{html.escape(h)}</th>" for h in head)
    body = "".join("<tr>" + "".join(map(cell, row)) + "</tr>" for row in rows)
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


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
    return table(head, rows)


SIGNS = {"good": "✓ good", "look": "? look", "bad": "✗ bad"}
"""Verdict -> how it is shown, readable without colour."""


def health_table(log: RunLog) -> str:
    """Format what the log says about the health of a run: a sentence and a table."""
    found = health(log)
    rows = [[f.question, SIGNS[f.verdict], f.answer, f.threshold] for f in found]
    head = ["", "verdict", "what was seen", "what would be good"]
    return f"<p>{html.escape(in_a_sentence(found))}</p>{table(head, rows)}"


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
    return table(head, rows) + f'<p class="note">{html.escape(signature)}; 1000 resamples</p>'


def model_sections(args: argparse.Namespace, picture: Any) -> Iterator[tuple[str, str]]:
    """Yield the sections about a checkpoint.

    They show what a token costs, how similar the experts are, which words each expert gets, and how
    many experts a token uses.
    """
    from fairseq_evomoe.modules.moe_layer import moe_layers
    from fairseq_evomoe.tools import pictures
    from fairseq_evomoe.tools.specialists import activity, similarity, specialists, watch

    model, cfg, task = checkpoint.build(args.checkpoint, args.data)
    costs = per_token(model, cfg.model, context=args.context, dtype=args.dtype)
    names = ["macs", "dense_macs", "bytes", "dense_bytes", "parameters", "dense_parameters"]
    rows = [[kind, *(row[n] / 1e6 for n in names)] for kind, row in costs.items()]
    rows.sort(key=lambda row: row[0] == "total")
    head = ["per token, millions", "MACs", "dense", "bytes read", "dense", "weights", "dense"]
    yield "What a token costs", table(head, rows)

    if not moe_layers(model):
        return
    note = '<p class="note">Cosine of each pair of experts&#39; weights. Equal experts have 1.</p>'
    yield (
        "How alike the experts are",
        note + picture("likeness", pictures.likeness(similarity(model))),
    )
    task.load_dataset(args.subset)
    seen = watch(model, task, subset=args.subset, max_tokens=args.max_tokens)
    found = specialists(task, seen)
    languages = {
        "encoder": getattr(cfg.task, "source_lang", None),
        "decoder": getattr(cfg.task, "target_lang", None),
    }
    rows = []
    for layer, experts in found.items():
        language = languages.get(layer.split(".")[0]) or ""
        for e, expert in enumerate(experts):
            words = ", ".join(f"{w} ({share:.0%}, {n} times)" for w, n, share in expert.words)
            where = f"{layer} {language}".strip()
            rows.append([where, e, f"{expert.share:.1%}", words or "no over-represented word"])
    head = [
        "layer, language",
        "expert",
        "share of load",
        "over-represented words (share and number of occurrences routed here)",
    ]
    yield "Which words go where", table(head, rows)
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
    yield "How many experts a token uses", table(head, rows)


def sections(args: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """Yield (heading, HTML) of each section that the given files have data for."""
    from fairseq_evomoe.tools import pictures

    def picture(name: str, figure: Any) -> str:
        if args.png:
            args.png.mkdir(parents=True, exist_ok=True)
        png = args.png / f"{name}.png" if args.png else None
        return f"<figure>{pictures.svg(figure, png=png)}</figure>"

    logs = [read_log(path, name) for name, path in args.log]
    for log in logs:
        yield f"Is the training healthy? {log.name}", health_table(log)
    if logs:
        yield "Runs", summary(logs)
        yield "Loss", picture("losses", pictures.losses(logs))
    evolved = [log for log in logs if log.layers]
    if evolved:
        yield "Evolution", picture("evolution", pictures.evolution(evolved))
    for log in evolved:
        yield f"Load of the experts: {log.name}", picture(f"load-{log.name}", pictures.load(log))
    if args.checkpoint:
        yield from model_sections(args, picture)
    if args.hypothesis:
        yield "Translation", bleu_rows(args.reference, args.hypothesis)


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
        "--context", type=int, default=512, help="number of positions that a token attends to"
    )
    parser.add_argument("--dtype", choices=BYTES, default="fp32")
    parser.add_argument("--reference", type=Path, help="detokenised text; needs --hypothesis")
    parser.add_argument(
        "--hypothesis", type=named, action="append", default=[], metavar="[NAME=]FILE",
        help="detokenised output, scored against --reference; may be given several times",
    )  # fmt: skip
    parser.add_argument("--title", default="Training report")
    parser.add_argument("--output", type=Path, required=True, help="HTML file to write")
    parser.add_argument("--png", type=Path, help="folder for the figures as PNG files")


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
    body = "".join(
        f"<section><h2>{html.escape(heading)}</h2>{content}</section>"
        for heading, content in sections(args)
    )
    title = html.escape(args.title)
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{STYLE}</style></head><body><h1>{title}</h1>{body}</body></html>\n"
    )
    partial = args.output.with_name(args.output.name + ".partial")
    partial.write_text(page, encoding="utf-8")
    partial.replace(args.output)
    print(json.dumps({"page": str(args.output), "bytes": len(page.encode())}))
