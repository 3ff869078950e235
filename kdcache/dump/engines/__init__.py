"""Where the work of a dump runs. A piece of work is one teacher over one part.

An engine decides which process runs a piece, and nothing else: what is run, how it is encoded and how it is written is
the code of ``kdcache.dump.run`` and ``kdcache.cache`` for all engines, so all give the same bytes
(docs/decisions/0027).

    shards    processes that share a disk, started by somebody else: a Slurm array, spot machines
    workers   processes that a driver gives work to, on a shared disk or with a remote
"""
