"""Batches for a student: targets cached or live, aligned to its tokens, in an order that is a pure function of the seed."""
