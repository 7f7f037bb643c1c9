"""docs/flags.md from the dataclasses that fairseq turns into options.

python docs/make_flags.py            prints the page
python docs/make_flags.py --write    writes docs/flags.md
"""

import argparse
import dataclasses
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from fairseq_evomoe import config, memory_config  # noqa: E402
from fairseq_evomoe.criterions.routing_metrics import RoutingLossConfig  # noqa: E402

PAGE = ROOT / "docs" / "flags.md"
SECTIONS = (
    (
        "Models: experts and gates",
        "`--arch transformer_evomoe` (`_iwslt_de_en`, `_wmt_en_de`, `_wmt_en_de_big`), "
        "`transformer_lm_evomoe` (`_gpt_small`, `_gpt_medium`, `_gpt_xl`), `roberta_evomoe` "
        "(`_base`, `_large`). These set `--moe-freq 2` and `--moe-expert-count` 4, 8 "
        "(`_wmt_en_de`) or 16 (GPT and RoBERTa sizes).",
        config.MoEConfig,
    ),
    (
        "Models: look-up layers",
        "The same models, and `transformer_memoryformer` (`_iwslt_de_en`, `_wmt_en_de`), "
        "`transformer_lm_memoryformer_tiny` (`_small`, `_base`), `roberta_memoryformer_base`, "
        "which have both kinds of look-ups.",
        memory_config.MemoryConfig,
    ),
    (
        "Tasks: the split, the schedule, many workers",
        "`--task translation_evomoe`, `language_modeling_evomoe`, `masked_lm_evomoe`.",
        config.EvolutionConfig,
    ),
    (
        "Criterions",
        "`--criterion moe_label_smoothed_cross_entropy`, `moe_cross_entropy`, `moe_masked_lm`, "
        "`moe_sentence_prediction`.",
        RoutingLossConfig,
    ),
)


def own_fields(cls: type) -> list[dataclasses.Field]:
    """The fields that this package declares, those of fairseq's dataclasses left out."""
    ours = {
        name
        for base in cls.__mro__
        if base.__module__.startswith("fairseq_evomoe")
        for name in vars(base).get("__annotations__", {})
    }
    # what is interpolated from elsewhere is no flag of ours
    told = lambda f: f.metadata.get("help") and not str(f.default).startswith("${")
    return [f for f in dataclasses.fields(cls) if f.name in ours and told(f)]


def page() -> str:
    """The page as Markdown."""
    lines = ["# Flags", "", "Made by `python docs/make_flags.py --write` from the code.", ""]
    for title, note, cls in SECTIONS:
        head = ["| flag | default | meaning |", "| --- | --- | --- |"]
        lines += [f"## {title}", "", note, "", *head]
        for f in own_fields(cls):
            default = {True: "on", False: "off", None: ""}.get(f.default, f.default)
            if isinstance(f.default, int | float) and not isinstance(f.default, bool):
                default = f.default
            text = f.metadata["help"].replace("|", "\\|")
            lines.append(f"| `--{f.name.replace('_', '-')}` | {default} | {text} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    if args.write:
        PAGE.write_text(page(), encoding="utf-8")
    else:
        print(page())


if __name__ == "__main__":
    main()
