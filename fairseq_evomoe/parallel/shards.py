"""Experts in a folder beside the checkpoint, written by the workers that hold them.

`--expert-parallel-save sharded`, for models that no host can gather: torch.distributed.checkpoint
writes each expert's tensors as entries of their own, so any number of workers can read theirs. In
the place of a stacked tensor the checkpoint has a reference, a string. Who is not one of several
workers, fairseq-generate or a tool, gets the whole tensors read in.
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
from fairseq import checkpoint_utils
from torch import Tensor

from fairseq_evomoe.compat.wrapping import wrap
from fairseq_evomoe.parallel.mesh import Share

FOLDER = "expert_shards"
"""Key of `extra_state` with the name of the folder."""
_MARK = "expert-shards:"


def is_reference(value: Any) -> bool:
    """Whether a checkpoint's entry says where a tensor is, instead of being it."""
    return isinstance(value, str) and value.startswith(_MARK)


def reference(name: str) -> str:
    """What stands in a checkpoint for the stacked tensor `name`."""
    return _MARK + name


def new_folder(beside: Path, updates: int) -> str:
    """A name for the folder of one save, the same on all workers, that no earlier save has had.

    The first worker deletes what `remove_unused` finds before anyone knows the name: a folder that
    another worker has just made for this save is in no checkpoint yet, and would go with the rest.
    """
    name = [""]
    if dist.get_rank() == 0:
        remove_unused(beside)
        name = [f"experts-{updates}-{uuid.uuid4().hex[:8]}"]
    dist.broadcast_object_list(name, src=0)
    return name[0]


def write(folder: Path, parts: dict[str, tuple[Tensor, Share]]) -> None:
    """Write this worker's parts of stacked tensors; every worker of the group must call it."""
    # half a second to import, in every command, if it stood above
    from torch.distributed.checkpoint import FileSystemWriter, save

    entries = {
        f"{name}/{expert}": part[slot]
        for name, (part, share) in parts.items()
        for slot, expert in enumerate(share.slots)
    }
    group = next(iter(parts.values()))[1].mesh.group
    save(entries, storage_writer=FileSystemWriter(folder), process_group=group)


def read(folder: Path, name: str, experts: list[int] | None = None, total: int = 0) -> Tensor:
    """The entries of some experts of a stacked tensor, (len(experts), ...); None: of all.

    Args:
        total: how many there must be; 0: any number.

    Raises:
        ValueError: the folder is missing, lacks them, or is of another number of experts.
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
            f"{folder}: {name} is there for {count} experts; --moe-expert-count differs"
        )
    keys = [f"{name}/{e}" for e in experts]
    first: Any = known[keys[0]]
    stacked = torch.empty(len(keys), *first.size, dtype=first.properties.dtype)
    load(dict(zip(keys, stacked, strict=True)), storage_reader=reader, no_dist=True)
    return stacked


def own_part(value: Any, share: Share, shape: Sequence[int], *, split: bool) -> Any:
    """A checkpoint's entry -> this worker's share of it, if it is a whole stack or a reference.

    Args:
        value: any entry; a reference as `resolve` completes it.
        shape: of this worker's part.
        split: whether the checkpoint is of a time after the split.
    """
    if is_reference(value):
        folder, _, name = value.removeprefix(_MARK).rpartition("#")
        experts = share.slots if split else [0, *share.slots[1:]]
        return read(Path(folder), name, experts, share.total)
    if isinstance(value, Tensor) and value.shape == (share.total, *shape[1:]):
        return share.local(value, split=split)
    return value


def _changed(tree: Any, change: Callable[[str], Any]) -> Any:
    if isinstance(tree, dict):
        return {k: _changed(v, change) for k, v in tree.items()}
    return change(tree) if is_reference(tree) else tree


def resolve(state: dict[str, Any], beside: Path, *, whole: bool) -> dict[str, Any]:
    """A checkpoint with its references completed, or (`whole`) replaced by the tensors.

    Args:
        state: as read from a file.
        beside: folder of that file.

    Raises:
        ValueError: as `read`.
    """
    extra = state.get("extra_state") or {}
    if FOLDER not in extra:
        return state
    # a name, not a path: what a checkpoint says may not lead elsewhere
    folder = beside.absolute() / Path(extra[FOLDER]).name

    def change(value: str) -> Any:
        name = value.removeprefix(_MARK)
        return read(folder, name) if whole else f"{_MARK}{folder}#{name}"

    changed = {k: v if k in ("cfg", "args") else _changed(v, change) for k, v in state.items()}
    if whole:
        changed["extra_state"] = {k: v for k, v in changed["extra_state"].items() if k != FOLDER}
    return changed


_BY_SHARE: ContextVar[bool] = ContextVar("by_share", default=False)


@contextmanager
def each_reads_its_own() -> Iterator[None]:
    """Within, checkpoints keep references, for workers that read their experts themselves."""
    token = _BY_SHARE.set(True)
    try:
        yield
    finally:
        _BY_SHARE.reset(token)


def install() -> None:
    """Let fairseq read checkpoints whose experts are in a folder beside them."""

    def make(original: Callable) -> Callable:
        def load_checkpoint_to_cpu(path: str, *args: Any, **kwargs: Any) -> Any:
            state = original(path, *args, **kwargs)
            return resolve(state, Path(path).parent, whole=not _BY_SHARE.get())

        return load_checkpoint_to_cpu

    wrap(checkpoint_utils, "load_checkpoint_to_cpu", make)


def remove_unused(folder: Path) -> None:
    """Delete the folders of experts that no checkpoint in `folder` refers to any more."""
    found = [p for p in folder.glob("experts-*-*") if p.is_dir()]
    if not found:
        return
    used = set()
    for path in folder.glob("*.pt"):
        try:
            # maps the file: only what stands in it for tensors is read
            state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except Exception:
            # not known what it refers to: keep everything
            return
        used.add((state.get("extra_state") or {}).get(FOLDER))
    for path in found:
        if path.name not in used:
            shutil.rmtree(path)
