"""Distillation methods, each declared in one file, and the parts that they use (docs/method.md).

A new method is one new file here with ``METHOD = Method(...)``; the registry finds it by the file's name.
"""
