"""All flags of the models and tasks, as typed dataclasses that fairseq turns into options.

Each flag is declared once. `MoEConfig` belongs to the models and says what a layer is;
`EvolutionConfig` belongs to the tasks and says what happens when. The field `moe_freq` is the flag
`--moe-freq`, and so on.
"""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Optional

from fairseq.dataclass import FairseqDataclass
from omegaconf import II

from fairseq_evomoe.options import (
    ChoiceGroup,
    Combine,
    CpuMatmul,
    Diversify,
    ExpertSave,
    ExpertType,
    Flags,
    Noise,
    SecondExpert,
    TemperatureSchedule,
    WeightStorage,
    option,
)

logger = logging.getLogger(__name__)


@dataclass
class MoEConfig(Flags):
    """Which layers are MoE layers, what their experts are, and how the gate chooses."""

    moe_freq: int = option(
        0, "every n-th layer of the encoder and of the decoder is an MoE layer; 0 means none"
    )
    encoder_moe_freq: int = option(
        0, "like --moe-freq, but for the encoder; the larger of the two values applies"
    )
    decoder_moe_freq: int = option(
        0, "like --moe-freq, but for the decoder; the larger of the two values applies"
    )
    moe_expert_count: int = option(0, "number of experts in each MoE layer")
    moe_expert_ffn_dim: Optional[int] = option(
        None, "hidden width of an expert; by default that of the dense FFN"
    )
    moe_expert_type: ExpertType = option(
        "ffn",
        "kind of expert: ffn, or memory (look-up layers, see --memory-*)",
        old_name="--expert-type",
    )
    moe_expert_storage: WeightStorage = option(
        "trained",
        "how experts' matrices are stored: trained, or int8 as evomoe-export --experts writes them",
    )
    output_storage: WeightStorage = option(
        "trained",
        "how the decoder's output layer is stored: trained, or int8 as evomoe-export "
        "--output-layer writes it",
    )
    moe_gate: str = option(
        "dts", "gate: dts, dense, switch, gshard, topk, base, hash, stable or expert_choice"
    )
    moe_shared_expert: bool = option(
        False,
        "keep the base expert active for every token, beside the --moe-expert-count routed ones; "
        "the output is the mean of the base expert's and the routed experts' output",
    )
    moe_top_k: int = option(2, "number of experts per token with --moe-gate topk")
    moe_gate_init_std: float = option(0.02, "standard deviation of the gate's initial weights")
    moe_gate_token_bias: Optional[float] = option(
        None,
        "dts, dense, switch, gshard, topk, base: add a learned bias of the token id to the logits, "
        "so that the same word tends to the same experts; this is the standard deviation of its "
        "initial values. With dts the bias is phased in as the gate cools. The default is 0, which "
        "means no bias, and 3 in causal language models with dts",
    )
    moe_capacity_factor: Optional[float] = option(
        None,
        "switch, gshard: during training an expert takes at most this many times its even part of "
        "the tokens, and the tokens beyond that bypass it; by default there is no limit",
    )
    moe_batch_prioritized_routing: bool = option(
        False,
        "with a capacity limit, experts take the tokens in order of falling gate probability "
        "instead of position",
    )
    moe_second_expert_policy: SecondExpert = option(
        "sampling",
        "gshard, during training: the second expert is sampled from the softmax over the others "
        "(sampling), or it is the runner-up, taken with probability 2 p (random) or always (all)",
    )
    moe_normalize_gate_prob_before_dropping: bool = option(
        False,
        "gshard: normalise the two weights to sum to 1 before the capacity drops pairs, instead of "
        "afterwards",
    )
    moe_balance_bias: float = option(
        0.0,
        "dts, switch, topk, gshard: balance the load without a loss. Experts are chosen by logit "
        "plus a bias per expert, and after each update every bias moves by this much towards even "
        "load; 0 turns this off, 0.001 is usual",
    )
    moe_hash_mapping: str = option(
        "balanced",
        "hash: which expert a token goes to: balanced (by the dictionary's counts), random, or a "
        "JSON file {token: expert}",
    )
    moe_choice_experts: float = option(1.0, "expert_choice: mean number of experts per token")
    moe_choice_group: ChoiceGroup = option(
        "sentence",
        "expert_choice: experts choose among the tokens of each sentence (sentence) or of the "
        "whole batch (batch)",
    )
    stable_distill_dim: int = option(
        50,
        "stable: width of the word embeddings of the distilled router",
        old_name="--moe-distill-dim",
    )
    moe_balance_all_ranks: bool = option(
        False,
        "compute the balance loss from each expert's load over all workers, not over this one only",
    )
    dts_threshold: Optional[float] = option(
        None,
        "dts: an expert is active if its probability is at least this multiple of the uniform "
        "probability 1/E; the default is 0.2. With --dts-parity the value is the probability "
        "itself, and the default is 0.001",
    )
    dts_max_experts: Optional[int] = option(
        None, "dts: largest number of experts per token; by default there is no limit"
    )
    dts_combine: Combine = option(
        "softmax",
        "dts: combine weights over the active experts: softmax (clean softmax of the logits), raw "
        "(noisy tempered probability p), renorm (p, normalised to sum to 1), or straight (like "
        "renorm, but with the gradient of p when only one expert is active)",
    )
    dts_noise: Optional[Noise] = option(
        None,
        "dts: noise on the logits during training: annealed (Gumbel noise that fades to zero with "
        "the temperature), gumbel (at full strength to the end, as in the paper) or none. The "
        "default is annealed, and gumbel with --dts-parity",
    )
    dts_top_k: int = option(1, "dts: number of experts per token in the hard stage")
    dts_parity: bool = option(
        False,
        "dts: follow the official code, which has an absolute threshold of 0.001, no "
        "renormalisation, weights from --dts-combine softmax or raw, and top-1 in evaluation",
    )
    # flags of the older MoE branch: each is honoured or refused, and none is ignored
    moe_top1_expert: bool = option(False, "the older branch's name for --moe-gate switch")
    moe_gating_use_fp32: bool = option(
        False, "accepted without effect, since the gate always computes in fp32"
    )
    use_moe_pad_mask: bool = option(False, "accepted without effect, since padding is never routed")
    moe_eval_capacity_token_fraction: float = option(
        -1.0, "accepted if it is negative, since evaluation drops no token"
    )

    def freq(self, side: str) -> int:
        """Frequency of MoE layers on one side, "encoder" or "decoder"; 0 means none."""
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
        relative = 0.2 if self.dts_threshold is None else self.dts_threshold
        return relative / self.moe_expert_count

    @property
    def noise(self) -> str:
        """The noise of the DTS gate: `--dts-noise` or its default."""
        return str(self.dts_noise or ("gumbel" if self.dts_parity else "annealed"))

    @property
    def token_bias(self) -> float:
        """Initial standard deviation of the token bias: `--moe-gate-token-bias` or its default."""
        return self.moe_gate_token_bias or 0.0

    def check(self, gates: Mapping[str, Any]) -> "MoEConfig":
        """Refuse values that cannot work, before anything is built.

        Args:
            gates: maps each name that `--moe-gate` accepts to its gate class, whose `check(cfg)`
                judges the flags of that gate.

        Raises:
            ValueError: the message names the flag and the fix.
        """
        if self.moe_top1_expert:
            self.need(
                self.moe_gate in ("dts", "switch"),
                "--moe-gate",
                "contradicts --moe-top1-expert, which means --moe-gate switch; drop one of the two",
            )
            self.moe_gate = "switch"
        self.need_choice("--output-storage", WeightStorage)
        for flag in ("--moe-freq", "--encoder-moe-freq", "--decoder-moe-freq"):
            self.need(self.given(flag) >= 0, flag, "must be 0 (none) or more")
        if self.freq("encoder") == 0 and self.freq("decoder") == 0:
            return self
        self.need(
            self.moe_expert_count >= 1, "--moe-expert-count", "give each MoE layer 1 expert or more"
        )
        self.need(
            self.moe_expert_ffn_dim is None or self.moe_expert_ffn_dim >= 1,
            "--moe-expert-ffn-dim",
            "give a width, or leave the flag out for the width of the dense FFN",
        )
        self.need_choice("--moe-expert-type", ExpertType)
        self.need_choice("--moe-expert-storage", WeightStorage)
        self.need(
            self.moe_expert_type == "ffn" or self.moe_expert_storage == "trained",
            "--moe-expert-storage",
            "memory experts have no such form",
        )
        self.need(
            self.moe_expert_type == "ffn" or self.moe_expert_ffn_dim is None,
            "--moe-expert-ffn-dim",
            "the hidden width of memory experts follows from --memory-bits and --memory-delta",
        )
        self.need(self.moe_gate in gates, "--moe-gate", f"choose one of {', '.join(gates)}")
        self.need(self.moe_gate_init_std >= 0, "--moe-gate-init-std", "must be >= 0")
        self.need(
            self.moe_capacity_factor is None or 0 < self.moe_capacity_factor < math.inf,
            "--moe-capacity-factor",
            "must be a number > 0; leave the flag out for no limit",
        )
        self.need(0 <= self.moe_balance_bias < math.inf, "--moe-balance-bias", "must be 0 or more")
        self.need(0 <= self.token_bias < math.inf, "--moe-gate-token-bias", "must be 0 or more")
        self.need(
            self.moe_eval_capacity_token_fraction < 0,
            "--moe-eval-capacity-token-fraction",
            "evaluation drops no token, because the result for a sentence would otherwise depend "
            "on the rest of its batch; leave the flag out or pass -1.0",
        )
        gate = gates[self.moe_gate]
        gate.check(self)
        self.need(
            self.moe_expert_count >= gate.min_experts(self),
            "--moe-expert-count",
            f"--moe-gate {self.moe_gate} needs {gate.min_experts(self)} experts or more",
        )
        return self


