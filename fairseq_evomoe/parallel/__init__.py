"""Expert parallelism: the experts of each layer shared out over workers, `--expert-parallel`."""
