"""The flags, each said once, as typed dataclasses that fairseq turns into command-line options.

`MoEConfig` belongs to the models (what a layer is), `EvolutionConfig` to the tasks (what happens
when). Field `moe_freq` is flag `--moe-freq`, and so on.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Optional, Self

from fairseq.dataclass import FairseqDataclass
from omegaconf import II


def option(default: Any, help: str) -> Any:
    """A field of a configuration: its default and its help text."""
    return field(default=default, metadata={"help": help})


@dataclass
class Flags(FairseqDataclass):
    """Flags that a model reads from whatever fairseq hands it."""

    @classmethod
    def from_args(cls, args: Any) -> Self:
        """Read the fields from a Namespace, DictConfig or TransformerConfig; defaults elsewhere."""
        read = {f.name: getattr(args, f.name, None) for f in fields(cls) if f.name != "_name"}
        return cls(**{k: v for k, v in read.items() if v is not None})

    def given(self, flag: str) -> Any:
        """Value of a flag by its name on the command line, `--moe-freq`."""
        return getattr(self, flag[2:].replace("-", "_"))

    def need(self, ok: bool, flag: str, fix: str) -> None:
        """Raise the error for a flag's value unless `ok`.

        Raises:
            ValueError: "FLAG VALUE: FIX".
        """
        if not ok:
            raise ValueError(f"{flag} {self.given(flag)}: {fix}")


@dataclass
class MoEConfig(Flags):
    """Where the MoE layers stand, what their experts are, and how the gate chooses."""

    moe_freq: int = option(0, "every n-th layer of encoder and decoder is an MoE layer; 0: none")
    encoder_moe_freq: int = option(0, "as --moe-freq, for the encoder; the larger of the two holds")
    decoder_moe_freq: int = option(0, "as --moe-freq, for the decoder; the larger of the two holds")
    moe_expert_count: int = option(0, "number of experts in each MoE layer")
    moe_expert_ffn_dim: int = option(0, "hidden width of an expert; 0: that of the dense FFN")
    expert_type: str = option("ffn", "what an expert is: ffn, or memory (look-ups, --memory-*)")
    moe_gate: str = option(
        "dts", "gate: dts, dense, switch, gshard, topk, base, hash, stable or expert_choice"
    )
    moe_shared_expert: bool = option(
        False,
        "keep the base expert active for every token, beside the --moe-expert-count routed ones; "
        "the two halves are averaged",
    )
    moe_top_k: int = option(2, "experts per token of --moe-gate topk")
    moe_gate_init_std: float = option(0.02, "standard deviation of the gate's initial weights")
    moe_gate_token_bias: float = option(
        0.0,
        "dts, dense, switch, gshard, topk, base: add to the logits a learned bias of the token id, "
        "drawn with this standard deviation, so that words keep their experts; with dts it comes "
        "in as the gate cools. 0: none; causal language models with dts have 3 by default",
    )
    moe_capacity_factor: float = option(
        0.0,
        "switch, gshard: while training an expert takes at most this many times its even share of "
        "the tokens, the rest pass it by; 0: no limit. expert_choice: experts per token on average "
        "(0: 1)",
    )
    moe_batch_prioritized_routing: bool = option(
        False, "with a capacity: the tokens with the surest gate come first, not those in front"
    )
    moe_second_expert_policy: str = option(
        "sampling",
        "gshard, while training: the second expert is drawn by its logit (sampling), kept with "
        "probability 2 p (random) or always taken (all)",
    )
    moe_normalize_gate_prob_before_dropping: bool = option(
        False, "gshard: the two weights sum to 1 before, not after, the capacity drops pairs"
    )
    moe_balance_bias: float = option(
        0.0,
        "dts, switch, topk, gshard: balance without a loss. Experts are chosen by logit plus bias, "
        "and after each update a bias moves by this much towards even load; 0: off, 0.001 is usual",
    )
    moe_hash_mapping: str = option(
        "balanced",
        "hash: balanced (by the dictionary's counts), random, or a JSON file {token: expert}",
    )
    moe_choice_group: str = option(
        "sentence",
        "expert_choice: experts choose among the tokens of each sentence or of the batch",
    )
    moe_distill_dim: int = option(
        50, "stable: width of the word embeddings of the distilled router"
    )
    moe_balance_all_ranks: bool = option(
        False, "balance loss: average each expert's share of the load over all workers"
    )
    dts_threshold: Optional[float] = option(
        None,
        "dts: an expert is active while its probability is at least this share of the uniform "
        "probability 1/E, by default 0.2 (with --dts-parity: at least this probability, 0.001)",
    )
    dts_max_experts: int = option(0, "dts: at most this many experts per token; 0: no cap")
    dts_combine: str = option(
        "softmax",
        "dts combine weights over the active experts: softmax (clean softmax of the logits), raw "
        "(noisy tempered p), renorm (p, summing to 1), or straight (as renorm, with the gradient "
        "of p where one expert is left)",
    )
    dts_noise: str = option(
        "annealed",
        "dts: noise on the logits while training: annealed (Gumbel, falling to nothing with the "
        "temperature), gumbel (at full strength to the end, as in the paper) or none",
    )
    dts_top_k: int = option(1, "dts: experts per token in the hard stage")
    dts_parity: bool = option(
        False,
        "dts: the official code's rule: absolute threshold 0.001, no renormalisation, weights from "
        "--dts-combine softmax or raw, top-1 in evaluation",
    )
    # flags of the older MoE branch: honoured or refused, never ignored
    moe_top1_expert: bool = option(False, "the older branch's name for --moe-gate switch")
    moe_gating_use_fp32: bool = option(False, "accepted: the gate always computes in fp32")
    use_moe_pad_mask: bool = option(False, "accepted: padding is never routed")
    moe_eval_capacity_token_fraction: float = option(
        -1.0, "accepted when negative: evaluation drops no token"
    )

    def freq(self, side: str) -> int:
        """Frequency of MoE layers on one side, "encoder" or "decoder"; 0: none."""
        return max(self.moe_freq, getattr(self, f"{side}_moe_freq"))

    def is_moe_layer(self, side: str, index: int) -> bool:
        """Layer `index` (from 0) is an MoE layer iff (index + 1) is a multiple of the frequency."""
        freq = self.freq(side)
        return freq > 0 and (index + 1) % freq == 0

    @property
    def threshold(self) -> float:
        """Smallest probability at which an expert of the DTS gate is active."""
        if self.dts_parity:
            return 0.001 if self.dts_threshold is None else self.dts_threshold
        share = 0.2 if self.dts_threshold is None else self.dts_threshold
        return share / self.moe_expert_count

    def check(self, gates: Mapping[str, Any]) -> "MoEConfig":
        """Refuse what cannot work, before anything is built.

        Args:
            gates: what `--moe-gate` may name -> gate class, whose `check(cfg)` judges its flags.

        Raises:
            ValueError: names the flag and the fix.
        """
        if self.moe_top1_expert:
            self.need(
                self.moe_gate in ("dts", "switch"),
                "--moe-gate",
                "contradicts --moe-top1-expert, which means --moe-gate switch; drop one of the two",
            )
            self.moe_gate = "switch"
        for flag in ("--moe-freq", "--encoder-moe-freq", "--decoder-moe-freq"):
            self.need(self.given(flag) >= 0, flag, "must be 0 (none) or more")
        if self.freq("encoder") == 0 and self.freq("decoder") == 0:
            return self
        self.need(
            self.moe_expert_count >= 1, "--moe-expert-count", "give each MoE layer 1 expert or more"
        )
        self.need(
            self.moe_expert_ffn_dim >= 0, "--moe-expert-ffn-dim", "give a width, or 0 for the FFN's"
        )
        self.need(self.expert_type in ("ffn", "memory"), "--expert-type", "choose ffn or memory")
        self.need(
            self.expert_type == "ffn" or self.moe_expert_ffn_dim == 0,
            "--moe-expert-ffn-dim",
            "the hidden width of memory experts follows from --memory-bits and --memory-delta",
        )
        self.need(self.moe_gate in gates, "--moe-gate", f"choose one of {', '.join(gates)}")
        self.need(self.moe_gate_init_std >= 0, "--moe-gate-init-std", "must be >= 0")
        self.need(
            0 <= self.moe_capacity_factor < math.inf, "--moe-capacity-factor", "must be 0 or more"
        )
        self.need(0 <= self.moe_balance_bias < math.inf, "--moe-balance-bias", "must be 0 or more")
        self.need(
            0 <= self.moe_gate_token_bias < math.inf, "--moe-gate-token-bias", "must be 0 or more"
        )
        self.need(
            self.moe_eval_capacity_token_fraction < 0,
            "--moe-eval-capacity-token-fraction",
            "evaluation drops no token, or a sentence would get what its batch leaves over; "
            "leave the flag out or pass -1.0",
        )
        gates[self.moe_gate].check(self)
        return self


@dataclass
class SplitConfig(FairseqDataclass):
    """How the base expert becomes many."""

    evo_diversify: str = option(
        "drop", "how copies of the base expert are made different: drop, mask, noise or copy"
    )
    evo_diversify_ratio: float = option(
        0.5, "share of hidden units that drop re-initialises, or mask silences, in each copy"
    )
    evo_diversify_grain: str = option(
        "unit", "mask and drop choose whole hidden units (unit) or single weights (weight)"
    )
    evo_diversify_weights: str = option(
        "auto",
        "which weights are made different: fc1, fc2, both, or auto (mask: fc2, so that a silenced "
        "unit can learn again; the others: both)",
    )
    evo_base_expert: str = option(
        "exact", "the base expert itself after the split: exact (unchanged) or diverse (a copy too)"
    )
    evo_diversify_noise: float = option(
        0.1, "noise: standard deviation of what is added, in units of the weights' own"
    )


@dataclass
class EvolutionConfig(SplitConfig):
    """When the experts split and how the gate cools: a part of every task's configuration."""

    evo_spawn_update: int = option(
        -1,
        "update at which the base expert splits into all; 0: independent experts from the start; "
        "-1: a twentieth of --max-update for --moe-gate dts, 0 for the others",
    )
    dts_temperature_start: float = option(2.0, "softmax temperature of the gate at the split")
    dts_temperature_end: float = option(0.3, "softmax temperature of the gate after annealing")
    dts_temperature_schedule: str = option("linear", "linear, exponential or cosine")
    dts_anneal_updates: int = option(
        -1, "updates from the split over which the temperature falls; -1: a tenth of --max-update"
    )
    dts_hard_update: int = option(
        -1, "update from which only the top-k experts stay; -1: when annealing ends; 0: never"
    )
    stable_freeze_update: int = option(
        -1,
        "stable: update from which the distilled router is frozen and routes; -1: a tenth of "
        "--max-update after the split; 0: never",
    )
    expert_parallel: bool = option(
        False, "share the experts of each layer out over the workers, instead of all on each"
    )
    expert_parallel_size: int = option(
        0,
        "how many neighbouring workers share them out; further groups of so many hold copies; "
        "0: the largest number that divides the workers and --moe-expert-count",
    )
    expert_parallel_save: str = option(
        "gathered",
        "with --expert-parallel: one ordinary checkpoint (gathered), or experts in a folder beside "
        "it, written by the workers that hold them (sharded), for models that no host can gather",
    )
    max_update: int = II("optimization.max_update")
    seed: int = II("common.seed")
    ddp_backend: str = II("distributed_training.ddp_backend")
    zero_sharding: str = II("distributed_training.zero_sharding")
    write_checkpoints_asynchronously: bool = II("checkpoint.write_checkpoints_asynchronously")
    use_bmuf: bool = II("optimization.use_bmuf")
    amp: bool = II("common.amp")
    fp16: bool = II("common.fp16")
    fp16_no_flatten_grads: bool = II("common.fp16_no_flatten_grads")
    memory_efficient_fp16: bool = II("common.memory_efficient_fp16")
