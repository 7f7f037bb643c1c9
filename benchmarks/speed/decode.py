"""Decoding speed of look-up and MoE language models, relative to a dense one of equal sizes.

    python -m benchmarks.speed.decode --width 512 --layers 6 --csv benchmarks/results/decode.csv

Tokens are fed one by one with fairseq's incremental state, as fairseq-generate does, to `--batch`
sequences at once. The MoE models have 8 experts in every second layer, one for each token. Weights
are random, which does not change the speed. All models take turns in every round. Weights that do
not fit into the processor's cache are read from memory for each token, as in any large model.
`parameters` counts the whole model (tensors of two or more dimensions). `mb_read_per_token` counts
the weights that one token needs, output layer included.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from fairseq import options, utils
from fairseq.data import Dictionary
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.tasks.language_modeling import LanguageModelingTask

from benchmarks import ROOT
from benchmarks.speed.timing import append, interleave, machine, milliseconds, ratios
from fairseq_evomoe.memory.layer import MemoryLayer
from fairseq_evomoe.modules.experts import ExpertBank
from fairseq_evomoe.modules.moe_layer import moe_layers
from fairseq_evomoe.modules.output_layer import Int8OutputLayer

FIELDS = (
    "case width layers ffn vocab batch tokens tokens_per_s ratio_p50 ratio_p20 ratio_p80 "
    "ms_per_token parameters mb_read_per_token threads device torch date"
).split()
FFN = ("--moe-freq", 0, "--memory-ffn")
BOTH = (*FFN, "--memory-attention")
OUTPUT = ("--output-storage", "int8")
SWITCH = ("--moe-freq", 2, "--moe-gate", "switch", "--moe-expert-count", 8)
CASES = {
    "dense": ("--moe-freq", 0),
    "dense, output int8": ("--moe-freq", 0, *OUTPUT),
    "memoryformer fp32": BOTH,
    "memoryformer bf16": (*BOTH, "--memory-tables", "bf16"),
    "memoryformer int8": (*BOTH, "--memory-tables", "int8"),
    "memoryformer and output int8": (*BOTH, "--memory-tables", "int8", *OUTPUT),
    "memory FFN fp32": FFN,
    "memory FFN int8": (*FFN, "--memory-tables", "int8"),
    "switch": SWITCH,
    "switch int8": (*SWITCH, "--moe-expert-storage", "int8"),
}


def build(case: str, args: argparse.Namespace, dictionary: Dictionary) -> torch.nn.Module:
    flags = ["unused", "--user-dir", ROOT / "fairseq_evomoe", "--task", "language_modeling"]
    flags += ["--arch", "transformer_lm_evomoe", "--decoder-normalize-before"]
    flags += ["--decoder-layers", args.layers, "--decoder-embed-dim", args.width]
    flags += ["--decoder-ffn-embed-dim", args.ffn, "--decoder-attention-heads", args.width // 64]
    flags += ["--share-decoder-input-output-embed", *CASES[case]]
    made = options.parse_args_and_arch(options.get_training_parser(), [str(f) for f in flags])
    cfg = convert_namespace_to_omegaconf(made)
    utils.set_torch_seed(1)
    task = LanguageModelingTask(cfg.task, dictionary, dictionary)
    model = task.build_model(cfg.model).eval()
    model.prepare_for_inference_(cfg)
    for _, layer in moe_layers(model):
        layer.set_split(True)
        # routers of unit scale spread the tokens, as trained ones do
        torch.nn.init.normal_(layer.gate.weight)
    return model


def bytes_read(model: torch.nn.Module) -> int:
    """Bytes of the weights that one token needs: one row of each table, all of each matrix."""
    total = 0
    for module in model.modules():
        if isinstance(module, MemoryLayer):
            t = module.tables
            total += t.size(0) * t.size(2) * t.element_size()
        elif isinstance(module, torch.nn.Linear | Int8OutputLayer):
            total += module.weight.numel() * module.weight.element_size()
        elif isinstance(module, ExpertBank):
            total += sum(w[0].numel() * w.element_size() for w in (module.w1, module.w2))
    return total


def decoder(model: torch.nn.Module, words: torch.Tensor) -> Callable[[], None]:
    def run() -> None:
        state: dict = {}
        with torch.inference_mode():
            for at in range(1, words.size(1) + 1):
                model.decoder(words[:, :at], incremental_state=state)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--ffn", type=int, help="FFN width of the dense model (default: 4 x width)")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--batch", type=int, default=1, help="sequences")
    parser.add_argument("--vocab", type=int, default=4000)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    args.ffn = args.ffn or 4 * args.width
    torch.set_num_threads(args.threads)
    dictionary = Dictionary()
    for i in range(args.vocab):
        dictionary.add_symbol(f"w{i}")
    names = ["dense", *(c for c in args.cases if c != "dense")]
    models = {c: build(c, args, dictionary) for c in names}
    words = torch.randint(4, args.vocab, (args.batch, args.tokens))
    times = interleave({c: decoder(m, words) for c, m in models.items()}, args.rounds)
    rows = []
    for case, model in models.items():
        ms = milliseconds(times[case]) / args.tokens
        rows.append(
            {
                **{"case": case, "width": args.width, "layers": args.layers, "ffn": args.ffn},
                **{"vocab": args.vocab, "batch": args.batch, "tokens": args.tokens},
                "tokens_per_s": round(1e3 * args.batch / ms, 1),
                **ratios(times, "dense", case),
                "ms_per_token": round(ms, 3),
                "parameters": sum(
                    t.numel() for t in (*model.parameters(), *model.buffers()) if t.dim() > 1
                ),
                "mb_read_per_token": round(bytes_read(model) / 1e6, 2),
                **machine(),
            }
        )
        print({k: rows[-1][k] for k in FIELDS[:13]}, flush=True)
    append(args.csv, FIELDS, rows)


if __name__ == "__main__":
    main()
