"""The dump: each teacher runs once over the texts; soft labels and projected hidden states go to a cache.

``stage`` is the whole run, top to bottom. ``dry_run`` says what a run will cost, ``plan`` which storage formats fit a
budget. ``extend`` and ``next_version`` add to a cache, ``audit`` compares it with live teachers.
"""
