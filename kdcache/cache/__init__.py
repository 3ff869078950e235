"""The cache: teacher outputs in files that zarr, pyarrow and any JSON reader can open. It does not import torch.

The format is specified in ``docs/cache-format.md``. Heavy readers (pyarrow, safetensors) are imported where they are
used, so that ``kdcache cache info`` starts in a fraction of a second.
"""
