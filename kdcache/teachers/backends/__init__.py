"""Backends that run a teacher: PyTorch, or ONNX Runtime on a graph exported here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kdcache.errors import ModelError
from kdcache.teachers.backends.base import TeacherBackend, TeacherOutput

if TYPE_CHECKING:
    from kdcache.teachers.teacher import Teacher

__all__ = ["TeacherBackend", "TeacherOutput", "open_backend"]


def open_backend(
    kind: str, teacher: Teacher, layers: Sequence[int], *, precision: str, work_dir: Path, max_length: int | None = None
) -> TeacherBackend:
    """A backend for ``teacher`` that can return ``layers``; exported graphs are stored in ``work_dir``.

    With a ``precision`` such as ``bf16+float32-head``, adapter, pooling and prediction run in float32; with one such as
    ``float32+compiled`` the encoder runs as graphs of torch.compile, for texts of up to ``max_length`` tokens (by
    default that of the teacher).

    Raises ModelError for a layer that the teacher lacks, an unknown kind, or a precision that the kind lacks.
    """
    for layer in layers:
        if not 0 <= layer <= teacher.depth:
            raise ModelError(f"teacher '{teacher.name}' has no layer {layer}: its layers are 0 to {teacher.depth}")
    if kind == "torch":
        from kdcache.teachers.backends.torch_backend import TorchBackend

        return TorchBackend(teacher, precision=precision, max_length=max_length)
    if kind == "onnxruntime":
        from kdcache.teachers.backends.onnx_backend import OnnxBackend

        return OnnxBackend(teacher, precision=precision, work_dir=work_dir)
    raise ModelError(f"there is no teacher backend '{kind}'; expected torch or onnxruntime", "Set dump.backend.")
