"""Where the time of a training update goes, by part of the model and of fairseq.

    python -m benchmarks.speed.step_profile --task lm --data BIN --csv FILE

The updates are those of `benchmarks.speed.training`. A part's time is that of its forward and
backward pass without the parts inside it, so that the parts of a model add up to its update. The
forward pass is timed by hooks around modules, the backward pass by hooks on their inputs and
outputs, which autograd calls in the reverse order of the forward pass; on a CPU an op has ended
when the next one begins. The models take turns, and medians over the rounds are reported.

The parts:

- `data`: collating a batch from the binarised text, without worker processes.
- `embedding`: the words' and positions' vectors, and their gradient.
- `n-grams`: the tables of `--memory-ngram`.
- `attention`: with its projections, or the look-ups in their place.
- `FFN`: the two matrices of a dense FFN.
- `gate`, `experts` and `dispatch`: the parts of an MoE layer; `dispatch` is what is left of it.
- `look-ups`: those in the place of an FFN.
- `norms and residuals`: what is left of the encoder and decoder, activations and dropout included.
- `loss`: the output layer and the criterion.
- `optimizer`: zeroing and clipping gradients, and the steps of Adam.
- `fairseq`: what is left of an update, logging included.
"""

import argparse
import dataclasses
import itertools
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from fairseq.criterions import FairseqCriterion
from fairseq.models import FairseqDecoder, FairseqEncoder
from fairseq.modules import MultiheadAttention, SinusoidalPositionalEmbedding
from torch import Tensor, nn

from benchmarks.speed.timing import append, interleave, machine
from benchmarks.speed.training import ARITHMETIC, Run, add_arguments, our_run, stock_run
from fairseq_evomoe.criterions.output_loss import OutputLossMixin
from fairseq_evomoe.memory.attention import MemoryAttention
from fairseq_evomoe.memory.layer import MemoryFFN
from fairseq_evomoe.memory.ngrams import NgramTables
from fairseq_evomoe.modules.moe_layer import EvoMoELayer

FIELDS = (
    "task case arithmetic part ms share_of_update rounds width threads device torch date"
).split()
REST = "norms and residuals"
PARTS = (
    *("data", "embedding", "n-grams", "attention", "FFN", "gate", "experts", "dispatch"),
    *("look-ups", REST, "loss", "optimizer", "fairseq"),
)
CLASSES: tuple[tuple[tuple[type, ...], str], ...] = (
    ((nn.Embedding, SinusoidalPositionalEmbedding), "embedding"),
    ((NgramTables,), "n-grams"),
    ((MultiheadAttention, MemoryAttention), "attention"),
    ((EvoMoELayer,), "dispatch"),
    ((MemoryFFN,), "look-ups"),
    ((FairseqEncoder, FairseqDecoder), REST),
    ((FairseqCriterion,), "loss"),
)
"""Classes of modules -> part. A module within another one of the same part changes nothing."""


