"""Runs a teacher with ONNX Runtime, and compares it with PyTorch whenever it is opened.

ONNX Runtime lists the GPU providers that it was built with, and falls back to the CPU without an error. So CUDA is
requested only if torch has it, and the device is the one that the session reports.

Inputs and outputs are tensors of torch on that device (IO binding), so hidden states are projected and encoded there.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from kdcache.cache.spec import FLOAT32_HEAD
from kdcache.data.encoding import encode, pad, padding_id
from kdcache.errors import ModelError, NonFiniteError, first_line
from kdcache.files import publish_directory, sync_tree
from kdcache.teachers.backends.base import TeacherOutput, packed, valid_places
from kdcache.teachers.backends.onnx_graph import write_graph
from kdcache.teachers.head import head_modules, in_float32

if TYPE_CHECKING:
    from kdcache.teachers.teacher import Teacher, TeacherModel


# largest difference from torch in float32, relative to the largest value (at least 1)
TOLERANCE = {"float32": 1e-4, "fp16": 3e-2, f"fp16{FLOAT32_HEAD}": 3e-2}


class OnnxBackend:
    """Runs on CUDA if the session of ONNX Runtime does, else on the CPU."""

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
        pooled = {"pooled": teacher.width if teacher.model.head is None else teacher.model.head.width}
        widths = {"logits": len(teacher.label_names), **pooled}
        self._widths = {node.name: widths.get(node.name, teacher.width) for node in self._session.get_outputs()}
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
        batch, tokens = inputs["input_ids"].shape
        shapes: dict[str, tuple[int, ...]] = {"logits": (batch,)}
        if pooled and "pooled" in self._widths:
            shapes["pooled"] = (batch,)
        shapes |= {f"hidden_{layer}": (batch, tokens) for layer in layers}
        found = self._bound(inputs, {name: (*shape, self._widths[name]) for name, shape in shapes.items()})
        places = valid_places(inputs["attention_mask"]).to(self.device)
        hidden = {layer: packed(found[f"hidden_{layer}"], places) for layer in layers}
        return TeacherOutput(found["logits"], found.get("pooled"), hidden)

    def _bound(self, inputs: dict[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
        """Run on tensors of the device; the outputs float32 of ``shapes`` stay there."""
        taken = {name: inputs[name].to(self.device).contiguous() for name in self._inputs}
        given = {name: torch.empty(shape, dtype=torch.float32, device=self.device) for name, shape in shapes.items()}
        binding = self._session.io_binding()
        for name, tensor in taken.items():
            binding.bind_input(name, self.device, 0, np.int64, tuple(tensor.shape), tensor.data_ptr())
        for name, tensor in given.items():
            binding.bind_output(name, self.device, 0, np.float32, tuple(tensor.shape), tensor.data_ptr())
        if self.device == "cuda":
            torch.cuda.current_stream().synchronize()  # ONNX Runtime has a stream of its own, and waits at its end
        self._session.run_with_iobinding(binding)
        return given

    def close(self) -> None:
        self._session = None

    def _check_parity(self, teacher: Teacher) -> float:
        """The largest absolute difference from torch over all outputs. Raises ModelError beyond the tolerance."""
        batch = _encode(teacher, _PARITY_TEXTS)
        layers = range(teacher.depth + 1)
        ours = self.run(batch, layers, pooled=True)
        with torch.inference_mode():
            flat = list(OnnxTeacher(teacher.model.cpu().eval(), list(batch))(*batch.values()))
        valid = batch["attention_mask"].bool()
        theirs = [
            flat[0],
            *([] if ours.pooled is None else [flat[1]]),
            *(tensor[valid] for tensor in flat[-len(layers) :]),
        ]
        worst = 0.0
        for mine, reference in zip(
            [ours.logits, *([] if ours.pooled is None else [ours.pooled]), *ours.hidden.values()], theirs, strict=True
        ):
            if not bool(torch.isfinite(reference).all()):
                raise NonFiniteError(f"teacher '{self._teacher_name}' gives NaN or infinity on a simple test sentence")
            difference = float((mine.cpu() - reference).abs().max())
            allowed = TOLERANCE[self.precision] * max(1.0, float(reference.abs().max()))
            if not difference <= allowed:
                raise ModelError(
                    f"teacher '{self._teacher_name}' differs between ONNX Runtime and PyTorch by {difference:.3g}; "
                    f"at most {allowed:.3g} is accepted in {self.precision}",
                    'Run this teacher with dump.backend = "torch".',
                )
            worst = max(worst, difference)
        return worst


def _open_session(teacher: Teacher, precision: str, work_dir: Path) -> Any:
    """A session on the stored graph; a graph that does not load is exported again."""
    directory = exported(teacher, precision=precision, work_dir=work_dir)
    try:
        return _session(directory)
    except Exception:  # onnxruntime's own exceptions have no public base
        directory = exported(teacher, precision=precision, work_dir=work_dir, fresh=True)
    try:
        return _session(directory)
    except Exception as error:
        raise ModelError(
            f"ONNX Runtime cannot load the graph of teacher '{teacher.name}': {first_line(error)}",
            'Run this teacher with dump.backend = "torch".',
        ) from error


def _session(directory: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only
    options.intra_op_num_threads = torch.get_num_threads()
    providers: list[Any] = ["CPUExecutionProvider"]
    with contextlib.redirect_stdout(sys.stderr):  # where ONNX Runtime prints what it misses; stdout is for results
        if torch.cuda.is_available():  # its tensors are the inputs and outputs
            onnxruntime.preload_dlls()
            providers.insert(0, ("CUDAExecutionProvider", {"use_tf32": "0"}))  # float32 means float32
        return onnxruntime.InferenceSession(str(directory / "model.onnx"), sess_options=options, providers=providers)


EXPORTER_VERSION = 2  # to be increased whenever the exported graph of a teacher changes

# the graph is traced with two texts, one of them padded; the parity check has another number of texts and other
# lengths, because a graph with fixed sizes fails there
_EXPORT_TEXTS = ("a plain sentence of ten or so words, with a comma", "a short one")
_PARITY_TEXTS = (
    "yes",
    "café, naïve: 3.14 — and now a longer sentence than any that the exporter saw " * 2,
    "no more than this",
)


class OnnxTeacher(nn.Module):
    """A teacher that takes tensors and returns a tuple: logits, pooled (if any), hidden states 0 to depth."""

    def __init__(self, model: TeacherModel, input_names: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self.input_names = tuple(input_names)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        forward = self.model(dict(zip(self.input_names, tensors, strict=True)), hidden_states=True)
        hidden = forward.hidden_states or ()
        pooled = () if forward.pooled is None else (forward.pooled,)
        return tuple(tensor.float() for tensor in (forward.logits, *pooled, *hidden))


def exported(teacher: Teacher, *, precision: str, work_dir: Path, fresh: bool = False) -> Path:
    """The directory with ``model.onnx`` of ``teacher``; exports it if ``work_dir`` lacks it, or if ``fresh``.

    Raises ModelError if torch cannot export the teacher.
    """
    directory = work_dir / "onnx" / _key(teacher, precision)
    if fresh:
        shutil.rmtree(directory, ignore_errors=True)
    if (directory / "model.onnx").is_file():
        return directory
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix="export-") as temporary:
        target = Path(temporary) / directory.name
        target.mkdir()
        _export(teacher, precision, target / "model.onnx")
        sync_tree(target)
        publish_directory(target, directory)  # atomic
    return directory


def _encode(teacher: Teacher, texts: Sequence[str]) -> dict[str, Tensor]:
    encoded = encode(teacher.tokenizer, [(text,) for text in texts], teacher.max_length)
    return pad(encoded, range(len(texts)), padding_id(teacher.tokenizer))


def _export(teacher: Teacher, precision: str, target: Path) -> None:
    model = teacher.model.cpu().eval()
    if precision != "float32":
        model = copy.deepcopy(model).half()
    float32 = head_modules(model) if precision.endswith(FLOAT32_HEAD) else ()
    for module in float32:
        module.float()
    batch = _encode(teacher, _EXPORT_TEXTS)
    wrapper = OnnxTeacher(model, list(batch)).eval()

    def outputs() -> list[str]:
        pooled = ["pooled"] if len(wrapper(*batch.values())) == teacher.depth + 3 else []
        return ["logits", *pooled, *(f"hidden_{layer}" for layer in range(teacher.depth + 1))]

    with in_float32(float32, "cpu"):
        write_graph(
            wrapper,
            batch,
            outputs,
            target,
            subject=f"teacher '{teacher.name}'",
            cure='Run this teacher with dump.backend = "torch".',
        )


def _key(teacher: Teacher, precision: str) -> str:
    import onnx
    import onnxscript

    inputs = {
        "exporter": EXPORTER_VERSION,
        "torch": torch.__version__,
        "onnx": onnx.__version__,
        "onnxscript": onnxscript.__version__,
        "precision": precision,
        "head": teacher.head_kind,
        **asdict(teacher.fingerprints),
    }
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:32]
