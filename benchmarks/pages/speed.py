"""The tables and plots of docs/speed.md, and the tables of speed in README and recipes.

All are made from the rows in benchmarks/results/.

python -m benchmarks.pages.speed            print the tables
python -m benchmarks.pages.speed --write    update the pages and the plots
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import matplotlib

from benchmarks import RESULTS, ROOT
from benchmarks.pages.plots import Row, draw_series, save
from benchmarks.pages.step_profile import step_profile
from benchmarks.pages.tables import read, table, write_or_print

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

PAGE = ROOT / "docs" / "speed.md"
WAYS = {
    "ours": "ours",
    "fused": "ours, own products",
    "grouped_mm": "torch's grouped product",
    "transformers": "transformers, grouped",
    "scattermoe": "ScatterMoE",
    "eager": "one expert after another",
    "gshard": "GShard's capacity masks",
    "official": "official EvoMoE layout",
}
ROUTINGS = {"top1": "top-1", "top2": "top-2", "mix": "1 to 16 experts, 3 in the mean"}
STORES = {
    "fp32": "fp32",
    "bf16": "bf16",
    "int8": "int8",
    "linear part": "fp32 with a linear part",
    "straight-through": "the same, straight-through",
    "bag": "fp32, torch's `embedding_bag`",
    "official": "fp32, official CPU kernels",
}
ROWS = ("1", "16", "256", "1024", "4096")
MODES = ("forward", "forward+backward")


def short(ratio: str) -> str:
    """Format a ratio: two decimals below 4, one decimal below 10, none from 10 on."""
    value = float(ratio)
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}" if value >= 4 else f"{value:.2f}"


def where(row: Row) -> str:
    return f"{row['device']}, {row['threads']} threads, {row['dtype']}, torch {row['torch']}"


def on_cpu(row: Row) -> bool:
    return "NVIDIA" not in row["device"]


def grouped(rows: list[Row], by: Callable[[Row], str]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(by(row), []).append(row)
    return found


LAYER_MS = "ms, of floor, of traffic"


def layer(rows: list[Row]) -> str:
    """Time of the whole layer over its floor. If a case has several rows, the last one is used."""
    out = []
    for machine, mine in grouped(rows, where).items():
        at: dict[tuple[str, ...], dict[str, Row]] = {}
        for row in mine:
            key = (row["case"], row["experts"], row["tokens"])
            at.setdefault(key, {})[row["mode"]] = row
        lines = []
        for (case, experts, tokens), modes in at.items():
            cells = [case, experts, tokens]
            for mode in MODES:
                r = modes[mode]
                cells += [
                    short(r["ratio_p50"]),
                    " / ".join(
                        f"{float(r[c]):.0f}" if r[c] else "-"
                        for c in ("ms", "ms_floor", "ms_traffic")
                    ),
                ]
            lines.append(cells)
        head = ["case", "experts", "tokens", "forward", LAYER_MS, "forward + backward"]
        out.append(f"**{machine}**\n\n" + table([*head, LAYER_MS], lines) + "\n")
    return "\n".join(out)


def dispatch(rows: list[Row]) -> str:
    """Time of every way of dispatch over a dense FFN of the same active FLOPs, as forward /
    forward + backward."""
    out = []
    by_experts = lambda r: f"{r['experts']} experts, {where(r)}"
    for machine, mine in grouped(rows, by_experts).items():
        at = {(r["routing"], r["case"], r["tokens"], r["mode"]): r for r in mine}
        sizes = sorted({r["tokens"] for r in mine}, key=int)
        for kind, title in ROUTINGS.items():
            lines = []
            for case, name in WAYS.items():
                cells, peak = [], ""
                for tokens in sizes:
                    pair = [at.get((kind, case, tokens, m)) for m in MODES]
                    cells.append(" / ".join(short(r["ratio_p50"]) for r in pair if r) or "-")
                    peak = pair[0]["peak_mb"] if pair[0] and tokens == "2048" else peak
                if any(c != "-" for c in cells):
                    lines.append([name, *cells, peak])
            if lines:
                head = ["way", *(f"{n} tokens" for n in sizes), "MB at 2048"]
                out.append(f"**{title}** ({machine})\n\n" + table(head, lines) + "\n")
    return "\n".join(out)


def lookup(rows: list[Row]) -> str:
    """Time of one look-up over that of nn.Linear."""
    at = {(r["width"], r["case"], r["rows"], r["mode"]): r["ratio_p50"] for r in rows}
    lines = []
    for width in sorted({r["width"] for r in rows}, key=int):
        for case, name in STORES.items():
            cells = [at.get((width, case, n, MODES[0]), "") for n in ROWS]
            cells.append(at.get((width, case, ROWS[-1], MODES[1]), ""))
            if any(cells):
                lines.append([width, name, *(short(c) if c else "" for c in cells)])
    head = ["width", "tables", "batch 1", *ROWS[1:], f"forward + backward, {ROWS[-1]}"]
    return table(head, lines) + "\n"


def decode(rows: list[Row]) -> str:
    """Tokens/s of whole models at batch 1, and their ratio to that of the dense model."""
    shown = ("memoryformer fp32", "memoryformer bf16", "memoryformer int8", "memory FFN fp32")
    head = ("dense", "MemoryFormer", "with bf16 tables", "with int8 tables")
    lines = [[model, *speeds] for model, batch, _, speeds in _speeds(rows, shown) if batch == "1"]
    return table(["model", *head, "look-ups for the FFNs only"], lines) + "\n"


def decode_output(rows: list[Row]) -> str:
    """The same for an output layer in int8 and a large vocabulary, for one sequence or several."""
    shown = ("dense, output int8", "memoryformer int8", "memoryformer and output int8")
    head = ("dense", "dense, output layer in int8", "MemoryFormer in int8", "both")
    lines = [
        [f"{model}, {vocab:,} words", batch, *speeds]
        for model, batch, vocab, speeds in _speeds(rows, shown)
    ]
    return table(["model", "sequences", *head], lines) + "\n"


def decode_experts(rows: list[Row]) -> str:
    """The same for models with experts."""
    shown = ("switch", "switch int8")
    lines = [[model, batch, *speeds] for model, batch, _, speeds in _speeds(rows, shown)]
    return table(["model", "sequences", "dense", "Switch, 8 experts", "in int8"], lines) + "\n"


def _speeds(rows: list[Row], shown: tuple[str, ...]) -> Iterator[tuple[str, str, int, list[str]]]:
    """Yield (model, batch, vocabulary, tokens/s of the dense model and of each case with its ratio)
    of every run that has all the cases `shown`."""
    for (width, layers, ffn, batch, _), found in _runs(rows):
        if set(shown) <= set(found):
            speeds = [f"{float(found['dense']['tokens_per_s']):.0f}"]
            for r in (found[case] for case in shown):
                speeds.append(f"{float(r['tokens_per_s']):.0f} ({short(r['ratio_p50'])} x)")
            model = f"width {width}, {layers} layers, FFN {ffn}"
            yield model, batch, int(found["dense"]["vocab"]), speeds


def _runs(rows: list[Row]) -> list[tuple[tuple[str, ...], dict[str, Row]]]:
    """((width, layers, FFN, batch, date), case -> row) of every run, the widest models first."""
    runs: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        key = tuple(row[k] for k in ("width", "layers", "ffn", "batch", "date"))
        runs.setdefault(key, {})[row["case"]] = row
    return sorted(runs.items(), key=lambda run: (-int(run[0][0]), int(run[0][3])))


def training(rows: list[Row]) -> str:
    """Words/s of whole updates, over fairseq's own model in float32 and over our dense model.

    Of a case that was measured in several runs, the range of the ratios is shown.
    """
    out = []
    for machine, mine in grouped(rows, lambda r: f"{r['device']}, torch {r['torch']}").items():
        at = grouped(mine, lambda r: f"{r['task']} {r['case']} {r['arithmetic']}")
        lines = []
        for found in at.values():
            first = found[0]
            cells = [first["task"], first["case"], first["arithmetic"]]
            for key in ("ratio_to_stock", "ratio_to_dense"):
                values = sorted({short(r[key]) for r in found if r[key]})
                cells.append(" to ".join(dict.fromkeys((values[0], values[-1]))) if values else "")
            cells.append(f"{max(int(r['words_per_s']) for r in found):,}")
            lines.append(cells)
        threads = mine[0]["threads"]
        head = ["task", "model", "arithmetic", "over stock float32", "over our dense model"]
        title = f"**{machine}, {threads} thread{'s' * (threads != '1')}**"
        out.append(f"{title}\n\n" + table([*head, "most words/s"], lines) + "\n")
    return "\n".join(out)


def cost(rows: list[Row]) -> str:
    """The table in README, for 4096 tokens and 8 experts on a CPU."""
    on = [r for r in rows if (r["tokens"], r["experts"]) == ("4096", "8") and on_cpu(r)]
    at = {(r["case"], r["mode"]): f"{float(r['ratio_p50']):.2f}" for r in on}
    densities = [f"density {d}" for d in ("0.25", "0.5", "0.75")]
    names = {
        "sparse layer, top-1, over its floor": ["sparse top-1"],
        "sparse layer, top-2, over its floor": ["sparse top-2"],
        "dense stage over two GEMMs": ["dense stage"],
        "a quarter, half, three quarters of all pairs active, over all pairs": densities,
    }
    lines = [
        [name, *(", ".join(at[case, mode] for case in cases) for mode in MODES)]
        for name, cases in names.items()
    ]
    return table(["case", "forward", "forward + backward"], lines) + "\n"


def below(figure: plt.Figure, axis: Axes) -> None:
    """Draw one legend for all axes below the plots."""
    drawn, names = axis.get_legend_handles_labels()
    figure.legend(drawn, names, loc="outside lower center", ncols=3, fontsize=8)


def dispatch_plot(rows: list[Row]) -> plt.Figure:
    figure, axes = plt.subplots(1, 3, figsize=(9.6, 3.9), sharey=True, layout="constrained")
    cpu = [r for r in rows if on_cpu(r) and r["mode"] == MODES[1]]
    for axis, (kind, title) in zip(axes, ROUTINGS.items(), strict=True):
        series = {}
        for case, name in WAYS.items():
            mine = [r for r in cpu if (r["case"], r["routing"]) == (case, kind)]
            if mine:
                mine.sort(key=lambda r: int(r["tokens"]))
                series[name] = [(float(r["tokens"]), [float(r["ratio_p50"])]) for r in mine]
        draw_series(axis, series)
        axis.set(xscale="log", yscale="log", xlabel="tokens", title=title)
        axis.set_xticks([512, 1024, 2048, 4096], ["512", "1024", "2048", "4096"])
        axis.minorticks_off()
    axes[0].set_ylabel("time over a dense FFN of the same FLOPs")
    below(figure, axes[0])
    return figure


def lookup_plot(rows: list[Row]) -> plt.Figure:
    widths = sorted({r["width"] for r in rows}, key=int)
    figure, axes = plt.subplots(
        1, len(widths), figsize=(9.6, 3.7), sharey=True, layout="constrained"
    )
    for axis, width in zip(axes, widths, strict=True):
        series = {}
        for case, name in STORES.items():
            mine = [
                r for r in rows if (r["case"], r["width"], r["mode"]) == (case, width, MODES[0])
            ]
            series[name.replace("`", "")] = [
                (float(r["rows"]), [float(r["ratio_p50"])]) for r in mine
            ]
        draw_series(axis, {k: v for k, v in series.items() if v})
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set(xscale="log", yscale="log", xlabel="rows", title=f"width {width}")
    axes[0].set_ylabel("time over nn.Linear")
    below(figure, axes[0])
    return figure


def hf_experts(rows: list[Row]) -> str:
    """Our experts in transformers' MoE models over its own implementations."""
    others = ("grouped_mm", "eager", "batched_mm")
    out = []
    for machine, mine in grouped(rows, where).items():
        at: dict[tuple[str, ...], dict[tuple[str, str], str]] = {}
        for row in mine:
            key = (f"{row['model']}, {row['top_k']} of {row['experts']}", row["tokens"])
            at.setdefault(key, {})[row["mode"], row["other"]] = short(row["ratio_p50"])
        lines = [
            [*key, *(", ".join(found.get((mode, o), "-") for o in others) for mode in MODES)]
            for key, found in at.items()
        ]
        heads = (f"{mode}, over {', '.join(others)}" for mode in MODES)
        out.append(f"{machine}:\n\n" + table(["experts", "tokens", *heads], lines))
    return "\n\n".join(out) + "\n"


