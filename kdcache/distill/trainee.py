"""A student in training, as the shared loop sees it: batches with targets in, losses out, the best epoch kept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kdcache.distill.evaluation import EncodedSplit, selection_score, split_scores
from kdcache.methods.base import Moment

if TYPE_CHECKING:
    from torch import Tensor, nn

    from kdcache.distill.objective import DistillationModel
    from kdcache.distill.targets import Batch, TargetSource
    from kdcache.training.best_epoch import BestEpoch


@dataclass(frozen=True)
class Step:
    """What one optimizer step learns from, and where in the training it is."""

    batch: Batch
    moment: Moment


class DistillTrainee:
    """``distillation`` holds student and projections; ``best`` keeps the best epoch's student."""

    def __init__(
        self,
        distillation: DistillationModel,
        source: TargetSource,
        validation: EncodedSplit | None,
        best: BestEpoch,
        *,
        epochs: int,
        seed: int = 0,
        accumulation: int = 1,
        select_by: str = "accuracy",
    ) -> None:
        self.model: nn.Module = distillation
        self._distillation = distillation
        self.steps_per_epoch = source.steps_per_epoch
        self._student = distillation.student
        self._source = source
        self._validation = validation
        self._best = best
        self._total_steps, self._seed = epochs * source.steps_per_epoch, seed
        self._accumulation = accumulation
        self._select_by = select_by

    def batches(self, epoch: int, first_step: int) -> Iterator[Step]:
        """One per optimizer step."""
        before = epoch * self.steps_per_epoch
        for step, batch in enumerate(self._source.batches(epoch, first_step), start=before + first_step):
            yield Step(batch, Moment(step, self._total_steps, epoch, self._seed))

    def losses(self, step: Step) -> Iterator[tuple[Tensor, dict[str, float | Tensor]]]:
        """The loss of each micro-batch, divided by the counts of the whole step, and its terms before their weights."""
        device = next(self.model.parameters()).device
        counts = self._distillation.counts([step.batch])
        for piece in step.batch.split(self._accumulation):
            loss, terms = self.model(piece.to(device, non_blocking=True), counts, step.moment)
            yield loss, dict(terms)

    def evaluate(self, epoch: int) -> dict[str, float]:  # noqa: ARG002 - of the protocol
        """Scores on validation; nothing without one, which makes the last epoch the best."""
        if self._validation is None:
            return {}
        found = split_scores(self._student, self._validation)
        return {
            "score": selection_score(found, self._select_by),
            **{f"validation/{name}": value for name, value in found.items()},
        }

    def keep_best(self, epoch: int, metrics: dict[str, float]) -> None:  # noqa: ARG002 - of the protocol
        """Keep the student's weights durably; the projections have served."""
        self._best.keep(epoch, {"student": self._student.state_dict()})

    def settle_best(self, epoch: int) -> None:
        """Only ``epoch`` is needed from here on."""
        self._best.settle(epoch)

    def load_best(self, epoch: int) -> None:
        """Put the weights of ``epoch`` (from 0) back into the student."""
        self._student.load_state_dict(self._best.load(epoch)["student"])
