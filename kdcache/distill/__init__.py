"""The distill stage: it brings loader, method and student together, trains, and writes the results."""