@dataclass
class SplitConfig(FairseqDataclass):
    """How the base expert is split into several experts."""

    evo_diversify: Diversify = option(
        "drop", "how copies of the base expert are made different: drop, mask, noise or copy"
    )
    evo_diversify_ratio: float = option(
        0.5,
        "fraction of the hidden units of each copy that drop re-initialises or mask sets to zero",
    )
    evo_diversify_noise: float = option(
        0.1,
        "noise: standard deviation of the added noise, relative to that of the weights themselves",
    )


@dataclass
class ParallelConfig(FairseqDataclass):
    """How the experts are distributed over workers."""

    expert_parallel: bool = option(
        False,
        "distribute the experts of each layer over the workers, instead of keeping all on each",
    )
    expert_parallel_size: Optional[int] = option(
        None,
        "number of neighbouring workers over which the experts are distributed; each further group "
        "of that many workers holds a copy of them. The default is the largest number that divides "
        "both the number of workers and --moe-expert-count",
    )
    expert_parallel_save: ExpertSave = option(
        "gathered",
        "with --expert-parallel: save one ordinary checkpoint (gathered), or save the experts in a "
        "folder beside it, written by the workers that hold them (sharded), for models that do not "
        "fit on one host",
    )


@dataclass
class EvolutionConfig(SplitConfig, ParallelConfig):
    """When the experts split and how the gate cools. It is part of every task's configuration."""

    evo_spawn_update: Optional[int] = option(
        None,
        "update at which the base expert splits into all experts. 0 means independent experts from "
        "the start. The default is a twentieth of --max-update with --moe-gate dts, otherwise 0",
    )
    dts_temperature_start: float = option(2.0, "softmax temperature of the gate at the split")
    dts_temperature_end: float = option(0.3, "softmax temperature of the gate after annealing")
    dts_temperature_schedule: TemperatureSchedule = option(
        "linear", "how the temperature falls: linear, exponential or cosine"
    )
    dts_anneal_updates: Optional[int] = option(
        None,
        "number of updates after the split over which the temperature falls; by default a tenth of "
        "--max-update",
    )
    dts_hard_update: Optional[int] = option(
        None,
        "update from which only the top-k experts are active; by default the end of annealing. An "
        "update beyond --max-update keeps the gate soft to the end",
    )
    stable_freeze_update: Optional[int] = option(
        None,
        "stable: update from which the distilled router is frozen and does the routing; by default "
        "a tenth of --max-update after the split. An update beyond --max-update never freezes it",
    )
    cpu_matmul: CpuMatmul = option(
        "auto",
        "who multiplies float32 matrices on a CPU: torch (its default), onednn, or auto, which "
        "measures and takes the faster one that is as exact",
    )
    max_update: int = II("optimization.max_update")
    seed: int = II("common.seed")
    train_subset: str = II("dataset.train_subset")
    ddp_backend: str = II("distributed_training.ddp_backend")
    zero_sharding: str = II("distributed_training.zero_sharding")
    write_checkpoints_asynchronously: bool = II("checkpoint.write_checkpoints_asynchronously")
    use_bmuf: bool = II("optimization.use_bmuf")
    cpu: bool = II("common.cpu")
    amp: bool = II("common.amp")
    fp16: bool = II("common.fp16")
    fp16_no_flatten_grads: bool = II("common.fp16_no_flatten_grads")
    memory_efficient_fp16: bool = II("common.memory_efficient_fp16")
