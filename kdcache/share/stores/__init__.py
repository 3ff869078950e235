"""Where a team keeps its caches: a directory or an object store, behind one seam. Torch-free."""
