"""Generate docs/flags.md and docs/compat.md from the code.

python docs/make_pages.py            prints both pages
python docs/make_pages.py --write    writes them
"""

import argparse
import dataclasses
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from fairseq_evomoe.compat.patching import PATCHES  # noqa: E402
from fairseq_evomoe.config import EvolutionConfig, MoEConfig  # noqa: E402
from fairseq_evomoe.criterions.routing_metrics import RoutingLossConfig  # noqa: E402
from fairseq_evomoe.memory.config import MemoryConfig  # noqa: E402

GROUPS = {"model": (MoEConfig, MemoryConfig), "task": (EvolutionConfig,)}
GROUPS["criterion"] = (RoutingLossConfig,)

SECTIONS = (
    (
        "Which layers have experts",
        "`--arch transformer_evomoe` (`_iwslt_de_en`, `_wmt_en_de`, `_wmt_en_de_big`), "
        "`transformer_lm_evomoe` (`_gpt_small`, `_gpt_medium`, `_gpt_xl`) and `roberta_evomoe` "
        "(`_base`, `_large`) set `--moe-freq 2` and `--moe-expert-count` 4, 8 (`_wmt_en_de`) or 16 "
        "(the GPT and RoBERTa sizes).",
        ("moe_freq", "encoder_moe_freq", "decoder_moe_freq", "moe_expert_count"),
        ("moe_expert_ffn_dim", "moe_expert_type", "moe_expert_storage", "moe_shared_expert"),
    ),
    (
        "How the gate chooses experts",
        "Flags of a gate that is not chosen have no effect. A feature that the chosen gate lacks "
        "is refused.",
        ("moe_gate", "moe_gate_init_std", "moe_gate_token_bias", "moe_balance_bias", "moe_top_k"),
        ("moe_capacity_factor", "moe_batch_prioritized_routing", "moe_second_expert_policy"),
        ("moe_normalize_gate_prob_before_dropping", "moe_hash_mapping"),
        ("moe_choice_experts", "moe_choice_group"),
    ),
    (
        "The DTS gate",
        "The gate of EvoMoE (arXiv 2112.14397, section 3.3).",
        ("dts_threshold", "dts_max_experts", "dts_combine", "dts_noise", "dts_top_k", "dts_parity"),
    ),
    (
        "When what happens",
        "`--task translation_evomoe`, `language_modeling_evomoe` and `masked_lm_evomoe` have these "
        "flags. The log names the resolved updates in a line that begins with `evolution:`.",
        ("evo_spawn_update", "dts_anneal_updates", "dts_hard_update"),
        ("dts_temperature_start", "dts_temperature_end", "dts_temperature_schedule"),
        ("stable_freeze_update",),
    ),
    (
        "How one expert becomes many",
        "",
        ("evo_diversify", "evo_diversify_ratio", "evo_diversify_noise"),
    ),
    (
        "Losses of routing",
        "`--criterion moe_label_smoothed_cross_entropy`, `moe_cross_entropy`, `moe_masked_lm` and "
        "`moe_sentence_prediction` add them to the loss of the task.",
        ("moe_gate_loss_wt", "moe_gate_loss_combine_method", "moe_balance_all_ranks"),
        ("moe_z_loss_wt", "moe_entropy_loss_wt", "stable_distill_loss_wt", "stable_distill_dim"),
    ),
    (
        "Look-up layers",
        "All models above have these flags. `transformer_memoryformer` (`_iwslt_de_en`, "
        "`_wmt_en_de`), `transformer_lm_memoryformer_tiny` (`_small`, `_base`) and "
        "`roberta_memoryformer_base` switch both kinds of look-ups on.",
        ("memory_ffn", "memory_parallel", "memory_attention", "memory_layers"),
        ("memory_bits", "memory_delta", "memory_ffn_embed_dim"),
        ("memory_score", "memory_temperature", "memory_norm", "memory_out_proj"),
        ("memory_linear", "memory_straight_through", "memory_dropout"),
        ("memory_spawn_update",),
        ("memory_ngram", "memory_ngram_rows", "memory_ngram_mapped"),
        ("memory_lr_scale", "memory_weight_decay", "memory_tables"),
    ),
    (
        "The output layer",
        "[tools.md](tools.md) says how `evomoe-export` makes a checkpoint for inference.",
        ("output_storage",),
    ),
    (
        "Training on a CPU",
        "`--amp` multiplies in bfloat16 there ([speed.md](speed.md)).",
        ("cpu_matmul",),
    ),
    (
        "Several workers",
        "",
        ("expert_parallel", "expert_parallel_size", "expert_parallel_save"),
    ),
    (
        "Flags of fairseq's moe branch",
        "They are accepted so that its command lines run.",
        ("moe_top1_expert", "moe_gating_use_fp32", "use_moe_pad_mask"),
        ("moe_eval_capacity_token_fraction",),
    ),
)


