"""A student and the batch of a step: small enough to compute losses in loops, with every case of a real batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import Tensor, nn

from kdcache.distill.objective import DistillationModel, ObjectiveSettings
from kdcache.loading.targets import Batch, Hidden, Targets
from kdcache.students.model import StudentOutput

if TYPE_CHECKING:
    from kdcache.methods.base import Moment, Pair
    from kdcache.students.model import StudentModel

ROWS, LENGTH, CLASSES, WIDTH = 6, 5, 3, 4
TEACHERS = ("a", "b")
SCORES = (0.8, 0.9)  # of the teachers, on validation
STUDENT_SCORES = {"a": 0.7, "b": 0.6}  # of a student of each teacher alone
PAIRS: dict[Pair, int] = {
    (0, 1): 4,
    (0, 2): 4,
    (1, 1): 4,
    (1, 2): 4,
}  # (teacher, student layer) -> dimensions of the target
VARIANCES: dict[Pair, float] = {(0, 1): 0.5, (0, 2): 2.0, (1, 1): 1.0, (1, 2): 3.0}
LABELS = (0, 2, -1, 1, -1, 0)
# The tokens of a row that are not padding: some rows are padded on the right, one on the left.
MASK = ((1, 1, 1, 1, 1), (1, 1, 1, 1, 0), (0, 0, 1, 1, 1), (1, 1, 1, 0, 0), (1, 1, 0, 0, 0), (1, 1, 1, 1, 1))
# By teacher, the tokens that have a target. Teacher a lacks the first token of row 3; teacher b lacks row 4.
COVERED = {
    0: ((0, 1, 2, 3, 4), (0, 2, 3), (2, 3, 4), (1, 2), (0, 1), (0, 4)),
    1: ((0, 2), (0, 1, 2, 3), (2, 4), (0,), (), (0, 1, 2, 3, 4)),
}


class LoopStudent(nn.Module):
    """A float64 student with a simple formula: layer j is h_j = tanh(A_j h_(j-1)), the head is on the first token."""

    width = WIDTH

    def __init__(self, classes: int = CLASSES) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)

        def drawn(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=generator, dtype=torch.float64))

        self.embeddings, self.first, self.second = drawn(100, WIDTH), drawn(WIDTH, WIDTH), drawn(WIDTH, WIDTH)
        self.head = drawn(classes, WIDTH)

    def forward(self, inputs: Mapping[str, Tensor], *, hidden_states: bool = False) -> StudentOutput:
        states = [self.embeddings[inputs["input_ids"]]]
        for matrix in (self.first, self.second):
            states.append(torch.tanh(states[-1] @ matrix.T))
        return StudentOutput(states[-1][:, 0] @ self.head.T, tuple(states) if hidden_states else ())


def step_batch(pairs: Mapping[Pair, int] = PAIRS) -> Batch:
    """The rows above with random targets for every token of ``COVERED``; logits in float64."""
    generator = torch.Generator().manual_seed(0)
    hidden = {}
    for teacher, rows in COVERED.items():
        positions = torch.tensor([row * LENGTH + token for row, tokens in enumerate(rows) for token in tokens])
        for (owner, layer), dim in pairs.items():
            if owner == teacher:
                values = torch.randn(len(positions), dim, generator=generator)
                hidden[teacher, layer] = Hidden(values, None, None, None, None, positions)
    inputs = {
        "input_ids": torch.randint(5, 100, (ROWS, LENGTH), generator=generator),
        "attention_mask": torch.tensor(MASK),
    }
    logits = 2 * torch.randn(len(TEACHERS), ROWS, CLASSES, generator=generator, dtype=torch.float64)
    ids = np.arange(ROWS * 16, dtype=np.uint8).reshape(ROWS, 16)
    return Batch(inputs, torch.tensor(LABELS), ids, Targets(TEACHERS, logits, hidden))


def alone(batch: Batch) -> Batch:
    """The same rows with the first teacher only."""
    assert batch.targets is not None
    hidden = {pair: target for pair, target in batch.targets.hidden.items() if pair[0] == 0}
    return replace(batch, targets=Targets(TEACHERS[:1], batch.targets.logits[:1], hidden))


def loop_model(
    settings: ObjectiveSettings, pairs: Mapping[Pair, int] = PAIRS, *, teachers: Sequence[str] = TEACHERS
) -> DistillationModel:
    """A ``LoopStudent`` with the terms' parameters in float64; matrices that start at zero are random."""
    student = cast("StudentModel", LoopStudent())
    pairs = {pair: dim for pair, dim in pairs.items() if pair[0] < len(teachers)}
    model = DistillationModel(
        student,
        settings,
        teachers,
        dims=pairs if settings.needs_hidden else {},
        variances=lambda _epoch: VARIANCES,
        scores=lambda: SCORES[: len(teachers)],
    )
    generator = torch.Generator().manual_seed(6)
    for owned in model.owned.values():
        for parameter in owned.module.double().parameters():
            parameter.data.normal_(generator=generator)
    return model.train()


def step_loss(
    model: DistillationModel, batch: Batch, pieces: int = 1, moment: Moment | None = None
) -> tuple[float, dict[str, float], dict[str, Tensor]]:
    """Loss, terms and gradients of a step in ``pieces`` micro-batches, each with forward and backward pass."""
    model.zero_grad(set_to_none=True)
    counts, total, terms = model.counts([batch]), 0.0, dict[str, float]()
    for piece in batch.split(pieces):
        loss, parts = model(piece, counts, moment)
        loss.backward()
        total += loss.item()
        terms = {name: terms.get(name, 0.0) + value.item() for name, value in parts.items()}
    gradients = {name: tensor.grad for name, tensor in model.named_parameters() if tensor.grad is not None}
    return total, terms, gradients
