"""The teacher as ONNX Runtime runs it, compared with PyTorch each time it is opened.

ONNX Runtime claims a GPU that it does not have and falls back without an error, so CUDA is asked for only where libcuda
loads, and only what the session itself reports is believed.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kdcache.errors import ModelError, NonFiniteError
from kdcache.teachers.backends.base import TeacherOutput
from kdcache.teachers.backends.onnx_export import OnnxTeacher, exported, parity_batch

if TYPE_CHECKING:
    from kdcache.teachers.teacher import Teacher

TOLERANCE = {"float32": 1e-4, "fp16": 3e-2}  # largest difference to torch in float32, relative to the largest value (at least 1)


class OnnxBackend:
    """Runs on CUDA where ONNX Runtime really has it, else on the CPU."""

    name = "onnxruntime"

    def __init__(self, teacher: Teacher, *, precision: str, work_dir: Path) -> None:
        if precision not in TOLERANCE:
            raise ModelError(
                f"the onnxruntime backend cannot run in {precision}; it runs in float32 or fp16",
                'Set dump.precision = "float32", or dump.backend = "torch".',
            )
        self.precision = precision
        self._teacher_name = teacher.name
        self._session = _open_session(teacher, precision, work_dir)
        self.device = "cuda" if "CUDAExecutionProvider" in self._session.get_providers() else "cpu"
        self._inputs = [node.name for node in self._session.get_inputs()]
        self._outputs = {node.name for node in self._session.get_outputs()}
        self._parity = self._check_parity(teacher)

    @property
    def record(self) -> Mapping[str, str]:
        import onnxruntime

        return {
            "device": self.device,
            "providers": " ".join(self._session.get_providers()),
            "onnxruntime": onnxruntime.__version__,
            "max_abs_difference_to_torch": f"{self._parity:.3e}",
        }

    def run(self, inputs: dict[str, Tensor], layers: Sequence[int], pooled: bool) -> TeacherOutput:
        wanted = ["logits", *(f"hidden_{layer}" for layer in layers)]
        with_pooled = pooled and "pooled" in self._outputs
        arrays = self._session.run(
            [*wanted, *(["pooled"] if with_pooled else [])], {name: inputs[name].cpu().numpy() for name in self._inputs}
        )
        tensors = [torch.from_numpy(array) for array in arrays]
        valid = inputs["attention_mask"].cpu().bool()
        hidden = {layer: tensors[1 + k][valid] for k, layer in enumerate(layers)}
        return TeacherOutput(tensors[0], tensors[-1] if with_pooled else None, hidden)

    def close(self) -> None:
        self._session = None

    def _check_parity(self, teacher: Teacher) -> float:
        """The largest absolute difference to torch over all outputs and valid tokens; ModelError beyond the tolerance."""
        batch = parity_batch(teacher)
        layers = range(teacher.depth + 1)
        ours = self.run(batch, layers, pooled=True)
        with torch.inference_mode():
            flat = list(OnnxTeacher(teacher.model.cpu().eval(), list(batch))(*batch.values()))
        valid = batch["attention_mask"].bool()
        theirs = [flat[0], *([] if ours.pooled is None else [flat[1]]), *(tensor[valid] for tensor in flat[-len(layers) :])]
        worst = 0.0
        for mine, reference in zip(
            [ours.logits, *([] if ours.pooled is None else [ours.pooled]), *ours.hidden.values()], theirs, strict=True
        ):
            if not bool(torch.isfinite(reference).all()):
                raise NonFiniteError(f"teacher '{self._teacher_name}' gives NaN or infinity, already on a made-up text")
            difference = float((mine - reference).abs().max())
            allowed = TOLERANCE[self.precision] * max(1.0, float(reference.abs().max()))
            if not difference <= allowed:
                raise ModelError(
                    f"teacher '{self._teacher_name}' differs between ONNX Runtime and PyTorch by {difference:.3g}; "
                    f"at most {allowed:.3g} is accepted in {self.precision}",
                    'Run this teacher with dump.backend = "torch".',
                )
            worst = max(worst, difference)
        return worst


def cuda_loads() -> bool:
    """Whether this machine has a CUDA driver, asked of the driver itself."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def _open_session(teacher: Teacher, precision: str, work_dir: Path) -> Any:
    """A session on the kept graph; a graph that does not load (cut short by a power failure, say) is exported again."""
    directory = exported(teacher, precision=precision, work_dir=work_dir)
    try:
        return _session(directory)
    except Exception:  # onnxruntime's own exceptions have no public base
        directory = exported(teacher, precision=precision, work_dir=work_dir, fresh=True)
    try:
        return _session(directory)
    except Exception as error:
        raise ModelError(
            f"ONNX Runtime cannot load the graph of teacher '{teacher.name}': {str(error).strip().splitlines()[0]}",
            'Run this teacher with dump.backend = "torch".',
        ) from error


def _session(directory: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only
    options.intra_op_num_threads = torch.get_num_threads()
    providers: list[Any] = ["CPUExecutionProvider"]
    if cuda_loads():
        onnxruntime.preload_dlls()
        providers.insert(0, ("CUDAExecutionProvider", {"use_tf32": "0"}))  # float32 means float32
    return onnxruntime.InferenceSession(str(directory / "model.onnx"), sess_options=options, providers=providers)
