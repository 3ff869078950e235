"""One joint training: from the rows of the task to models with the weights of the best epoch."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from kdcache.data.encoding import EncodedTexts, encode, pad, padding_id, truncation_note
from kdcache.errors import DataError
from kdcache.recipe.training import ARITHMETIC
from kdcache.report.metrics import scores
from kdcache.teachers.network import takes_full_mask
from kdcache.teachers.placement import united
from kdcache.teachers.sources import TOKEN_TYPES
from kdcache.training import loop
from kdcache.training.best_epoch import BestEpoch
from kdcache.training.compiled import compiled
from kdcache.training.device import default_device, sent
from kdcache.training.loop import micro_batches
from kdcache.training.predict import predict
from kdcache.training.processes import current
from kdcache.training.settings import LoopSettings, check_evaluation

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kdcache.cache.ids import Examples
    from kdcache.data.task import TaskData
    from kdcache.progress import Progress
    from kdcache.recipe import CofinetuneSection, Recipe
    from kdcache.teachers.placement import Opened
    from kdcache.teachers.sources import Source
    from kdcache.teachers.teacher import TeacherModel
    from kdcache.training.metrics_log import MetricsLog
    from kdcache.training.trackers import OnMetrics


_FREE = {
    "checkpoint_steps",
    "checkpoint_minutes",
    "gradient_checkpointing",
    "trackers",
    "folds",
    "placement",
}  # settings that do not change the outcome


@dataclass(frozen=True)
class LabelledRows:
    """The labelled rows of a split: texts, and labels int64[n]."""

    texts: list[tuple[str, ...]]
    labels: np.ndarray


def labelled_rows(task: TaskData, split: str) -> LabelledRows | None:
    """The labelled rows of a split; None if there are none."""
    examples = task.splits.get(split)
    if examples is None:
        return None
    known = examples.labels >= 0
    texts = [task.texts[row.tobytes()] for row in examples.text_ids[known]]
    return LabelledRows(texts, examples.labels[known]) if texts else None


def identity(
    recipe: Recipe, task: TaskData, sources: Mapping[str, Mapping[str, Any]], *, shared_head: str | None = None
) -> dict[str, Any]:
    """All inputs of the teachers as a flat dict, so that a mismatch names one key.

    ``sources`` gives the identity of each teacher's source; ``shared_head`` is the digest of a frozen head.
    """
    settings = recipe.cofinetune.model_dump(mode="json", exclude=_FREE)
    settings = {key: value for key, value in settings.items() if key not in ARITHMETIC or value is not None}
    splits = {
        f"data.{name}": examples_digest(task.splits[name]) for name in ("train", "validation") if name in task.splits
    }
    teachers = {f"teachers.{name}.{key}": value for name, source in sources.items() for key, value in source.items()}
    head = {} if shared_head is None else {"shared_head": shared_head}
    names = {"data.labels": list(task.label_names), "data.text": list(task.text_columns)}
    return {**{f"cofinetune.{key}": value for key, value in settings.items()}, **names, **splits, **teachers, **head}


def newer_keys(identity: Mapping[str, Any]) -> frozenset[str]:
    """Keys of ``identity`` that kdcache 0.1.0 did not write; absent ones are not compared."""
    return frozenset(key for key in identity if key.startswith("teachers.") and key.endswith(f".{TOKEN_TYPES}"))


def examples_digest(examples: Examples) -> str:
    """sha256 (hex) of the rows of a split: text ids and labels, in their order."""
    return hashlib.sha256(examples.text_ids.tobytes() + examples.labels.astype("<i8").tobytes()).hexdigest()


def train(
    settings: CofinetuneSection,
    task: TaskData,
    teachers: Opened,
    models: Mapping[str, TeacherModel],
    identity: Mapping[str, Any],
    place: Path,
    *,
    progress: Progress,
    metrics: OnMetrics,
) -> int:
    """Train ``models``, those of ``teachers`` that this process holds, in place.

    They end with the weights of the best epoch, whose number (from 1) is returned.
    """
    sources, apart = teachers.own, teachers.apart
    train_rows, validation = labelled_rows(task, "train"), labelled_rows(task, "validation")
    if train_rows is None:
        raise DataError("train has no row with a label", "Co-finetuning needs labels; check data.label.")
    check_evaluation(settings, "cofinetune", validation=validation is not None)
    if validation is None:
        progress.note("there is no validation data: the last epoch is kept")
    texts = {name: _encoded(source, train_rows, validation) for name, source in sources.items()}
    lines = {
        name: list(
            truncation_note(
                f"teacher '{name}'", encoded.train.truncated_count, len(encoded.train), sources[name].max_length
            )
        )
        for name, encoded in texts.items()
    }
    lines = united(lines) if apart else lines
    for line in itertools.chain(*(lines[name] for name in teachers.trained)):
        progress.note(line)
    eager = default_device().type != "cpu" and not settings.compile
    for name, model in models.items():
        model.full_mask = eager and takes_full_mask(model.encoder, sources[name].max_length)
    if settings.gradient_checkpointing:
        for source in sources.values():
            _checkpoint_activations(source.network)
    training = CofinetuneTask(
        models,
        texts,
        Labels(train_rows.labels, None if validation is None else validation.labels),
        batch_size=settings.batch_size,
        accumulation=settings.accumulation,
        select_by=settings.select_by,
        seed=settings.seed,
        best=BestEpoch(place / "best", place, identity),
        note=progress.note,
        every=list(teachers.trained) if apart else None,
    )
    loop_settings = replace(
        LoopSettings.from_section(settings, identity, newer_keys(identity)),
        lr_by_prefix=_own_rates(teachers),
        decay_by_prefix=True,
    )
    with contextlib.ExitStack() as graphs:
        share = slice(0, settings.batch_size) if apart else current().share(settings.batch_size)
        rows = {part.stop - part.start for part in micro_batches(share.stop - share.start, settings.accumulation)}
        for name, model in models.items() if settings.compile else ():
            graphs.enter_context(compiled(model.encoder, rows=rows, max_length=sources[name].max_length))
        outcome = loop.train(
            training,
            loop_settings,
            checkpoints=place / "checkpoints",
            progress=progress,
            on_metrics=metrics,
            shared=_head(models) if apart else None,
        )
    if settings.evaluate_steps is not None or outcome.best_epoch + 1 != settings.epochs:
        training.load_best(outcome.best_mark)
    training.model.eval()
    return outcome.best_epoch + 1


def _encoded(source: Source, train_rows: LabelledRows, validation: LabelledRows | None) -> TeacherTexts:
    held_out = None if validation is None else encode(source.tokenizer, validation.texts, source.max_length)
    return TeacherTexts(
        encode(source.tokenizer, train_rows.texts, source.max_length), held_out, padding_id(source.tokenizer)
    )


def _own_rates(teachers: Opened) -> dict[str, float]:
    """The learning rates of teachers that have one of their own, by prefix of their parameters in the joint model.

    The shared head keeps ``cofinetune.learning_rate``.
    """
    rates = [known.section.learning_rate for known in teachers.trained.values()]
    return {
        f"{number}.{module}.": rate
        for number, rate in enumerate(rates)
        for module in ("encoder", "adapter")
        if rate is not None
    }


def _head(models: Mapping[str, TeacherModel]) -> list[nn.Parameter]:
    """The parameters of the shared head, which all ``models`` have."""
    head = next(iter(models.values())).head
    assert head is not None
    return list(head.parameters())


def _checkpoint_activations(network: PreTrainedModel) -> None:
    """Recompute activations in the backward pass; transformers 5 renamed the method."""
    enable = getattr(network, "activation_checkpointing_enable", None) or network.gradient_checkpointing_enable
    enable({"use_reentrant": False})


@dataclass(frozen=True)
class TeacherTexts:
    """The labelled rows of train and, if any, of validation, in one teacher's tokens."""

    train: EncodedTexts
    validation: EncodedTexts | None
    pad_token_id: int


