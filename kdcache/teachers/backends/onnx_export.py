"""A teacher as an ONNX graph: our own exporter on torch.onnx, since the usual one does not know transformers 5.

The graph always gives the logits, the pooled vector and every hidden state, whichever layers a dump wants: what is not asked
for is not copied at run time, and the optimised graph, and with it every bit of the results, does not depend on the choice
of layers. An exported graph is kept under the fingerprint of all that it was made from.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from kdcache.data.encoding import encode, pad, padding_id
from kdcache.errors import ModelError

if TYPE_CHECKING:
    from kdcache.teachers.teacher import Teacher, TeacherModel

EXPORTER_VERSION = 2  # raised whenever the graph that is made of one and the same teacher changes

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_EXPORT_TEXTS = ("a plain sentence of ten or so words, with a comma", "a short one")
_PARITY_TEXTS = ("yes", "café, naïve: 3.14 — and now a longer sentence than any that the exporter saw " * 2, "no more than this")


class OnnxTeacher(nn.Module):
    """A teacher with tensors in and a flat tuple out: logits, pooled (where there is one), hidden states 0 to depth."""

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
    """The directory with ``model.onnx`` of ``teacher``, exported now unless ``work_dir`` has it (or ``fresh`` is set).

    Raises ModelError where torch cannot export the teacher.
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
        shutil.rmtree(directory, ignore_errors=True)
        target.rename(directory)  # whole, or not at all
    return directory


def export_batch(teacher: Teacher) -> dict[str, Tensor]:
    """The batch that the graph is traced with: two rows, one of them padded."""
    return _encode(teacher, _EXPORT_TEXTS)


def parity_batch(teacher: Teacher) -> dict[str, Tensor]:
    """Another number of rows, other lengths: what a graph that is not really dynamic fails on."""
    return _encode(teacher, _PARITY_TEXTS)


def output_names(teacher: Teacher, *, pooled: bool) -> list[str]:
    """The graph's outputs in order."""
    return ["logits", *(["pooled"] if pooled else []), *(f"hidden_{layer}" for layer in range(teacher.depth + 1))]


def _encode(teacher: Teacher, texts: Sequence[str]) -> dict[str, Tensor]:
    encoded = encode(teacher.tokenizer, [(text,) for text in texts], teacher.max_length)
    return pad(encoded, range(len(texts)), padding_id(teacher.tokenizer))


def _export(teacher: Teacher, precision: str, target: Path) -> None:
    model = teacher.model.cpu().eval()
    if precision == "fp16":
        model = copy.deepcopy(model).half()
    batch = export_batch(teacher)
    wrapper = OnnxTeacher(model, list(batch)).eval()
    dynamic = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    try:
        with torch.no_grad(), _quiet():
            count = len(wrapper(*batch.values()))
            program = torch.onnx.export(
                wrapper,
                tuple(batch.values()),
                input_names=list(batch),
                output_names=output_names(teacher, pooled=count == teacher.depth + 3),
                dynamo=True,
                dynamic_shapes=(tuple(dict(dynamic) for _ in batch),),
                verbose=False,
            )
            if program is None:
                raise RuntimeError("the exporter gave no program")
            program.save(str(target))
    except Exception as error:  # the exporter raises what its many passes raise
        reason = _COLOUR.sub("", str(error)).strip().splitlines()
        raise ModelError(
            f"teacher '{teacher.name}' cannot be exported to ONNX: {type(error).__name__}: {reason[0] if reason else 'no reason given'}",
            'Run this teacher with dump.backend = "torch".',
        ) from error


def _key(teacher: Teacher, precision: str) -> str:
    import onnx
    import onnxscript

    made_from = {
        "exporter": EXPORTER_VERSION,
        "torch": torch.__version__,
        "onnx": onnx.__version__,
        "onnxscript": onnxscript.__version__,
        "precision": precision,
        "head": teacher.head_kind,
        **asdict(teacher.fingerprints),
    }
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:32]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch's exporter says about itself: absent torchvision, a deprecation inside torch's own pytrees."""
    registration = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = registration.level
    registration.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\).*", category=FutureWarning)
            yield
    finally:
        registration.setLevel(level)
