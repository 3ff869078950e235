"""Teachers.

Encoders under a shared head or with a head of their own, their co-finetuning, and the backends that run them.
"""
