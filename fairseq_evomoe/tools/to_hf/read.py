"""Read an exported folder back as a checkpoint of fairseq."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from fairseq_evomoe.tools import json_values
from fairseq_evomoe.tools.to_hf.weights import from_hf
from fairseq_evomoe.tools.to_hf.write import FORMAT, REST, WAY_BACK


def is_exported(folder: Path) -> bool:
    """Whether `evomoe-export --format hf` wrote a folder."""
    return (folder / WAY_BACK).is_file()


def restore(folder: Path) -> dict[str, Any]:
    """The checkpoint, exact to the bit where the weights have not been trained since.

    Raises:
        ValueError: the folder lacks what the way back needs, or holds something else.
    """
    if not is_exported(folder):
        raise ValueError(
            f"--from-hf {folder}: there is no {WAY_BACK}; copy it, and {REST} if there is one, "
            "from the folder that evomoe-export wrote"
        )
    way_back = json_values.read(folder / WAY_BACK)
    if way_back.get("format") != FORMAT:
        raise ValueError(f"{folder / WAY_BACK} is not of format {FORMAT!r}")
    config = json_values.read(folder / "config.json")
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        tensors.update(load_file(path))
    rest = load_file(folder / REST) if (folder / REST).is_file() else {}
    origin = {name: (ours, expert) for name, (ours, expert) in way_back["origin"].items()}
    model = from_hf(tensors, rest, origin, way_back["order"], config.get("tied") or {})
    return {**json_values.restored(way_back), "model": model, "extra_state": {}}
