"""Plot a run: its loss, active experts and temperature, and the load of each expert.

    python plot_training.py --log run/train.log --out run/evolution.png

The script reads the output of fairseq-train with `--log-format json`.
"""

import argparse
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import itertools

import matplotlib.pyplot as plt

from fairseq_evomoe.tools.run_log import read_log


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    try:
        log = read_log(args.log)
    except ValueError as error:
        sys.exit(str(error))
    rows = [r for r in log.train if "moe_active_experts" in r]
    if not rows:
        sys.exit(f"{args.log}: no training lines of an MoE model; train with --log-format json")
    updates = [r["num_updates"] for r in rows]
    layers = log.layers

    figure, axes = plt.subplots(
        2 + len(layers), 1, sharex=True, figsize=(8, 4.2 + 1.1 * len(layers)), layout="constrained"
    )
    axes[0].plot(updates, [r["loss"] for r in rows], color="black")
    axes[0].set_ylabel("task loss\n(bits)")
    axes[1].plot(updates, [r["moe_active_experts"] for r in rows], color="tab:blue")
    axes[1].set_ylabel("active experts\nper token", color="tab:blue")
    axes[1].set_ylim(bottom=0)
    warmth = axes[1].twinx()
    warmth.plot(updates, [r["moe_temperature"] for r in rows], color="tab:red", linestyle="--")
    warmth.set_ylabel("temperature", color="tab:red")
    warmth.set_ylim(bottom=0)
    for axis in axes[:2]:
        for before, after in itertools.pairwise(rows):
            if int(before["moe_stage"]) != int(after["moe_stage"]):
                axis.axvline(after["num_updates"], color="grey", linewidth=0.8)

    for axis, (layer, keys) in zip(axes[2:], layers.items(), strict=True):
        share = [[r.get(k, 1.0 if k.endswith("/e0") else 0.0) for r in rows] for k in keys]
        image = axis.imshow(
            share,
            aspect="auto",
            origin="lower",
            vmin=0,
            vmax=max(2 / len(keys), max(map(max, (s[-5:] for s in share)))),
            extent=(updates[0], updates[-1], -0.5, len(keys) - 0.5),
            cmap="viridis",
        )
        axis.set_ylabel(f"{layer}\nexpert")
        axis.set_yticks(range(len(keys)))
        figure.colorbar(image, ax=axis, label="load")
    axes[-1].set_xlabel("updates")
    figure.savefig(args.out, dpi=110)
    print(f"picture: {args.out}")


if __name__ == "__main__":
    main()