def places() -> list[tuple[Path, str, str]]:
    """(page, marker, text) of every table that this script makes."""
    layers = read(RESULTS / "moe_layer.csv")
    look_ups = ROOT / "docs/look_up_layers.md"
    return [
        (ROOT / "README.md", "cost", cost(layers)),
        (PAGE, "layer", layer(layers)),
        (PAGE, "training", training(read(RESULTS / "training.csv"))),
        (PAGE, "profile", step_profile(read(RESULTS / "step_profile.csv"))),
        (PAGE, "dispatch", dispatch(read(RESULTS / "dispatch.csv"))),
        (look_ups, "one look-up", lookup(read(RESULTS / "lookup.csv"))),
        (look_ups, "decoding", decode(read(RESULTS / "decode.csv"))),
        (look_ups, "output layer", decode_output(read(RESULTS / "decode.csv"))),
        (
            ROOT / "docs/hugging_face.md",
            "hf experts",
            hf_experts(read(RESULTS / "hf_experts.csv")),
        ),
        (PAGE, "decoding", decode_experts(read(RESULTS / "decode.csv"))),
    ]


def figures() -> dict[str, plt.Figure]:
    return {
        "dispatch": dispatch_plot(read(RESULTS / "dispatch.csv")),
        "lookup": lookup_plot(read(RESULTS / "lookup.csv")),
    }


if __name__ == "__main__":
    write_or_print(__doc__, places, lambda: save(PAGE.parent / "speed", figures))
