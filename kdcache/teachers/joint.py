"""One joint training, from the task's rows to the best epoch's weights in the models that were passed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdcache.data.encoding import encode
from kdcache.errors import DataError
from kdcache.teachers.sources import TOKEN_TYPES
from kdcache.teachers.trainee import JointTrainee, Labels, TeacherTexts
from kdcache.training import loop
from kdcache.training.best_epoch import BestEpoch

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedModel

    from kdcache.data.task import Examples, TaskData
    from kdcache.progress import Progress
    from kdcache.recipe import CofinetuneSection, Recipe
    from kdcache.teachers.sources import Source
    from kdcache.teachers.teacher import TeacherModel
    from kdcache.training.metrics_log import MetricsLog

_FREE = {"checkpoint_steps", "gradient_checkpointing"}  # settings that do not change the outcome


@dataclass(frozen=True)
class LabelledRows:
    """The rows of a split that have a label: their texts, and labels int64[n]."""

    texts: list[tuple[str, ...]]
    labels: np.ndarray


def labelled_rows(task: TaskData, split: str) -> LabelledRows | None:
    """The labelled rows of a split, None where it is not there or has none."""
    examples = task.splits.get(split)
    if examples is None:
        return None
    known = examples.labels >= 0
    texts = [task.texts[row.tobytes()] for row in examples.text_ids[known]]
    return LabelledRows(texts, examples.labels[known]) if texts else None


def identity(recipe: Recipe, task: TaskData, sources: Mapping[str, Source], *, shared_head: str | None = None) -> dict[str, Any]:
    """All that the teachers depend on, flat, so that a mismatch names one key. ``shared_head`` is the digest of a frozen one."""
    settings = recipe.cofinetune.model_dump(mode="json", exclude=_FREE)
    splits = {f"data.{name}": _digest(task.splits[name]) for name in ("train", "validation") if name in task.splits}
    teachers = {f"teachers.{name}.{key}": value for name, source in sources.items() for key, value in source.identity().items()}
    head = {} if shared_head is None else {"shared_head": shared_head}
    names = {"data.labels": list(task.label_names), "data.text": list(task.text_columns)}
    return {**{f"cofinetune.{key}": value for key, value in settings.items()}, **names, **splits, **teachers, **head}


def newer_keys(identity: Mapping[str, Any]) -> frozenset[str]:
    """Keys of ``identity`` that kdcache 0.1.0 did not record; where they are absent, they are not compared."""
    return frozenset(key for key in identity if key.startswith("teachers.") and key.endswith(f".{TOKEN_TYPES}"))


def _digest(examples: Examples) -> str:
    return hashlib.sha256(examples.text_ids.tobytes() + examples.labels.astype("<i8").tobytes()).hexdigest()


def train(
    settings: CofinetuneSection,
    task: TaskData,
    sources: Mapping[str, Source],
    models: Mapping[str, TeacherModel],
    identity: Mapping[str, Any],
    place: Path,
    *,
    progress: Progress,
    metrics: MetricsLog,
) -> int:
    """Train ``models`` (in place) and return the best epoch, counted from 1; its weights are what the models hold then."""
    train_rows, validation = labelled_rows(task, "train"), labelled_rows(task, "validation")
    if train_rows is None:
        raise DataError("train has no row with a label", "Co-finetuning needs labels; check data.label.")
    if validation is None:
        progress.note("there is no validation data: the last epoch is kept")
    texts = {name: _encoded(source, train_rows, validation) for name, source in sources.items()}
    if settings.gradient_checkpointing:
        for source in sources.values():
            _checkpoint_activations(source.network)
    trainee = JointTrainee(
        models,
        texts,
        Labels(train_rows.labels, None if validation is None else validation.labels),
        batch_size=settings.batch_size,
        accumulation=settings.accumulation,
        select_by=settings.select_by,
        seed=settings.seed,
        best=BestEpoch(place / "best", place, identity),
        note=progress.note,
    )
    loop_settings = loop.LoopSettings.from_section(settings, identity, newer_keys(identity))
    outcome = loop.train(trainee, loop_settings, checkpoints=place / "checkpoints", progress=progress, on_metrics=metrics)
    if outcome.best_epoch + 1 != settings.epochs:
        trainee.load_best(outcome.best_epoch)
    trainee.model.eval()
    return outcome.best_epoch + 1


def _encoded(source: Source, train_rows: LabelledRows, validation: LabelledRows | None) -> TeacherTexts:
    held_out = None if validation is None else encode(source.tokenizer, validation.texts, source.max_length)
    pad_token_id = source.tokenizer.pad_token_id
    assert isinstance(pad_token_id, int)  # checked when the source was opened
    return TeacherTexts(encode(source.tokenizer, train_rows.texts, source.max_length), held_out, pad_token_id)


def _checkpoint_activations(network: PreTrainedModel) -> None:
    """Recompute activations in the backward pass; transformers 5 renamed the method on the way."""
    enable = getattr(network, "activation_checkpointing_enable", None) or network.gradient_checkpointing_enable
    enable({"use_reentrant": False})
