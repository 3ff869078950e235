"""The command line: one module per command.

Each reads flags and a recipe, calls a stage and prints; none knows the trade.

Nothing heavy is imported at module level, so that ``kdcache --help`` and the cache commands answer at once.
"""
