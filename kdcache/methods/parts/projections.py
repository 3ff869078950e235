"""The slot W: learnable projections between the widths of student and teachers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from kdcache.loading.targets import Hidden
    from kdcache.methods.base import Direction, Pair

PROJECTIONS = "projections"  # name of W in checkpoints


class HiddenProjections(nn.Module):
    """W_ij, one learnable matrix per teacher and student layer, discarded after training (MT-BERT, section 3.2).

    student-to-teacher keeps the teachers' matrices of one student layer as blocks of a single [sum of dims, width]
    matrix: one product instead of N. teacher-to-student keeps one [width, dim] matrix per pair. ``both`` has one
    matrix on each side, into the smaller of the two widths. ``none`` has no matrix. No bias, as in the paper.

    On the student's side W is initialised to zero: the loss starts at the variance of the target, and W learns before
    gradients reach the student. A random W predicts noise, which costs many times that variance and harms the student
    (docs/results.md). On the teacher's side zero would be a collapsed solution, and scale-free losses have no gradient
    at zero; there W is random, by ``seed``.

    Args:
        dims: (teacher index, student layer) -> dimensions of the stored target.
        width: Hidden size of the student.
        direction: The side that W is applied to.
        seed: For random initial values.
        scale_free: The loss depends on directions only.
    """

    def __init__(
        self, dims: Mapping[Pair, int], width: int, direction: Direction, *, seed: int = 0, scale_free: bool = False
    ) -> None:
        super().__init__()
        self.direction = direction
        self.dims = dict(sorted(dims.items(), key=lambda item: (item[0][1], item[0][0])))
        generator = torch.Generator().manual_seed(seed)

        def drawn(rows: int, columns: int) -> Tensor:
            matrix: Tensor = torch.randn((rows, columns), generator=generator) / columns**0.5
            return matrix

        self.matrices = nn.ParameterDict()
        for (teacher, layer), dim in self.dims.items():
            own = f"layer{layer}-teacher{teacher}"
            if direction == "student-to-teacher":
                block = drawn(dim, width) if scale_free else torch.zeros(dim, width)
                self._append(f"layer{layer}", block)
            elif direction == "teacher-to-student":
                self._append(own, drawn(width, dim))
            elif direction == "both":
                self._append(f"{own}-student", drawn(min(width, dim), width))
                self._append(f"{own}-teacher", drawn(min(width, dim), dim))

    def _append(self, name: str, block: Tensor) -> None:
        known = [self.matrices[name].data] if name in self.matrices else []
        self.matrices[name] = nn.Parameter(torch.cat([*known, block]))

    def forward(
        self, student_hidden: Sequence[Tensor], targets: Mapping[Pair, Hidden]
    ) -> dict[Pair, tuple[Tensor, Tensor]]:
        """Both sides of every pair, for the stored targets.

        Args:
            student_hidden: ``[batch, tokens, width]`` by layer, 0 = embeddings.
            targets: (teacher index, student layer) -> targets of the batch.

        Returns:
            (student side, teacher side) of every pair, both ``[targets, dim or width]``.
        """
        if self.direction != "student-to-teacher":
            return {
                pair: self.project(pair, target.of_student(student_hidden[pair[1]].flatten(0, 1)), target.aligned())
                for pair, target in targets.items()
            }
        sides: dict[Pair, tuple[Tensor, Tensor]] = {}
        for layer in sorted({layer for _, layer in targets}):
            states = student_hidden[layer].flatten(0, 1)
            blocks = self._blocks(layer)
            if any(targets[pair].count < len(states) // 2 for pair in blocks if pair in targets):  # targets per text
                sided = {
                    pair: F.linear(targets[pair].of_student(states), block)
                    for pair, block in blocks.items()
                    if pair in targets
                }
            else:
                sizes = [len(block) for block in blocks.values()]
                projected = zip(
                    blocks, F.linear(states, self.matrices[f"layer{layer}"]).split(sizes, dim=1), strict=True
                )
                sided = {pair: targets[pair].of_student(side) for pair, side in projected if pair in targets}
            sides |= {pair: (side, targets[pair].aligned()) for pair, side in sided.items()}
        return sides

    def project(self, pair: Pair, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Both sides of a pair after W; student ``[n, width]``, teacher ``[n, dim]``."""
        own = f"layer{pair[1]}-teacher{pair[0]}"
        if self.direction == "student-to-teacher":
            return F.linear(student, self._blocks(pair[1])[pair]), teacher
        if self.direction == "teacher-to-student":
            return student, _on_teacher(teacher, self.matrices[own])
        if self.direction == "both":
            return F.linear(student, self.matrices[f"{own}-student"]), _on_teacher(
                teacher, self.matrices[f"{own}-teacher"]
            )
        return student, teacher

    def _blocks(self, layer: int) -> dict[Pair, Tensor]:
        pairs = [pair for pair in self.dims if pair[1] == layer]
        blocks = self.matrices[f"layer{layer}"].split([self.dims[pair] for pair in pairs])
        return dict(zip(pairs, blocks, strict=True))


def _on_teacher(teacher: Tensor, matrix: Tensor) -> Tensor:
    return F.linear(teacher.to(matrix.dtype), matrix)  # stored values are float32 at most


def rate_factor(paper: bool) -> int:
    """Learning rate of W divided by the student's: at the student's rate W hardly changes (docs/method.md)."""
    return 1 if paper else 10
