"""How flags are declared and checked, and the values of those that have a fixed set of choices."""

from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any, Self

from fairseq.dataclass import FairseqDataclass
from fairseq.dataclass.constants import StrEnum


def option(default: Any, help: str, *, old_name: str | None = None) -> Any:
    """Declare a field of a configuration with its default and its help text.

    Args:
        old_name: a former name of the flag, which the command line still accepts.
    """
    return field(default=default, metadata={"help": help, "argparse_alias": old_name})


def values_of(choices: Any) -> list[str]:
    """The values of a class of choices, such as `Diversify`, as plain strings."""
    return [choice.value for choice in choices]


@dataclass
class Flags(FairseqDataclass):
    """Base class for flags that can be read from any configuration that fairseq passes."""

    @classmethod
    def from_args(cls, args: Any) -> Self:
        """Read the fields from a Namespace, DictConfig or TransformerConfig.

        A field that is missing there, or None, keeps its default. Choices become plain strings.
        """
        read = {f.name: getattr(args, f.name, None) for f in fields(cls) if f.name != "_name"}
        plain = {k: v.value if isinstance(v, Enum) else v for k, v in read.items()}
        return cls(**{k: v for k, v in plain.items() if v is not None})

    def given(self, flag: str) -> Any:
        """Return the value of a flag, given its name on the command line such as `--moe-freq`."""
        return getattr(self, flag[2:].replace("-", "_"))

    def need(self, ok: bool, flag: str, fix: str) -> None:
        """Raise an error about the value of a flag unless `ok` is true.

        Raises:
            ValueError: the message reads "FLAG VALUE: FIX".
        """
        if not ok:
            raise ValueError(f"{flag} {self.given(flag)}: {fix}")

    def need_choice(self, flag: str, choices: type[Enum]) -> None:
        """Raise an error about a flag whose value is none of its choices.

        The command line refuses such a value itself; this is for configurations made in Python.
        """
        names = values_of(choices)
        self.need(self.given(flag) in names, flag, f"choose one of {', '.join(names)}")


class ExpertType(StrEnum):
    """Values of `--moe-expert-type`."""

    ffn = "ffn"
    memory = "memory"


class WeightStorage(StrEnum):
    """Values of `--moe-expert-storage` and `--output-storage`."""

    trained = "trained"
    int8 = "int8"


class SecondExpert(StrEnum):
    """Values of `--moe-second-expert-policy`."""

    sampling = "sampling"
    random = "random"
    all = "all"


class ChoiceGroup(StrEnum):
    """Values of `--moe-choice-group`."""

    sentence = "sentence"
    batch = "batch"


class Combine(StrEnum):
    """Values of `--dts-combine`."""

    softmax = "softmax"
    raw = "raw"
    renorm = "renorm"
    straight = "straight"


class Noise(StrEnum):
    """Values of `--dts-noise`."""

    annealed = "annealed"
    gumbel = "gumbel"
    none = "none"


class Diversify(StrEnum):
    """Values of `--evo-diversify`."""

    drop = "drop"
    mask = "mask"
    noise = "noise"
    copy = "copy"


class TemperatureSchedule(StrEnum):
    """Values of `--dts-temperature-schedule`."""

    linear = "linear"
    exponential = "exponential"
    cosine = "cosine"


class CpuMatmul(StrEnum):
    """Values of `--cpu-matmul`."""

    auto = "auto"
    torch = "torch"
    onednn = "onednn"


class ExpertSave(StrEnum):
    """Values of `--expert-parallel-save`."""

    gathered = "gathered"
    sharded = "sharded"
