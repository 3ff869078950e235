"""Checks an architecture as a teacher: it works with its own head and under the shared one, or is refused in one line.

The reference is transformers itself, with one text at a time and no padding.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kdcache.data.encoding import encode, load_tokenizer, pad, padding_id
from kdcache.errors import KdcacheError
from kdcache.recipe import TeacherSection
from kdcache.teachers.backends.torch_backend import TorchBackend
from kdcache.teachers.head import SharedHead
from kdcache.teachers.sources import Source, open_source, under_shared_head
from kdcache.teachers.teacher import HeadKind, Teacher, TeacherModel

if TYPE_CHECKING:
    from kdcache.testing.architectures import Architecture

SINGLES = (
    ("the film is good and great and moving",),
    ("bad",),
    ("the plot is dull",),
    ("the music feels warm and fresh",),
)
PAIRS = tuple((*text, "a camera of the film") for text in SINGLES)
_MAX_LENGTH = 32
_SIDES = ("right", "left")
_SHARED_WIDTH = 24


@dataclass(frozen=True)
class TeacherVerdict:
    """``own``, ``shared``: why that head is refused, None if it works.

    ``difference``: the largest difference of logits and hidden states between a text alone and in a batch, over both
    heads, single texts and pairs. ``sides``: the largest difference between tokenizers that pad on the left and on the
    right, and between transformers and kdcache with the own head.
    """

    own: str | None
    shared: str | None
    difference: float = 0.0
    sides: float = 0.0

    @property
    def works(self) -> bool:
        return self.own is None or self.shared is None


def teacher_verdict(architecture: Architecture, place: Path) -> TeacherVerdict:
    """Save the architecture below ``place`` and try it with both heads, and with padding on both sides."""
    refused: dict[str, str | None] = {}
    differences, sides = [0.0], [0.0]
    for head, saved in (("own", "classifier"), ("shared", "base")):
        try:
            measured = [_measured(architecture, place / f"{head}-{side}", head, saved, side) for side in _SIDES]
        except KdcacheError as error:
            refused[head] = error.message
            continue
        refused[head] = None
        differences += [one.difference for one in measured]
        sides += [one.reference for one in measured]
        sides += [_largest(one, other) for one, other in zip(*(one.logits for one in measured), strict=True)]
    return TeacherVerdict(refused["own"], refused["shared"], max(differences), max(sides))


@dataclass(frozen=True)
class _Measured:
    difference: float
    reference: float
    logits: list[np.ndarray]


def _measured(architecture: Architecture, place: Path, head: Any, saved: Any, side: str) -> _Measured:
    directory = architecture.save(place, saved)
    tokenizer = load_tokenizer(str(directory))
    tokenizer.padding_side = side
    tokenizer.save_pretrained(directory)
    teacher = open_teacher(directory, head)
    difference, reference, logits = 0.0, 0.0, []
    for texts in (SINGLES, PAIRS):
        together, alone = outputs(teacher, texts), [outputs(teacher, [text]) for text in texts]
        joined = [np.concatenate(parts) for parts in zip(*alone, strict=True)]
        difference = max(difference, *(_largest(one, other) for one, other in zip(together, joined, strict=True)))
        if head == "own":
            reference = max(reference, _largest(together[0], reference_logits(directory, texts)))
        logits.append(together[0])
    shutil.rmtree(directory)
    return _Measured(difference, reference, logits)


def open_teacher(directory: Path, head: HeadKind, max_length: int = _MAX_LENGTH) -> Teacher:
    """The teacher at the start of co-finetuning; a shared head has the seed 0. Raises as ``open_source``."""
    section = TeacherSection(name="tried", model=str(directory), head=head)
    source: Source = open_source(section, max_length, ("0", "1"))
    if head == "own":
        model = TeacherModel(source.network, None, None, source.class_order)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = under_shared_head({"tried": source}, SharedHead(_SHARED_WIDTH, 2))["tried"]
    none: Any = None  # without fingerprints, since nothing is stored
    return Teacher(
        "tried", model.eval(), source.tokenizer, head, source.depth, source.width, max_length, none, ("0", "1")
    )


def outputs(teacher: Teacher, texts: Sequence[tuple[str, ...]]) -> list[np.ndarray]:
    """Logits [texts, classes], pooled vectors and the packed hidden states of every layer, of one batch."""
    encoded = encode(teacher.tokenizer, texts, teacher.max_length)
    batch = pad(encoded, range(len(texts)), padding_id(teacher.tokenizer))
    output = TorchBackend(teacher, precision="float32").run(batch, range(teacher.depth + 1), True)
    assert output.pooled is not None
    return [tensor.cpu().numpy() for tensor in (output.logits, output.pooled, *output.hidden.values())]


def reference_logits(directory: Path, texts: Sequence[tuple[str, ...]]) -> np.ndarray:
    """Outputs of transformers alone for each text, run by itself."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(directory, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    with torch.no_grad():
        found = [model(**tokenizer(*text, return_tensors="pt")).logits for text in texts]
    return np.asarray(torch.cat(found).numpy())


def _largest(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one - other).max())
