"""Experts in a folder beside the checkpoint, written by the workers that hold them.

`--expert-parallel-save sharded` is for models that no host can gather. torch.distributed.checkpoint
writes the tensors of each expert as separate entries, so that any number of workers can read their
experts. The checkpoint has a reference, which is a string, in place of each stacked tensor. A
single process (fairseq-generate, our tools) reads the whole tensors.
"""

import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fairseq_evomoe.parallel.mesh import Shard

FOLDER = "expert_shards"
"""Key of `extra_state` that holds the name of the folder."""
_MARK = "expert-shards:"


def is_reference(value: Any) -> bool:
    """Whether an entry of a checkpoint is a reference to a tensor instead of the tensor."""
    return isinstance(value, str) and value.startswith(_MARK)


def reference(name: str) -> str:
    """Return the reference that replaces the stacked tensor `name` in a checkpoint."""
    return _MARK + name


def new_folder(beside: Path, updates: int) -> str:
    """Return a new name for the folder of one save, the same on all workers.

    Rank 0 calls `remove_unused` before any worker knows the name. Otherwise it could delete a
    folder that another worker has just created for this save, since no checkpoint refers to that
    folder yet.
    """
    name = [""]
    if dist.get_rank() == 0:
        remove_unused(beside)
        name = [f"experts-{updates}-{uuid.uuid4().hex[:8]}"]
    dist.broadcast_object_list(name, src=0)
    return name[0]


def write(folder: Path, parts: dict[str, tuple[Tensor, Shard]]) -> None:
    """Write this worker's parts of stacked tensors. Every worker of the group must call it."""
    # at module level this import would cost every command half a second
    from torch.distributed.checkpoint import FileSystemWriter, save

    entries = {
        f"{name}/{expert}": part[entry]
        for name, (part, shard) in parts.items()
        for entry, expert in enumerate(shard.expert_ids)
    }
    group = next(iter(parts.values()))[1].mesh.group
    save(entries, storage_writer=FileSystemWriter(folder), process_group=group)


def read(folder: Path, name: str, experts: list[int] | None = None, total: int = 0) -> Tensor:
    """Read some experts' entries of a stacked tensor, (len(experts), ...).

    Args:
        experts: numbers of the experts to read, or None for all.
        total: number of experts that the folder must hold; 0 accepts any number.

    Raises:
        ValueError: the folder is missing, lacks the tensor, or holds another number of experts.
    """
    from torch.distributed.checkpoint import FileSystemReader, load

    reader = FileSystemReader(folder)
    try:
        known = reader.read_metadata().state_dict_metadata
    except OSError as error:
        raise ValueError(
            f"{folder} is missing: a checkpoint written with --expert-parallel-save sharded needs "
            "the folder of its experts beside it"
        ) from error
    count = sum(key.rpartition("/")[0] == name for key in known)
    experts = list(range(count)) if experts is None else experts
    if count == 0 or total not in (0, count):
        raise ValueError(
            f"{folder} holds {name} for {count} experts; give the --moe-expert-count of the run "
            "that wrote it"
        )
    keys = [f"{name}/{e}" for e in experts]
    first: Any = known[keys[0]]
    stacked = torch.empty(len(keys), *first.size, dtype=first.properties.dtype)
    load(dict(zip(keys, stacked, strict=True)), storage_reader=reader, no_dist=True)
    return stacked


def local_part(value: Any, shard: Shard, shape: Sequence[int], *, has_split: bool) -> Any:
    """Return this worker's shard of a checkpoint's entry.

    An entry that is neither a whole stacked tensor nor a reference is returned unchanged.

    Args:
        value: any entry; a reference must have been completed by `resolve`.
        shard: this worker's shard.
        shape: shape of this worker's part.
        has_split: whether the checkpoint dates from after the split.
    """
    if is_reference(value):
        folder, _, name = value.removeprefix(_MARK).rpartition("#")
        experts = shard.expert_ids if has_split else [0, *shard.expert_ids[1:]]
        return read(Path(folder), name, experts, shard.total)
    if isinstance(value, Tensor) and value.shape == (shard.total, *shape[1:]):
        return shard.local(value, has_split=has_split)
    return value


def _changed(tree: Any, change: Callable[[str], Any]) -> Any:
    if isinstance(tree, dict):
        return {k: _changed(v, change) for k, v in tree.items()}
    return change(tree) if is_reference(tree) else tree


def resolve(state: dict[str, Any], beside: Path, *, whole: bool) -> dict[str, Any]:
    """Add the folder to each reference in a checkpoint, or replace references by the tensors.

    Args:
        state: the checkpoint as read from a file.
        beside: folder of that file.
        whole: whether to replace the references by the tensors.

    Raises:
        ValueError: under the same conditions as in `read`.
    """
    extra = state.get("extra_state") or {}
    if FOLDER not in extra:
        return state
    # only the last component counts, so that a checkpoint cannot point to another place
    folder = beside.absolute() / Path(extra[FOLDER]).name

    def change(value: str) -> Any:
        name = value.removeprefix(_MARK)
        return read(folder, name) if whole else f"{_MARK}{folder}#{name}"

    changed = {k: v if k in ("cfg", "args") else _changed(v, change) for k, v in state.items()}
    if whole:
        changed["extra_state"] = {k: v for k, v in changed["extra_state"].items() if k != FOLDER}
    return changed


_KEEP: ContextVar[bool] = ContextVar("keep_references", default=False)


@contextmanager
def keeping_references() -> Iterator[None]:
    """Within, checkpoints keep their references, for workers that read their experts themselves."""
    token = _KEEP.set(True)
    try:
        yield
    finally:
        _KEEP.reset(token)


def keeps_references() -> bool:
    """Whether checkpoints that are read here keep their references."""
    return _KEEP.get()


def remove_unused(folder: Path) -> None:
    """Delete the folders of experts that no checkpoint in `folder` refers to any more."""
    found = [p for p in folder.glob("experts-*-*") if p.is_dir()]
    if not found:
        return
    used = set()
    for path in folder.glob("*.pt"):
        try:
            # mmap leaves the data of the tensors on disk
            state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except Exception:
            # it is unknown which folder this file refers to, so all are kept
            return
        used.add((state.get("extra_state") or {}).get(FOLDER))
    for path in found:
        if path.name not in used:
            shutil.rmtree(path)
