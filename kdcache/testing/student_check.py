"""Checks an architecture as a student: built, cut, trained for a step, saved, and loaded by transformers alone.

``student_verdict`` gives one line of the table of models in the documentation. A fault raises AssertionError; a refusal
is a result.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdcache.errors import KdcacheError
from kdcache.testing.architectures import DEPTH, Architecture

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from kdcache.students.model import Student

LABELS = ("negative", "positive")
TEXTS = (
    "the film is good",
    "bad",
    "a very long and rather tired story of it , with music and a fine actor",
    "the plot feels stale",
)
_CUT = (1, DEPTH)  # blocks of a cut student: not the first ones, so that lists per layer must be cut too


@dataclass(frozen=True)
class StudentVerdict:
    """The message of the refusal; None if it works."""

    whole: str | None
    cut: str | None

    @property
    def works(self) -> bool:
        return self.whole is None

    @property
    def word(self) -> str:
        """The cell of a table."""
        if self.whole is not None:
            return "refused"
        return "works" if self.cut is None else "works, all layers"


def student_verdict(architecture: Architecture, directory: Path) -> StudentVerdict:
    """``architecture`` as a student with the standard head, whole and cut to its first and last block.

    Files go to ``directory``.
    """
    saved = "classifier" if architecture.model_type == "funnel" else "base"
    source = architecture.save(directory / "source", saved)  # type: ignore[arg-type]
    return StudentVerdict(
        refusal(lambda: check_student(source, None, directory / "whole")),
        refusal(lambda: check_student(source, list(_CUT), directory / "cut")),
    )


def refusal(work: Any) -> str | None:
    """The message with which ``work`` is refused (one line, with a hint); None if it succeeds."""
    try:
        work()
    except KdcacheError as error:
        assert error.message and "\n" not in error.message and len(error.message) < 400, error.message
        assert error.hint, error.message
        return error.message
    return None


def check_student(source: Path, layers: list[int] | None, directory: Path, *, trust_remote_code: bool = False) -> None:
    """Build, train and save a student. AssertionError if its logits differ in a batch or after loading."""
    from kdcache.recipe import StudentSection
    from kdcache.students.build import build_student
    from kdcache.students.save import load_student, save_student, student_record

    section = StudentSection(init_from=str(source), layers=layers, trust_remote_code=trust_remote_code)
    student = build_student(section, LABELS, max_length=64, seed=0, dropout=0.0)
    assert student.model.depth == (DEPTH if layers is None else len(layers))
    _check_padding(student)
    _check_a_step(student)
    expected = _check_padding(student)
    record = student_record(student, name="tiny", method="kd", text_columns=("sentence",), label_column="label")
    save_student(directory, student, record, "card")
    _close(_batch(load_student(directory, trust_remote_code=trust_remote_code), TEXTS), expected, "loaded by kdcache")
    _check_without_kdcache(directory, expected, trust_remote_code)


def _check_padding(student: Student) -> Tensor:
    """Logits [texts, classes]; asserts that they are equal alone and in a batch."""
    import torch

    alone = torch.cat([_batch(student, [text]) for text in TEXTS])
    _close(_batch(student, TEXTS), alone, "in a batch")
    return alone


def _batch(student: Student, texts: Sequence[str]) -> Tensor:
    """Logits by ``split_logits``, as in validation and ``kdcache evaluate``."""
    import numpy as np
    import torch

    from kdcache.students.score import encode_split, split_logits

    split = encode_split(student, [(text,) for text in texts], np.zeros(len(texts), np.int64))
    return torch.from_numpy(split_logits(student.model, split))


def _check_a_step(student: Student) -> None:
    """One step of gradient descent on the task loss, with the hidden states that a hidden loss needs."""
    import torch
    from torch.nn import functional

    model, tokens = (
        student.model.train(),
        dict(student.tokenizer(list(TEXTS), padding=True, padding_side="right", return_tensors="pt")),
    )
    labels = torch.arange(len(TEXTS)) % 2

    def loss() -> torch.Tensor:
        output = model(tokens, hidden_states=True)
        shape = (*tokens["input_ids"].shape, model.width)
        assert len(output.hidden_states) == model.depth + 1
        assert all(tuple(layer.shape) == shape for layer in output.hidden_states)
        return functional.cross_entropy(output.logits, labels)

    before = loss()
    assert torch.equal(loss(), before), "dropout = 0 leaves some of it"
    before.backward()
    gradients = [(parameter, parameter.grad) for parameter in model.parameters() if parameter.grad is not None]
    norm = sum(float(gradient.square().sum()) for _, gradient in gradients) ** 0.5
    assert norm > 0
    with torch.no_grad():
        for parameter, gradient in gradients:
            parameter.sub_(gradient, alpha=1e-3 / norm)
        after = loss()
    assert after < before, f"one step took the loss from {before.item()} to {after.item()}"
    model.zero_grad()


def _check_without_kdcache(directory: Path, expected: Tensor, trust_remote_code: bool) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model, report = AutoModelForSequenceClassification.from_pretrained(
        directory, output_loading_info=True, trust_remote_code=trust_remote_code
    )
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"], report
    tokens = AutoTokenizer.from_pretrained(directory)(list(TEXTS), padding=True, return_tensors="pt")
    taken = {name: tensor for name, tensor in tokens.items() if name in inspect.signature(model.forward).parameters}
    with torch.no_grad():
        _close(model.eval()(**taken).logits, expected, "loaded by transformers alone")


def _close(found: Tensor, expected: Tensor, where: str) -> None:
    worst, scale = float((found - expected).abs().max()), float(expected.abs().max())
    assert worst <= 1e-4 * max(scale, 1e-2), f"logits {where} differ by {worst:.3g}, of {scale:.3g}"
