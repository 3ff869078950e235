"""The dump: each teacher runs once over the texts; soft labels and projected hidden states go to a cache.

``stage`` is the whole run, top to bottom; ``plan`` says beforehand what it will cost; what is stored is the
business of ``kdcache.codecs``.
"""
