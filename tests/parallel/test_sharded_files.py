"""Folders of experts beside checkpoints: no folder that a running save needs is deleted."""

import os
import time

import torch
import torch.distributed as dist

from fairseq_evomoe.compat.running import free_port
from fairseq_evomoe.parallel import sharded_files


def worker(rank, port, save_dir):
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    remove_unused = sharded_files.remove_unused

    def late(folder):
        time.sleep(0.5)
        remove_unused(folder)

    sharded_files.remove_unused = late
    try:
        folder = save_dir / sharded_files.new_folder(save_dir, 3)
        if rank == 1:
            folder.mkdir()
        dist.barrier()
    finally:
        dist.destroy_process_group()


def test_a_new_folder_outlives_the_cleaning(tmp_path):
    """Unreferenced folders are deleted before the new one has a name, even if deleting is slow."""
    (tmp_path / "experts-1-old").mkdir()
    (tmp_path / "experts-2-used").mkdir()
    torch.save(
        {"extra_state": {sharded_files.FOLDER: "experts-2-used"}}, tmp_path / "checkpoint_last.pt"
    )
    torch.multiprocessing.spawn(worker, (free_port(), tmp_path), nprocs=2)
    left = sorted(p.name for p in tmp_path.glob("experts-*"))
    assert len(left) == 2 and left[0] == "experts-2-used" and left[1].startswith("experts-3-")
