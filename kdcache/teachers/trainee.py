"""The joint training of teachers under one shared head, as the training loop sees it (MT-BERT, section 3.1).

L_cf = sum_i CE(y, softmax(z_i)). The loss is a sum over teachers, so each teacher's part is back-propagated before the next
teacher runs: the gradient is that of the sum, the peak of activation memory is that of the largest teacher. Inside a teacher the
batch may be cut further (``accumulation``): its rows are sorted by length first, so that each micro-batch is padded only to its own
longest text. The batch itself stays a random one, hence neither changes the gradient; on short texts of uneven length
four micro-batches leave about half of the padding's work undone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from kdcache.data.encoding import EncodedTexts, pad, token_budget_batches
from kdcache.report.metrics import scores
from kdcache.training.loop import micro_batches

if TYPE_CHECKING:
    from kdcache.teachers.teacher import TeacherModel
    from kdcache.training.best_epoch import BestEpoch

_EVALUATION_TOKENS = 4096  # padded tokens of one forward pass


@dataclass(frozen=True)
class TeacherTexts:
    """The labelled rows of train, and those of validation where there are any, in one teacher's tokens."""

    train: EncodedTexts
    validation: EncodedTexts | None
    pad_token_id: int


@dataclass(frozen=True)
class Labels:
    """int64[n] per split, aligned with ``TeacherTexts``."""

    train: np.ndarray
    validation: np.ndarray | None


class JointTrainee:
    """Trains ``models`` together; those parameters that are frozen beforehand stay as they are."""

    def __init__(
        self,
        models: Mapping[str, TeacherModel],
        texts: Mapping[str, TeacherTexts],
        labels: Labels,
        *,
        batch_size: int,
        accumulation: int,
        select_by: str,
        seed: int,
        best: BestEpoch,
        note: Callable[[str], None],
    ) -> None:
        self.model: nn.Module = nn.ModuleList(models.values())
        self.steps_per_epoch = math.ceil(len(labels.train) / batch_size)
        self._models, self._texts, self._labels = models, texts, labels
        self._batch_size, self._accumulation, self._select_by, self._seed = batch_size, accumulation, select_by, seed
        self._best, self._note = best, note

    def batches(self, epoch: int, first_step: int) -> Iterator[np.ndarray]:
        """Rows of each batch: an order that is a pure function of seed and epoch."""
        order = np.random.default_rng([self._seed, epoch]).permutation(len(self._labels.train))
        for first in range(first_step * self._batch_size, len(order), self._batch_size):
            yield order[first : first + self._batch_size]

    def losses(self, batch: np.ndarray) -> Iterator[tuple[Tensor, Mapping[str, float | Tensor]]]:
        """Teacher by teacher, micro-batch by micro-batch; together L_cf of the batch."""
        for name, model in self._models.items():
            texts = self._texts[name]
            rows = batch[np.argsort(texts.train.lengths[batch], kind="stable")]
            for part in micro_batches(len(rows), self._accumulation):
                loss = self._cross_entropy(model, texts, rows[part]) * (len(rows[part]) / len(rows))
                yield loss, {f"ce.{name}": loss.detach()}

    def _cross_entropy(self, model: TeacherModel, texts: TeacherTexts, rows: np.ndarray) -> Tensor:
        device = next(model.parameters()).device
        inputs = {key: tensor.to(device) for key, tensor in pad(texts.train, rows, texts.pad_token_id).items()}
        labels = torch.from_numpy(self._labels.train[rows]).to(device)
        logits = model(inputs).logits
        return functional.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels)

    def evaluate(self, epoch: int) -> dict[str, float]:
        """Scores of every teacher and of the mean of their probabilities on validation; ``score``, which chooses the epoch, is
        ``select_by`` averaged over the teachers, each of which will teach. Empty without a validation split.
        """
        if self._labels.validation is None:
            return {}
        logits = {name: self._validation_logits(name) for name in self._models}
        found = score_teachers(logits, self._labels.validation)
        sign = -1.0 if self._select_by == "loss" else 1.0
        score = sign * sum(found[name][self._select_by] for name in self._models) / len(self._models)
        shown = ", ".join(f"{name} {values[self._select_by]:.4f}" for name, values in found.items())
        self._note(f"epoch {epoch + 1}, {self._select_by} on validation: {shown}")
        return {
            "score": score,
            **{f"validation.{name}.{key}": value for name, values in found.items() for key, value in values.items()},
        }

    def _validation_logits(self, name: str) -> np.ndarray:
        texts = self._texts[name]
        assert texts.validation is not None
        return predict(self._models[name], texts.validation, texts.pad_token_id)

    def keep_best(self, epoch: int, metrics: Mapping[str, float]) -> None:
        """Keep the weights of all teachers and their scores."""
        self._best.keep(epoch, {"model": self.model.state_dict(), "metrics": dict(metrics)})

    def settle_best(self, epoch: int) -> None:
        """Only ``epoch`` is needed from here on."""
        self._best.settle(epoch)

    def load_best(self, epoch: int) -> None:
        """Put the weights of ``epoch`` (from 0) back into the teachers."""
        self.model.load_state_dict(self._best.load(epoch)["model"])


MEAN = "mean of teachers"  # not a possible name of a teacher


def score_teachers(logits: Mapping[str, np.ndarray], labels: np.ndarray) -> dict[str, dict[str, float]]:
    """Scores by teacher, and under ``MEAN`` those of the mean of their probabilities; ``logits`` float32[n, classes] each."""
    found = {name: scores(labels, values) for name, values in logits.items()}
    probabilities = [torch.softmax(torch.from_numpy(values).double(), dim=1) for values in logits.values()]
    mean = torch.stack(probabilities).mean(dim=0).clamp_min(1e-300).log()  # their softmax is the mean again
    return {**found, MEAN: scores(labels, mean.numpy())}


def predict(model: TeacherModel, encoded: EncodedTexts, pad_token_id: int) -> np.ndarray:
    """Logits float32[n, classes] of every text, in its order; without gradients, in eval mode."""
    device = next(model.parameters()).device
    model.eval()
    batches = token_budget_batches(encoded.lengths, _EVALUATION_TOKENS)
    found: list[Tensor] = []
    with torch.no_grad():
        for rows in batches:
            inputs = {key: tensor.to(device) for key, tensor in pad(encoded, rows, pad_token_id).items()}
            found.append(model(inputs).logits.float().cpu())
    order = np.concatenate(batches)
    return _back_in_order(torch.cat(found).numpy(), order)


def _back_in_order(values: np.ndarray, order: Sequence[int] | np.ndarray) -> np.ndarray:
    result: Any = np.empty_like(values)
    result[order] = values
    return np.asarray(result)
