"""How the rows of a layer become bytes and come back.

``base`` is the seam, ``registry`` finds the formats, and every other module is one storage format, but for
``projection`` and ``selection``, which say what a row is before it is stored. Torch is imported when a device is used,
never with a module of this package: the cache reads and checks blocks without it.
"""
