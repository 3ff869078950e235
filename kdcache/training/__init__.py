"""What co-finetuning and distillation share.

The loop on accelerate, optimizer and schedule, seeds, checkpoints, inference, the metrics file.
"""
