"""Batches for a student.

Targets cached or live, aligned to its tokens, in an order that is a pure function of the seed.
"""
