"""Short fine-tuning of a converted model: batches, load balance, loop, checkpoints."""
