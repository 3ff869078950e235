"""The cache: what the teachers said, once, in files that zarr, pyarrow and any JSON reader can open. Torch-free.

The format is specified in ``docs/cache-format.md``. Heavy readers (pyarrow, safetensors) are imported where they are
used, so that ``kdcache cache info`` starts in a fraction of a second.
"""