def own_fields() -> dict[str, tuple[str, dataclasses.Field]]:
    """Return name -> (Hydra group, field) of every flag that this package declares."""
    found = {}
    for group, classes in GROUPS.items():
        for cls in classes:
            ours = {
                name
                for base in cls.__mro__
                if base.__module__.startswith("fairseq_evomoe")
                for name in vars(base).get("__annotations__", {})
            }
            for f in dataclasses.fields(cls):
                # a field that is interpolated from elsewhere is not one of our flags
                interpolated = str(f.default).startswith("${")
                if f.name in ours and f.metadata.get("help") and not interpolated:
                    found[f.name] = (group, f)
    return found


def default_of(f: dataclasses.Field) -> str:
    """Return the default of a flag as the page shows it."""
    if f.default is None:
        return "automatic"
    return {"True": "on", "False": "off"}.get(str(f.default), f"`{f.default}`")


def flags_page() -> str:
    """Return docs/flags.md.

    Raises:
        SystemExit: SECTIONS lack a flag of the code, or name one that does not exist.
    """
    flags = own_fields()
    named = [name for _, _, *rows in SECTIONS for row in rows for name in row]
    if sorted(named) != sorted(flags):
        sys.exit(f"SECTIONS and the code differ in {sorted(set(named) ^ set(flags))}")
    lines = ["# Flags", ""]
    lines += ["`python docs/make_pages.py --write` generates this page from the code.", ""]
    lines += ["The flag `--moe-freq` is the field `moe_freq` of a configuration file for"]
    lines += ["`fairseq-hydra-train`, in the group that the second column names. A default that is"]
    lines += ["called automatic is what the last column says, or what the model or gate needs.", ""]
    for title, note, *rows in SECTIONS:
        lines += [f"## {title}", "", *([note, ""] if note else [])]
        lines += ["| flag | group | default | meaning |", "| --- | --- | --- | --- |"]
        for name in (name for row in rows for name in row):
            group, f = flags[name]
            text = f.metadata["help"].replace("|", "\\|")
            flag = f"`--{name.replace('_', '-')}`"
            lines.append(f"| {flag} | {group} | {default_of(f)} | {text} |")
        lines.append("")
    return "\n".join(lines)


def compat_page() -> str:
    """Return docs/compat.md."""
    lines = ["# What is patched in fairseq", ""]
    lines += ["`python docs/make_pages.py --write` generates this page from the code in"]
    lines += [
        "`fairseq_evomoe/compat/`. Importing the package replaces these functions of fairseq, each"
    ]
    lines += ["for the reason given. Where its reason is absent, a patch is not applied.", ""]
    lines += ["| what is replaced | why | seen in fairseq | test |", "| --- | --- | --- | --- |"]
    for each in PATCHES:
        test = f"[{each.test}](../{each.test})"
        lines.append(f"| `{each.target}` | {each.reason} | {each.seen_in} | {test} |")
    return "\n".join([*lines, ""])


PAGES = {"flags.md": flags_page, "compat.md": compat_page}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write the pages into docs/")
    args = parser.parse_args()
    for name, make in PAGES.items():
        if args.write:
            (ROOT / "docs" / name).write_text(make(), encoding="utf-8")
        else:
            print(make())


if __name__ == "__main__":
    main()
