"""`evomoe-doctor`: say what this installation can do, and what to do about what is missing.

It prints what a bug report needs: versions, fairseq's compiled parts, the compiler, the processor's
features, which kernels are built and chosen, the devices and their kernels' self-checks. Then it
trains a tiny model for 20 updates on a text of its own, and compares the loss with the one that is
expected. The exit status is 1 if something that every user needs does not work.
"""

import argparse
import importlib
import json
import os
import platform
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from fairseq_evomoe.kernels import native, self_check
from fairseq_evomoe.kernels.experts import few_rows, gpu
from fairseq_evomoe.kernels.experts.values import ExpertWeights
from fairseq_evomoe.kernels.gate import gate, sums
from fairseq_evomoe.kernels.lookup import cpu
from fairseq_evomoe.kernels.lookup.lookup import lookup
from fairseq_evomoe.kernels.transformer import cpu as transformer_cpu
from fairseq_evomoe.kernels.transformer import matmul
from fairseq_evomoe.tools.checkpoint import command

FAIRSEQ = ("fairseq-fixed", "ve-fairseq")
"""Distributions of fairseq with which this package works; either will do."""

PACKAGES = (
    *("fairseq-evomoe", "torch", "numpy", "hydra-core", "omegaconf"),
    *("sacrebleu", "sentencepiece", "triton", "matplotlib", "safetensors"),
)
OPTIONAL = {
    "matplotlib": "pictures and pages: pip install 'fairseq-evomoe[plots]'",
    "safetensors": "evomoe-export: pip install 'fairseq-evomoe[export]'",
    "triton": "kernels on GPUs: pip install triton",
}
COMPILED = ("data_utils_fast", "token_block_utils_fast")
UPDATES = 20
EXPECTED, TOLERANCE = 5.45, 0.1
"""Loss in bits of the last update on a CPU in float32, and how far it may be off elsewhere."""


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        what: what was looked at.
        found: what there is.
        advice: what to do if something is missing; "" if all is well.
        needed: whether nothing works without it.
    """

    what: str
    found: str
    advice: str = ""
    needed: bool = False

    def __str__(self) -> str:
        mark = "ok" if not self.advice else ("BAD" if self.needed else "--")
        line = f"{mark:<4}{self.what}: {self.found}"
        return f"{line}\n      -> {self.advice}" if self.advice else line


def fairseq() -> Finding:
    """Which distribution of fairseq is installed."""
    for name in FAIRSEQ:
        try:
            return Finding("fairseq", f"{version(name)} ({name})")
        except PackageNotFoundError:
            pass
    return Finding("fairseq", "not installed", f"pip install {FAIRSEQ[0]}", needed=True)


def packages() -> Iterator[Finding]:
    """Versions of what this package uses."""
    yield Finding("python", f"{platform.python_version()} on {platform.platform()}")
    yield fairseq()
    for name in PACKAGES:
        try:
            # torch's own version names the build, such as +cpu or +cu130
            yield Finding(name, torch.__version__ if name == "torch" else version(name))
        except PackageNotFoundError:
            advice = OPTIONAL.get(name, f"pip install {name}")
            yield Finding(name, "not installed", advice, needed=name not in OPTIONAL)
    for name in COMPILED:
        try:
            importlib.import_module(f"fairseq.data.{name}")
            yield Finding(f"fairseq.data.{name}", "compiled")
        except ImportError as error:
            advice = "reinstall fairseq-fixed with a C++ compiler: pip install --force-reinstall "
            advice += "--no-build-isolation fairseq-fixed"
            yield Finding(f"fairseq.data.{name}", str(error), advice, needed=True)


def processor() -> Iterator[Finding]:
    """The processor, the compiler and the kernels for CPUs."""
    try:
        info = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        names = re.findall(r"model name\s*: (.*)", info)
        flags = re.search(r"flags\s*: (.*)", info)
        features = set(flags[1].split()) if flags else set()
    except OSError:
        names, features = [platform.processor()], set()
    wide = [f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f in features]
    yield Finding("processor", f"{(names or ['unknown'])[0]}, {os.cpu_count()} threads")
    yield Finding("vector units", ", ".join(wide) or "none of AVX2, AVX-512, AMX")
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    advice = "" if compiler else "install one (Debian: apt-get install g++) or set CXX"
    yield Finding("C++ compiler", compiler or "none", advice)
    for name, reason, isa in (
        ("look-ups on CPUs", cpu.unavailable(), cpu.isa),
        ("experts for few tokens", few_rows.unavailable(), few_rows.isa),
        ("attention and loss", transformer_cpu.unavailable(), transformer_cpu.isa),
    ):
        advice = "torch serves instead, more slowly; the reason is above" if reason else ""
        found = reason.splitlines()[0] if reason else f"built, for {native.ISAS[isa()]}"
        yield Finding(name, found, advice)
    yield Finding("cache of kernels", str(native.cache_folder()))
    yield Finding("float32 products", f"by {matmul.choose('auto')}, as the line above says")


def devices() -> Iterator[Finding]:
    """CUDA devices, and whether their kernels pass their self-checks."""
    if not torch.cuda.is_available():
        yield Finding("CUDA", f"no device (torch {torch.__version__})")
        return
    nvcc = os.environ.get("NVCC") or shutil.which("nvcc")
    yield Finding("nvcc", nvcc or "none: look-ups of few rows are served by Triton")
    for index in range(torch.cuda.device_count()):
        memory = torch.cuda.get_device_properties(index).total_memory / 1e9
        name = torch.cuda.get_device_name(index)
        yield Finding(f"CUDA device {index}", f"{name}, {memory:.0f} GB")
        yield from checked_kernels(f"cuda:{index}")


def checked_kernels(device: str) -> Iterator[Finding]:
    """Use every kernel for GPUs once on a device, and report their self-checks."""
    z = torch.randn(40, 4, device=device)
    gate.top_k(z, 2)
    sums.routing_sums(z, z.softmax(-1), z > 0)
    shapes = ((4, 24, 16), (4, 24), (4, 16, 24), (4, 16))
    for dtype in (torch.float32, torch.bfloat16):
        weights = ExpertWeights(*(torch.zeros(s, device=device, dtype=dtype) for s in shapes))
        x = torch.zeros(40, 16, device=device, dtype=dtype)
        gpu.unsupported_products(x, weights, torch.relu, 0.0)
        tables = torch.zeros(2, 4, 8, device=device, dtype=dtype)
        lookup(z.view(40, 2, 2), tables, score="l1")
    for (kernel, where, kind), reason in self_check.results().items():
        if str(where) == str(torch.device(device)):
            advice = "torch serves instead; please report this line" if reason else ""
            name = f"{kernel}, {kind}".replace("torch.", "")
            yield Finding(name, reason or "passes its self-check", advice)


def corpus(folder: Path) -> None:
    """Write and binarise a text of random words, the same on every machine."""
    draw = random.Random(1)
    lines = (" ".join(f"w{draw.randint(0, 40)}" for _ in range(30)) for _ in range(200))
    (folder / "text").write_text("\n".join(lines) + "\n", encoding="utf-8")
    _run(
        *("fairseq_cli.preprocess", "--only-source", "--trainpref", folder / "text"),
        *("--validpref", folder / "text", "--destdir", folder / "bin", "--workers", 1),
    )


def _run(module: str, *flags: object) -> str:
    command = [sys.executable, "-m", module, *map(str, flags)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError((done.stdout + done.stderr)[-1500:])
    return done.stdout + done.stderr


def training() -> Iterator[Finding]:
    """Twenty updates of a tiny EvoMoE language model through all three stages."""
    what = f"training, {UPDATES} updates"
    plugin = Path(__file__).parents[1]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            corpus(folder)
            said = _run(
                *("fairseq_cli.train", folder / "bin", "--user-dir", plugin, "--cpu"),
                *("--task", "language_modeling_evomoe", "--arch", "transformer_lm_evomoe"),
                *("--decoder-embed-dim", 32, "--decoder-ffn-embed-dim", 64, "--decoder-layers", 2),
                *("--decoder-attention-heads", 2, "--moe-expert-count", 4, "--dropout", 0),
                *("--criterion", "moe_cross_entropy", "--tokens-per-sample", 32, "--seed", 1),
                *("--optimizer", "adam", "--lr", 5e-3, "--max-tokens", 512, "--num-workers", 0),
                *("--max-update", UPDATES, "--evo-spawn-update", 6, "--dts-anneal-updates", 6),
                *("--dts-hard-update", 12, "--cpu-matmul", "torch", "--no-save"),
                *("--disable-validation", "--log-format", "json", "--log-interval", 1),
            )
        except RuntimeError as error:
            yield Finding(what, str(error), "report this together with the lines above", True)
            return
    rows = [json.loads(x) for x in re.findall(r"\| train_inner \| (\{.*\})", said)]
    last = rows[-1]
    loss = float(last["loss"])
    found = f"loss {loss:.2f} bits, expected {EXPECTED} +- {TOLERANCE}; stage {last['moe_stage']}"
    good = abs(loss - EXPECTED) <= TOLERANCE and len(rows) == UPDATES and last["moe_stage"] == "2"
    advice = "" if good else "report this together with the lines above"
    yield Finding(what, found, advice, needed=True)


def run(args: argparse.Namespace) -> None:
    bad = 0
    for part in (packages, processor, devices, *(() if args.no_training else (training,))):
        for finding in part():
            print(finding, flush=True)
            bad += bool(finding.advice) and finding.needed
    if bad:
        raise ValueError(f"{bad} thing{'s' * (bad > 1)} that every user needs did not work")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    made.add_argument("--no-training", action="store_true", help="leave out the 20 updates")
    return made


def main(argv: Sequence[str] | None = None) -> None:
    command("evomoe-doctor", parser(), run, argv)


if __name__ == "__main__":
    main()
