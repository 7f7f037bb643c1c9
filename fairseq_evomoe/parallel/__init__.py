"""Expert parallelism (`--expert-parallel`): each worker holds a shard of each layer's experts."""
