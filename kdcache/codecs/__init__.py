"""Storage formats: how rows of hidden states are encoded to bytes and decoded.

``base`` is the seam and ``registry`` finds the formats. ``projection`` and ``token_selection`` compute the rows before
they are encoded. Every other module is one storage format. Torch is imported only when a device is used, never with a
module of this package: the cache reads and checks blocks without it.
"""
