"""Batches for a student: targets, cached or live, aligned to its tokens, in an order that the seed determines."""
