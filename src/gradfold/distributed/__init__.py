"""Several processes that train one model: their collectives, DistributedDataParallel, and fully_shard."""
