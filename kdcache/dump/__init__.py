"""The dump: each teacher runs once over the texts; soft labels and projected hidden states go to a cache.

``stage`` is the whole run, top to bottom; ``plan`` says beforehand what it will cost; ``projection`` and ``quantise`` are
the arithmetic of what is stored.
"""