class Clock:
    """Adds up the time of parts, each without the parts inside it.

    Args:
        now: a function that returns seconds.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self.seconds: dict[str, float] = defaultdict(float)
        self._parts: list[tuple[str, bool]] = []
        self._last = now()

    def _charge(self) -> None:
        now = self._now()
        self.seconds[self._parts[-1][0] if self._parts else "fairseq"] += now - self._last
        self._last = now

    def _close(self) -> None:
        """A part whose end nothing tells of ends when anything else happens."""
        while self._parts and self._parts[-1][1]:
            self._parts.pop()

    def enter(self, part: str, *, ends: bool = True) -> None:
        """A part begins; without `ends`, nothing will tell of its end."""
        self._charge()
        self._close()
        self._parts.append((part, not ends))

    def leave(self, part: str) -> None:
        """The innermost part of this name has ended, and those inside it."""
        self._charge()
        names = [name for name, _ in self._parts]
        if part in names:
            del self._parts[len(names) - 1 - names[::-1].index(part) :]

    def read(self) -> dict[str, float]:
        """The seconds of all parts since the last reading."""
        self._charge()
        found, self.seconds = dict(self.seconds), defaultdict(float)
        return found


def tensors(value: Any) -> Iterator[Tensor]:
    """The tensors with a gradient in nested arguments or results."""
    if isinstance(value, Tensor):
        if value.requires_grad:
            yield value
    elif isinstance(value, dict):
        yield from tensors(list(value.values()))
    elif dataclasses.is_dataclass(value):
        yield from tensors([getattr(value, f.name) for f in dataclasses.fields(value)])
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors(item)


def watch(
    module: nn.Module, part: str, clock: Clock, *, begins: bool = True, then: str = ""
) -> None:
    """Charge the time of a module to a part, forward and backward.

    Args:
        begins: whether the module's backward pass begins with the gradient of its result; that of a
            criterion begins with the whole.
        then: part that begins in the backward pass where the module's ends.
    """
    has_input: list[bool] = []

    def end(_: Tensor) -> None:
        clock.leave(part)
        if then:
            clock.enter(then)

    def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
        clock.enter(part)
        first = next(tensors([args, kwargs]), None)
        has_input.append(first is not None)
        if first is not None and torch.is_grad_enabled():
            first.register_hook(end)

    def after(module: nn.Module, args: tuple, kwargs: dict, result: Any) -> None:
        # a stack ends with the whole pass
        ends, begun = has_input.pop() or part == REST, []

        def begin(_: Tensor) -> None:
            if not begun:
                begun.append(True)
                clock.enter(part, ends=ends)

        if torch.is_grad_enabled() and begins:
            for tensor in tensors(result):
                tensor.register_hook(begin)
        clock.leave(part)

    module.register_forward_pre_hook(before, with_kwargs=True)
    module.register_forward_hook(after, with_kwargs=True)


def timed(function: Callable, part: str, clock: Clock) -> Callable:
    """The function, whose time is charged to a part."""

    def call(*args: Any, **kwargs: Any) -> Any:
        clock.enter(part)
        try:
            return function(*args, **kwargs)
        finally:
            clock.leave(part)

    return call


class Profile:
    """A run whose updates are timed part by part."""

    def __init__(self, run: Run) -> None:
        self.run, self.clock = run, Clock()
        self.rounds: list[dict[str, float]] = []
        trainer = run.trainer
        # our criterions take the loss from the decoder's last states, if no hook is in their way
        self.stops_early = isinstance(trainer.criterion, OutputLossMixin)
        for root in (trainer.model, trainer.criterion):
            for name, module in root.named_modules():
                self._watch(name, module)
        # fairseq makes the optimizer when it is asked for first
        optimizer = trainer.optimizer
        optimizer.backward = timed(optimizer.backward, "loss", self.clock)
        for owner, name in (
            (optimizer, "step"),
            (trainer, "clip_grad_norm"),
            (trainer, "zero_grad"),
            (optimizer, "multiply_grads"),
        ):
            setattr(owner, name, timed(getattr(owner, name), "optimizer", self.clock))

    def _watch(self, name: str, module: nn.Module) -> None:
        if isinstance(module, EvoMoELayer):
            watch(module.gate, "gate", self.clock)
            watch(module.experts, "experts", self.clock)
        if name.endswith("output_projection") and not self.stops_early:
            watch(module, "loss", self.clock, then=REST)
        if name.endswith((".fc1", ".fc2")) and isinstance(module, nn.Linear):
            watch(module, "FFN", self.clock)
        for classes, part in CLASSES:
            if isinstance(module, classes):
                # fairseq's attention is a decoder too
                decodes = part == REST and isinstance(module, FairseqDecoder)
                begins = part != "loss" and (self.stops_early or not decodes)
                watch(module, part, self.clock, begins=begins)
                break

    def __call__(self) -> None:
        batches = self.run.epoch()
        start = time.perf_counter()
        for _ in itertools.islice(batches, len(self.run.batches)):
            pass
        data = time.perf_counter() - start
        self.clock.read()
        self.run()
        self.rounds.append({**self.clock.read(), "data": data})

    def milliseconds(self) -> dict[str, float]:
        """Part -> median time per update."""
        updates = len(self.run.batches)
        return {
            part: 1e3 * statistics.median(r.get(part, 0.0) for r in self.rounds) / updates
            for part in PARTS
        }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    parser.add_argument("--arithmetic", choices=ARITHMETIC, default="float32")
    args = parser.parse_args()
    if args.device != "cpu":
        parser.error("--device: hooks tell the time of a CPU alone; use torch.profiler on a GPU")
    torch.set_num_threads(args.threads)
    profiles = {"stock": Profile(stock_run(args))}
    for case in args.cases:
        profiles[case] = Profile(our_run(args, case, args.arithmetic))
    interleave(profiles, args.rounds)
    rows = []
    for case, profile in profiles.items():
        # the first round warms up
        del profile.rounds[0]
        found = profile.milliseconds()
        print(case, {k: round(v, 1) for k, v in found.items() if v}, flush=True)
        whole = sum(found.values())
        about = {"task": args.task, "case": case, "arithmetic": args.arithmetic}
        about |= {"rounds": args.rounds, "width": args.width, **machine()}
        rows += [
            {**about, "part": part, "ms": round(ms, 2), "share_of_update": round(ms / whole, 4)}
            for part, ms in found.items()
        ]
    append(args.csv, FIELDS, rows)


if __name__ == "__main__":
    main()
