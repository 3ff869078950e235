"""What co-finetuning and distillation share: the loop on accelerate, optimizer and schedule, seeds, checkpoints, the metrics file."""
