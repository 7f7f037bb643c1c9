"""The flags, each said once, as typed dataclasses that fairseq turns into command-line options.

`MoEConfig` belongs to the models (what a layer is), `EvolutionConfig` to the tasks (what happens
when). Field `moe_freq` is flag `--moe-freq`, and so on.
"""

from dataclasses import dataclass, field, fields
from typing import Any, Optional

from fairseq.dataclass import FairseqDataclass
from omegaconf import II


def _flag(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class MoEConfig(FairseqDataclass):
    """Where the MoE layers stand, what their experts are, and how the gate chooses."""

    moe_freq: int = _flag(0, "every n-th layer of encoder and decoder is an MoE layer; 0: none")
    encoder_moe_freq: int = _flag(0, "as --moe-freq, for the encoder; the larger of the two holds")
    decoder_moe_freq: int = _flag(0, "as --moe-freq, for the decoder; the larger of the two holds")
    moe_expert_count: int = _flag(0, "number of experts in each MoE layer")
    moe_expert_ffn_dim: int = _flag(0, "hidden width of an expert; 0: that of the dense FFN")
    moe_gate: str = _flag("dts", "gate: dts, dense, switch or topk")
    moe_top_k: int = _flag(2, "experts per token of --moe-gate topk")
    moe_gate_init_std: float = _flag(0.02, "standard deviation of the gate's initial weights")
    moe_balance_all_ranks: bool = _flag(
        False, "balance loss: average each expert's share of the load over all workers"
    )
    dts_threshold: Optional[float] = _flag(
        None,
        "dts: an expert is active while its probability is at least this share of the uniform "
        "probability 1/E, by default 0.2 (with --dts-parity: at least this probability, 0.001)",
    )
    dts_max_experts: int = _flag(0, "dts: at most this many experts per token; 0: no cap")
    dts_combine: str = _flag(
        "renorm",
        "dts combine weights: renorm (noisy tempered p, summing to 1 over the active experts), "
        "raw (p itself) or softmax (clean softmax of the logits)",
    )
    dts_noise: str = _flag(
        "annealed",
        "dts: noise on the logits while training: annealed (Gumbel, falling to nothing with the "
        "temperature), gumbel (at full strength to the end, as in the paper) or none",
    )
    dts_top_k: int = _flag(1, "dts: experts per token in the hard stage")
    dts_parity: bool = _flag(
        False,
        "dts: the official code's rule: absolute threshold 0.001, no renormalisation, weights from "
        "--dts-combine softmax or raw, top-1 in evaluation",
    )
    # flags of the older MoE branch: honoured or refused, never ignored
    moe_top1_expert: bool = _flag(False, "the older branch's name for --moe-gate switch")
    moe_gating_use_fp32: bool = _flag(False, "accepted: the gate always computes in fp32")
    use_moe_pad_mask: bool = _flag(False, "accepted: padding is never routed")
    moe_eval_capacity_token_fraction: float = _flag(
        -1.0, "accepted when negative: routing is dropless, in evaluation too"
    )

    @classmethod
    def from_args(cls, args: Any) -> "MoEConfig":
        """Read the fields from a Namespace, DictConfig or TransformerConfig; defaults elsewhere."""
        read = {f.name: getattr(args, f.name, None) for f in fields(cls) if f.name != "_name"}
        return cls(**{k: v for k, v in read.items() if v is not None})

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

    def check(self, gates: tuple[str, ...]) -> "MoEConfig":
        """Refuse what cannot work, before anything is built.

        Args:
            gates: names that `--moe-gate` may take.

        Raises:
            ValueError: names the flag and the fix.
        """

        def need(ok: bool, flag: str, fix: str) -> None:
            if not ok:
                name = flag[2:].replace("-", "_")
                raise ValueError(f"{flag} {getattr(self, name)}: {fix}")

        if self.moe_top1_expert:
            need(
                self.moe_gate in ("dts", "switch"),
                "--moe-gate",
                "contradicts --moe-top1-expert, which means --moe-gate switch; drop one of the two",
            )
            self.moe_gate = "switch"
        for flag in ("--moe-freq", "--encoder-moe-freq", "--decoder-moe-freq"):
            need(getattr(self, flag[2:].replace("-", "_")) >= 0, flag, "must be 0 (none) or more")
        if self.freq("encoder") == 0 and self.freq("decoder") == 0:
            return self
        need(
            self.moe_expert_count >= 1, "--moe-expert-count", "give each MoE layer 1 expert or more"
        )
        need(
            self.moe_expert_ffn_dim >= 0, "--moe-expert-ffn-dim", "give a width, or 0 for the FFN's"
        )
        need(self.moe_gate in gates, "--moe-gate", f"choose one of {', '.join(gates)}")
        need(
            1 <= self.moe_top_k <= self.moe_expert_count or self.moe_gate != "topk",
            "--moe-top-k",
            f"choose 1 to --moe-expert-count {self.moe_expert_count}",
        )
        need(self.moe_gate_init_std >= 0, "--moe-gate-init-std", "must be >= 0")
        need(
            0 <= self.threshold < 1, "--dts-threshold", "must be >= 0 and below a probability of 1"
        )
        need(
            0 <= self.dts_max_experts <= self.moe_expert_count,
            "--dts-max-experts",
            f"choose 1 to --moe-expert-count {self.moe_expert_count}, or 0 for no cap",
        )
        need(
            self.moe_gate != "dts" or 1 <= self.dts_top_k <= self.moe_expert_count,
            "--dts-top-k",
            f"choose 1 to --moe-expert-count {self.moe_expert_count}",
        )
        need(
            self.dts_combine in ("renorm", "raw", "softmax"),
            "--dts-combine",
            "choose renorm, raw or softmax",
        )
        need(
            self.dts_noise in ("gumbel", "annealed", "none"),
            "--dts-noise",
            "choose gumbel, annealed or none",
        )
        if self.dts_parity:
            need(
                self.dts_combine != "renorm",
                "--dts-combine",
                "--dts-parity never renormalises; choose softmax (the official default) or raw "
                "(the official --use-gumbel-gates)",
            )
            need(
                self.dts_top_k == 1 and self.dts_max_experts == 0,
                "--dts-top-k",
                "--dts-parity ends in top-1, uncapped: leave --dts-top-k 1, --dts-max-experts 0",
            )
            need(
                self.dts_noise == "gumbel",
                "--dts-noise",
                "--dts-parity keeps full noise; give --dts-noise gumbel",
            )
        need(
            self.moe_eval_capacity_token_fraction < 0,
            "--moe-eval-capacity-token-fraction",
            "routing is dropless, so no capacity can be honoured; leave the flag out or pass -1.0",
        )
        return self


@dataclass
class EvolutionConfig(FairseqDataclass):
    """When the experts split and how the gate cools: a part of every task's configuration."""

    evo_spawn_update: int = _flag(
        -1,
        "update at which the base expert splits into all; 0: independent experts from the start; "
        "-1: a tenth of --max-update",
    )
    evo_diversify: str = _flag(
        "mask", "how copies of the base expert are made different: mask, drop, noise or copy"
    )
    evo_diversify_ratio: float = _flag(
        0.2, "share of hidden units that mask silences, or drop re-initialises, in each copy"
    )
    evo_diversify_noise: float = _flag(
        0.1, "noise: standard deviation of what is added, in units of the weights' own"
    )
    dts_temperature_start: float = _flag(2.0, "softmax temperature of the gate at the split")
    dts_temperature_end: float = _flag(0.3, "softmax temperature of the gate after annealing")
    dts_temperature_schedule: str = _flag("linear", "linear, exponential or cosine")
    dts_anneal_updates: int = _flag(
        -1, "updates from the split over which the temperature falls; -1: half of --max-update"
    )
    dts_hard_update: int = _flag(
        -1, "update from which only the top-k experts stay; -1: when annealing ends; 0: never"
    )
    max_update: int = II("optimization.max_update")
    seed: int = II("common.seed")
    ddp_backend: str = II("distributed_training.ddp_backend")