@dataclass(frozen=True)
class Labels:
    """int64[n] per split, aligned with ``TeacherTexts``."""

    train: np.ndarray
    validation: np.ndarray | None


class CofinetuneTask:
    """Trains ``models`` together; frozen parameters stay frozen.

    ``every``: the names of the teachers of all processes, where each process has others; None where each has them all.
    """

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
        every: Sequence[str] | None = None,
    ) -> None:
        self._apart, self._names = every is not None, list(models if every is None else every)
        numbers = {name: str(number) for number, name in enumerate(self._names)}
        self.model: nn.Module = nn.ModuleDict({numbers[name]: model for name, model in models.items()})
        self.steps_per_epoch = math.ceil(len(labels.train) / batch_size)
        self._models, self._texts, self._labels = models, texts, labels
        self._batch_size, self._accumulation, self._select_by, self._seed = batch_size, accumulation, select_by, seed
        self._best, self._note, self._processes = best, note, current()

    def batches(self, epoch: int, first_step: int) -> Iterator[np.ndarray]:
        """Rows of each batch over all processes, in an order that is a pure function of seed and epoch."""
        order = np.random.default_rng([self._seed, epoch]).permutation(len(self._labels.train))
        for first in range(first_step * self._batch_size, len(order), self._batch_size):
            yield order[first : first + self._batch_size]

    def losses(self, batch: np.ndarray) -> Iterator[tuple[Tensor, Mapping[str, float | Tensor]]]:
        """Losses by teacher and micro-batch of this process's share; their sum over all is L_cf of the batch."""
        share = batch if self._apart else batch[self._processes.share(len(batch))]
        others = {f"ce.{name}": 0.0 for name in self._names} if self._apart else {}  # the same terms in all processes
        for name, model in self._models.items() if len(share) else ():
            texts = self._texts[name]
            rows = share[np.argsort(texts.train.lengths[share], kind="stable")]
            for part in micro_batches(len(rows), self._accumulation):
                loss = self._cross_entropy(model, texts, rows[part]) * (len(rows[part]) / len(batch))
                yield loss, {**others, f"ce.{name}": loss.detach()}

    def _cross_entropy(self, model: TeacherModel, texts: TeacherTexts, rows: np.ndarray) -> Tensor:
        device = next(model.parameters()).device
        inputs = {key: sent(tensor, device) for key, tensor in pad(texts.train, rows, texts.pad_token_id).items()}
        labels = sent(torch.from_numpy(self._labels.train[rows]), device)
        logits = model(inputs).logits
        return functional.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels)

    def evaluate(self, epoch: int) -> dict[str, float]:
        """Scores of every teacher and of their mean probability on validation; empty without a validation split.

        ``score``, which selects the epoch, is ``select_by`` averaged over the teachers.
        """
        if self._labels.validation is None:
            return {}
        logits = {name: self._validation_logits(name) for name in self._models}
        if self._apart:
            every = united(logits)
            logits = {name: every[name] for name in self._names}
        by_teacher = score_teachers(logits, self._labels.validation)
        sign = -1.0 if self._select_by == "loss" else 1.0
        score = sign * sum(by_teacher[name][self._select_by] for name in self._names) / len(self._names)
        shown = ", ".join(f"{name} {values[self._select_by]:.4f}" for name, values in by_teacher.items())
        self._note(f"epoch {epoch + 1}, {self._select_by} on validation: {shown}")
        return {
            "score": score,
            **{
                f"validation.{name}.{key}": value
                for name, values in by_teacher.items()
                for key, value in values.items()
            },
        }

    def _validation_logits(self, name: str) -> np.ndarray:
        texts = self._texts[name]
        assert texts.validation is not None
        return predict(self._models[name], texts.validation, texts.pad_token_id)

    def keep_best(self, mark: int, metrics: Mapping[str, float]) -> None:
        """Keep the weights of all teachers and their scores."""
        state, scores = {"model": self.model.state_dict()}, {"metrics": dict(metrics)}
        if self._apart:
            self._best.keep_pieces(mark, scores, state, self._processes)
        else:
            self._best.keep(mark, state | scores)

    def settle_best(self, mark: int) -> None:
        """Remove the weights kept under other marks."""
        self._best.settle(mark)

    def load_best(self, mark: int) -> None:
        """Load the weights kept under ``mark`` into the teachers, in the processes that save them."""
        if self._processes.first or self._apart:
            self.model.load_state_dict(self._best.model(mark, self.model.state_dict().keys(), self._processes.rank))


