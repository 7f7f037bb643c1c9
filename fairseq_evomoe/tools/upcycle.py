"""`evomoe-upcycle`: convert a dense checkpoint to a mixture of experts for further training.

Each chosen feed-forward network becomes the base expert of an MoE layer and is split, as at
`--evo-spawn-update` in the middle of a run (EvoMoE, arXiv 2112.14397; sparse upcycling, arXiv
2212.05055). The tool converts dense models of fairseq (transformer, transformer_lm, roberta) and of
this package (trained with `--moe-freq 0`). With `--evo-diversify copy` and a gate whose weights sum
to 1, the output does not change. Adam's moments are carried over: every copy gets those of the base
expert, and the gate's moments are zero. `--no-optimizer-state` leaves them out. With `--from-hf`
the dense model is one of transformers (`from_transformers`).
"""

import argparse
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from fairseq.dataclass.utils import gen_parser_from_dataclass
from torch import Tensor, nn
from tqdm import tqdm

from fairseq_evomoe.config import MoEConfig, SplitConfig
from fairseq_evomoe.modules.gates import GATES
from fairseq_evomoe.modules.moe_layer import moe_layers
from fairseq_evomoe.modules.plan import Phase
from fairseq_evomoe.modules.split import Split, SplitRule
from fairseq_evomoe.schedule import Stage
from fairseq_evomoe.tools.checkpoint import (
    build,
    built,
    command,
    command_line,
    flags_of,
    load,
    refuse_existing,
    target_model,
    with_flags,
    write,
)

CRITERIONS = {
    "CrossEntropyCriterion": "MoECrossEntropyCriterion",
    "LabelSmoothedCrossEntropyCriterion": "MoELabelSmoothedCrossEntropyCriterion",
    "MaskedLmLoss": "MoEMaskedLMCriterion",
}
_DENSE = {"w1": "fc1.weight", "b1": "fc1.bias", "w2": "fc2.weight", "b2": "fc2.bias"}


class Upcycled:
    """A dense model and the MoE model that is made from it.

    Args:
        dense: the dense model, with its weights.
        grown: the MoE model of the same sizes, freshly built. It receives the weights.
        rule, seed: how the experts are made different from each other.

    Raises:
        ValueError: the experts would not be FFNs.
    """

    def __init__(self, dense: nn.Module, grown: nn.Module, rule: SplitRule, seed: int) -> None:
        self.dense, self.grown = dense, grown
        # parameter of the MoE model -> (parameter of the dense model, split, short name)
        self.origin: dict[str, tuple[str, Split, str]] = {}
        layers = dict(moe_layers(grown))
        for name, layer in layers.items():
            layer.cfg.need(
                layer.cfg.moe_expert_type == "ffn",
                "--moe-expert-type",
                "only ffn experts can be upcycled",
            )
            split = layer.split(rule, seed=seed)
            parent = name.removesuffix("moe_layer")
            for short, old in _DENSE.items():
                self.origin[f"{name}.experts.{short}"] = (parent + old, split, short)
        self.layers = layers

    def weights(self) -> None:
        """Copy the dense model's weights into the MoE model and split the experts.

        Raises:
            ValueError: the experts would have another width than the dense network.
        """
        source = self.dense.state_dict()
        target = self.grown.state_dict()
        mine = tuple(f"{name}." for name in self.layers)
        for name, value in tqdm(target.items(), unit="tensor", disable=None):
            if name in self.origin:
                old, split, short = self.origin[name]
                if value.shape[1:] != source[old].shape:
                    raise ValueError(
                        f"--moe-expert-ffn-dim: {old} is {tuple(source[old].shape)}, but an expert "
                        f"would be {tuple(value.shape[1:])}; leave the flag out"
                    )
                value[0].copy_(source[old])
                split.weights_(short, value)
            elif not name.startswith(mine):
                value.copy_(source[name])

    def moments(self, state: dict[str, Any]) -> dict[str, Any]:
        """Return the dense model's optimizer state, rearranged for the MoE model.

        Raises:
            ValueError: the state has a layout that this tool does not know.
        """
        old = [(n, p) for n, p in self.dense.named_parameters() if p.requires_grad]
        new = [(n, p) for n, p in self.grown.named_parameters() if p.requires_grad]
        flat = len(state["state"]) == 1 < len(old)
        known = dict(_by_parameter(state["state"], old, flat))
        like = next(iter(known.values()))
        made = []
        for name, p in new:
            source, split, short = self.origin.get(name, (name, None, ""))
            if source in known:
                made.append(_split_moments(known[source], p, split, short))
            else:
                # the gate is new, so its moments are 0, as before the first gradient
                made.append(
                    {
                        k: torch.zeros_like(p, dtype=v.dtype) if _is_moment(v) else v
                        for k, v in like.items()
                    }
                )
        if flat:
            joined = {
                k: torch.cat([m[k].flatten() for m in made]) if _is_moment(v) else v
                for k, v in like.items()
            }
            return {**state, "state": {0: joined}}
        (group, *others) = state["param_groups"]
        if others:
            raise ValueError(
                "the optimizer has several parameter groups; upcycle with --no-optimizer-state"
            )
        groups = [{**group, "params": list(range(len(new)))}]
        return {**state, "state": dict(enumerate(made)), "param_groups": groups}


