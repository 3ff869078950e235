"""Distillation: alignment across tokenizers, the loader of cached targets, losses, and the training of students."""