def scores_by_epoch(metrics: MetricsLog, names: Iterable[str]) -> dict[str, list[dict[str, float]]]:
    """Per teacher, its scores on validation after each epoch, with the number of the ``epoch`` (from 1)."""
    lines = metrics.epochs()
    found: dict[str, list[dict[str, float]]] = {}
    for name in names:
        prefix = f"validation.{name}."
        own = [{key.removeprefix(prefix): line[key] for key in line if key.startswith(prefix)} for line in lines]
        found[name] = [{"epoch": line["epoch"], **scores} for line, scores in zip(lines, own, strict=True) if scores]
    return found


MEAN = "mean of teachers"  # not a possible name of a teacher


def score_teachers(logits: Mapping[str, np.ndarray], labels: np.ndarray) -> dict[str, dict[str, float]]:
    """Scores by teacher and, under ``MEAN``, of their mean probability; ``logits`` float32[n, classes] each."""
    by_teacher = {name: scores(labels, values) for name, values in logits.items()}
    probabilities = [torch.softmax(torch.from_numpy(values).double(), dim=1) for values in logits.values()]
    mean = torch.stack(probabilities).mean(dim=0).clamp_min(1e-300).log()  # its softmax is the mean
    return {**by_teacher, MEAN: scores(labels, mean.numpy())}