def _is_moment(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0


def _by_parameter(
    state: dict[int, dict[str, Any]], parameters: list[tuple[str, nn.Parameter]], flat: bool
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (name, optimizer state) of each parameter.

    `state` has one entry per parameter, or a single flat entry for all of them.
    """
    sizes = [p.numel() for _, p in parameters]
    expected = [sum(sizes)] if flat else sizes
    # Compare the set of numbers, not their order: entries are created at the first gradient.
    if set(state) != set(range(len(expected))) or any(
        v.numel() != size
        for i, size in enumerate(expected)
        for v in state[i].values()
        if _is_moment(v)
    ):
        raise ValueError(
            "the optimizer state does not fit the model's parameters; upcycle with "
            "--no-optimizer-state"
        )
    if not flat:
        yield from ((name, state[i]) for i, (name, _) in enumerate(parameters))
        return
    (whole,) = state.values()
    offset = 0
    for (name, p), size in zip(parameters, sizes, strict=True):
        part = slice(offset, offset + size)
        yield name, {k: v[part].view(p.shape) if _is_moment(v) else v for k, v in whole.items()}
        offset += size


def _split_moments(
    entry: dict[str, Any], p: nn.Parameter, split: Split | None, short: str
) -> dict[str, Any]:
    if split is None:
        return entry
    made = dict(entry)
    for key, value in entry.items():
        if _is_moment(value):
            made[key] = value[None].expand(p.shape).clone()
            split.moments_(short, made[key])
    return made


def upcycle(
    path: Path,
    moe: dict[str, Any],
    rule: SplitRule,
    *,
    seed: int,
    temperature: float,
    data: str | None = None,
    optimizer_state: bool = True,
) -> dict[str, Any]:
    """Convert the dense checkpoint at `path` to the checkpoint of a mixture of experts.

    Args:
        path: the dense checkpoint.
        moe: MoE flags, as in `MoEConfig`.
        rule, seed: how the experts are made different from each other.
        temperature: temperature of the DTS gate unless a schedule sets it.
        data: folder with the dictionaries. None means the folder named in the checkpoint.
        optimizer_state: whether to carry the optimizer state over.

    Raises:
        ValueError: the model cannot be upcycled; the message says why.
    """
    checkpoint = load(path)
    flags = flags_of(checkpoint)
    name = target_model(flags)
    dense, _, task = build(path, data)
    if moe_layers(dense):
        raise ValueError(f"{path} has experts already; give a dense checkpoint")
    flags = with_flags(flags, _name=name, arch=name, **moe)
    torch.manual_seed(seed)
    grown = task.build_model(built(flags), from_checkpoint=True)
    for _, layer in moe_layers(grown):
        layer.gate.check_ready()
    upcycled = Upcycled(dense, grown, rule, seed)
    upcycled.weights()
    history = checkpoint.get("optimizer_history") or [{}]
    updates = history[-1].get("num_updates", 0)
    for layer in upcycled.layers.values():
        layer.timeline.num_updates = updates
        layer.timeline.saved = Phase(stage=Stage.SPARSIFY, temperature=temperature)
        layer.set_split(True)

    checkpoint["model"] = grown.state_dict()
    checkpoint["cfg"]["model"] = flags
    optimizer = checkpoint.pop("last_optimizer_state", None)
    if optimizer and optimizer_state:
        checkpoint["last_optimizer_state"] = upcycled.moments(optimizer)
        criterion = history[-1].get("criterion_name")
        history[-1]["criterion_name"] = CRITERIONS.get(criterion, criterion)
    return checkpoint


def run(args: argparse.Namespace) -> None:
    refuse_existing(args.output)
    moe = MoEConfig.from_args(args)
    rule = SplitRule.from_flags(args)
    if not 0 < args.temperature < math.inf:
        raise ValueError(f"--temperature {args.temperature}: must be a number > 0")
    if not (moe.moe_freq or moe.encoder_moe_freq or moe.decoder_moe_freq):
        moe.moe_freq = 2
    if args.from_hf:
        moe.check(GATES)
        _convert(args)
    for name in ("dense", "source_lang", "target_lang", "drop_logits_bias"):
        if getattr(args, name) and not args.from_hf:
            raise ValueError(f"--{name.replace('_', '-')}: has no effect without --from-hf")
    flags = {k: v for k, v in vars(moe).items() if k != "_name"}
    flags["moe_gate_token_bias"] = moe.token_bias
    source = args.dense if args.from_hf else args.checkpoint
    checkpoint = upcycle(
        source,
        flags,
        rule,
        seed=args.seed,
        temperature=args.temperature,
        data=args.data,
        optimizer_state=args.optimizer_state,
    )
    write(checkpoint, args.output)
    kept = "last_optimizer_state" in checkpoint
    updates = (checkpoint.get("optimizer_history") or [{}])[-1].get("num_updates", 0)
    target = target_model(flags_of(checkpoint))
    if target == "transformer_lm_evomoe":
        # a new language model has a token bias by default, and the dense model has none
        moe.moe_gate_token_bias = moe.token_bias
    print(f"wrote {args.output}; to continue training, add to the dense run's flags:")
    print(
        f"  --user-dir fairseq_evomoe --task <its task>_evomoe --criterion moe_<its criterion> "
        f"--arch {target} <its sizes> {command_line(moe)} "
        + f"--restore-file {args.output} "
        + (f"--evo-spawn-update {updates}" if kept else "--evo-spawn-update 0 --reset-optimizer")
    )


def _convert(args: argparse.Namespace) -> None:
    """Make a dense checkpoint and its dictionaries of a folder for transformers."""
    if not args.data or not args.dense:
        raise ValueError(
            "--from-hf: give --data, a new folder for the dictionaries, and --dense, a new file "
            "for the dense checkpoint"
        )
    refuse_existing(Path(args.data))
    refuse_existing(args.dense)
    try:
        from fairseq_evomoe.tools import from_transformers
    except ModuleNotFoundError as error:
        raise ValueError(f"{error.name} is missing: pip install 'fairseq-evomoe[hf]'") from error
    pair = (args.source_lang, args.target_lang)
    languages = (str(pair[0]), str(pair[1])) if all(pair) else None
    found = from_transformers.read(args.checkpoint, languages, drop_bias=args.drop_logits_bias)
    write(from_transformers.dense_checkpoint(found, Path(args.data)), args.dense)
    print(f"wrote {args.dense}, the dense model, and {args.data}, its dictionaries")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], conflict_handler="resolve")
    made.add_argument("checkpoint", type=Path, help="dense checkpoint")
    hf = made.add_argument_group("dense models of transformers")
    hf.add_argument(
        "--from-hf",
        action="store_true",
        help="the checkpoint is a folder with a dense GPT-2 or Marian model for transformers",
    )
    hf.add_argument("--dense", type=Path, help="where to write it as a checkpoint of fairseq")
    hf.add_argument("--source-lang", help="language that a Marian model reads")
    hf.add_argument("--target-lang", help="language that it writes")
    hf.add_argument(
        "--drop-logits-bias",
        action="store_true",
        help="leave out Marian's bias of the output words, which fairseq does not have",
    )
    made.add_argument("--output", type=Path, required=True)
    made.add_argument(
        "--data", help="folder with the dictionaries; default: the folder named in the checkpoint"
    )
    made.add_argument("--seed", type=int, default=1)
    made.add_argument(
        "--temperature",
        type=float,
        default=2.0,
        help="temperature of the DTS gate until a schedule sets it",
    )
    made.add_argument("--no-optimizer-state", dest="optimizer_state", action="store_false")
    gen_parser_from_dataclass(made, SplitConfig(), with_prefix="")
    gen_parser_from_dataclass(made, MoEConfig(moe_expert_count=4), with_prefix="")
    return made


def main(argv: Sequence[str] | None = None) -> None:
    command("evomoe-upcycle", parser(), run, argv)


if __name__ == "__main__":
    main()
