"""Training speed of every gate in its last stage, side by side.

    python -m benchmarks.speed.gate_speed --task lm --data DIR \\
        --csv benchmarks/results/gate_speed.csv

What is timed is one update (forward, backward, Adam) of the model of `gates.py` on a fixed batch.
The gates take turns in every round, so that a busy moment of the machine affects all of them alike.
The median over the rounds is reported, and the median of each round's ratio to the dense model.
Evolving gates are timed in their hard stage, and StableMoE after its freeze. Routers are drawn at
unit scale, because a trained router spreads tokens over the experts and a fresh one does not.
"""

import argparse
from pathlib import Path

import torch
from fairseq import options, tasks, utils
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.optim import build_optimizer

from benchmarks import ROOT
from benchmarks.quality.tasks import GATES, TASKS, USER_DIR, flags_of, prepare
from benchmarks.speed.timing import append, interleave, machine, milliseconds, ratios
from fairseq_evomoe.tools.cost import costs, total

FIELDS = (
    "task gate tokens_per_s ratio_to_dense_p50 ratio_p20 ratio_p80 parameters mmacs_per_token "
    "experts rounds threads device torch date"
).split()


class Run:
    """A model with one gate, ready for repeated updates on one batch."""

    def __init__(self, task_name: str, gate: str, folder: Path) -> None:
        setup = TASKS[task_name]
        flags = flags_of(task_name, gate, 100)
        argv = [folder / "bin", "--user-dir", USER_DIR, *setup["flags"], "--optimizer", "adam"]
        argv += ["--moe-expert-count", setup["experts"], "--max-update", 100, "--cpu", *flags]
        parser = options.get_training_parser()
        args = options.parse_args_and_arch(parser, [str(a) for a in argv])
        cfg = convert_namespace_to_omegaconf(args)
        utils.set_torch_seed(1)
        self.task = tasks.setup_task(cfg.task)
        self.model = self.task.build_model(cfg.model).train()
        self.criterion = self.task.build_criterion(cfg.criterion)
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.parameters = sum(p.numel() for p in parameters)
        self.optimizer = build_optimizer(cfg.optimizer, parameters)
        for module in self.model.modules():
            if hasattr(module, "spawned"):
                module.spawned = True
                if hasattr(module.gate, "weight"):
                    torch.nn.init.normal_(module.gate.weight)
                if hasattr(module.gate, "freeze"):
                    module.gate.freeze()
        self.model.set_num_updates(10**6)
        # MACs of evaluation in the last stage, with half a sample of context
        hidden = dict.fromkeys(("encoder", "decoder"), 512)
        context = 64 if task_name == "lm" else 8
        self.macs = total(list(costs(self.model, context=context, hidden=hidden)))["total"]["macs"]
        self.task.load_dataset("train")
        batches = self.task.get_batch_iterator(
            self.task.dataset("train"), max_tokens=cfg.dataset.max_tokens, seed=1
        ).next_epoch_itr(shuffle=True)
        self.sample = next(iter(batches))
        self.tokens = self.sample["ntokens"]

    def update(self) -> None:
        self.optimizer.zero_grad()
        loss, size, _ = self.criterion(self.model, self.sample)
        (loss / size).backward()
        self.optimizer.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=TASKS, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--gates", nargs="+", choices=GATES, default=list(GATES))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=ROOT / "work/gates")
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    folder = prepare(args.task, args.data, args.out)
    names = ["dense", *(g for g in args.gates if g not in ("dense", "dts", "switch_evo"))]
    runs = {
        g: Run(args.task, g, folder) for g in names if (args.task, g) != ("lm", "expert_choice")
    }
    times = interleave({g: run.update for g, run in runs.items()}, args.rounds)
    rows = []
    for gate, run in runs.items():
        # the dense time over the gate's time is the ratio of the gate's speed to the dense speed
        speed = ratios(times, "dense", gate)
        rows.append(
            {
                "task": args.task,
                "gate": gate,
                "tokens_per_s": round(1e3 * run.tokens / milliseconds(times[gate])),
                **{k.replace("o_p50", "o_to_dense_p50"): v for k, v in speed.items()},
                "parameters": run.parameters,
                "mmacs_per_token": round(run.macs / 1e6, 3),
                "experts": TASKS[args.task]["experts"],
                "rounds": args.rounds,
                **machine(),
            }
        )
        print({k: rows[-1][k] for k in FIELDS[:7]})
    append(args.csv, FIELDS, rows)


if __name__ == "__main__":
    main()
