"""What a dump shall store, computed before any teacher runs: specs that are compared with those of the cache.

Every teacher is loaded once for this: its fingerprints are computed from its files, not read from a record. Sizes in
bytes are exact for a given number of texts and tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from kdcache.cache.ids import ID_BYTES, IdIndex, id_list
from kdcache.cache.opening import existing_settings
from kdcache.cache.schema import MAX_FILES, MAX_PARTS
from kdcache.cache.spec import (
    COMPILED,
    FLOAT32_HEAD,
    Settings,
    TargetSpec,
    TaskSpec,
    TeacherSpec,
    check_same_task,
    chosen_part_size,
    needs_tokens,
)
from kdcache.cache.text_table import TextTable
from kdcache.codecs.registry import format_of
from kdcache.data.custom_code import code_not_run, wants_code
from kdcache.data.encoding import TRUNCATION, padding_id, tokenizer_json
from kdcache.dump.layers import check_names, layer_spec, resolve_layers
from kdcache.errors import ModelError, RecipeError, first_line
from kdcache.teachers.bundle import load_teacher
from kdcache.teachers.folds import choose_folds
from kdcache.teachers.head import head_modules
from kdcache.teachers.teacher import check_max_length
from kdcache.teachers.trial import first_token_sees_only_itself

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from kdcache.codecs.base import LayerSpec
    from kdcache.data.task import TaskData
    from kdcache.recipe import DumpSection, Recipe, TeacherSection
    from kdcache.teachers.bundle import Bundle
    from kdcache.teachers.folds import FoldLogits
    from kdcache.teachers.teacher import Teacher


_TEACHER_PREFIX = "teacher:"

Texts = Mapping[bytes, tuple[str, ...]]
NO_IDS = np.zeros((0, ID_BYTES), np.uint8)


@dataclass(frozen=True)
class TextScopes:
    """The texts of a dump by what is stored of them; each text is in one group.

    ``full``: logits and hidden states. ``evaluation``: validation and test texts, logits only. ``transfer``: transfer
    texts with logits only.
    """

    full: Texts
    evaluation: Texts
    transfer: Texts

    @property
    def logits_only(self) -> Texts:
        """All texts that get logits only."""
        if isinstance(self.evaluation, TextTable) and isinstance(self.transfer, TextTable):
            return self.evaluation | self.transfer
        return {**self.evaluation, **self.transfer}

    @property
    def trained_on(self) -> Sequence[tuple[str, ...]]:
        """Train and transfer texts."""
        if isinstance(self.full, TextTable) and isinstance(self.transfer, TextTable):
            return (self.full | self.transfer).texts()
        return [*self.full.values(), *self.transfer.values()]


@dataclass(frozen=True)
class PreparedTeacher:
    """A teacher without weights: its spec for the cache, and its tokenizer."""

    spec: TeacherSpec
    tokenizer: PreTrainedTokenizerBase
    tokenizer_json: str
    seed: int  # of random projections
    trust_remote_code: bool = False
    out_of_fold: FoldLogits | None = None  # the logits of train texts, where bundles without them were trained

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def pad_token_id(self) -> int:
        return padding_id(self.tokenizer)


def task_spec(task: TaskData) -> TaskSpec:
    """Columns and labels of the task."""
    return TaskSpec(text_columns=task.text_columns, label_names=task.label_names)


def scopes(task: TaskData, hidden_transfer: int | None = None, in_full: np.ndarray = NO_IDS) -> TextScopes:
    """What is stored of each text.

    Train texts get everything, validation and test texts logits only. ``hidden_transfer`` transfer texts get
    everything (None: all of them): those that the cache has ``in_full`` already, then the next ones in the seeded order
    of the task. So a larger number adds texts and never exchanges any.
    """
    if isinstance(task.texts, TextTable):
        return _scopes_of_table(task, task.texts, hidden_transfer, in_full)
    stored = set(id_list(in_full))
    ids = {split: [bytes(row) for row in examples.text_ids] for split, examples in task.splits.items()}
    full = {one: task.texts[one] for one in ids.get("train", ())}
    transfer = ids.pop("transfer", [])
    there = [one for one in transfer if one in stored]
    others = [one for one in transfer if one not in stored]
    new = others if hidden_transfer is None else others[: max(0, hidden_transfer - len(there))]
    chosen = {*there, *new}
    full |= {one: task.texts[one] for one in transfer if one in chosen}
    evaluation = {one: task.texts[one] for split, own in ids.items() if split != "train" for one in own}
    return TextScopes(
        full,
        {one: text for one, text in evaluation.items() if one not in full},
        {one: task.texts[one] for one in transfer if one not in chosen},
    )


def _scopes_of_table(task: TaskData, texts: TextTable, hidden_transfer: int | None, in_full: np.ndarray) -> TextScopes:
    """``scopes`` by arrays of ids, without an object for each text."""

    def distinct(ids: np.ndarray) -> np.ndarray:
        _, first = np.unique(texts.numbers(ids), return_index=True)
        return ids[np.sort(first)]

    splits = {split: examples.text_ids for split, examples in task.splits.items()}
    train, transfer = distinct(splits.pop("train", NO_IDS)), splits.pop("transfer", NO_IDS)
    there = IdIndex(in_full).find(transfer) >= 0
    new = np.flatnonzero(~there)
    chosen = there.copy()
    chosen[new if hidden_transfer is None else new[: max(0, hidden_transfer - int(there.sum()))]] = True
    full = np.concatenate([train, transfer[chosen]])
    evaluation = distinct(np.concatenate([NO_IDS, *splits.values()]))
    evaluation = evaluation[IdIndex(full).find(evaluation) < 0]
    return TextScopes(texts.view(full), texts.view(evaluation), texts.view(transfer[~chosen]))


def settings_of(dump: DumpSection, texts: int, cache_dir: Path) -> Settings:
    """Seed and part size: as the recipe has it, else that of the cache or dump in ``cache_dir``, else by ``texts``.

    So a dump that was begun continues in its parts, also where more texts would get larger ones now.
    """
    if dump.part_size is not None:
        return Settings(dump.seed, dump.part_size)
    there = existing_settings(cache_dir)
    return Settings(dump.seed, chosen_part_size(texts) if there is None else there.part_size)


def check_counts(settings: Settings, teachers: Sequence[PreparedTeacher], texts: TextScopes) -> None:
    """RecipeError if the cache would have more parts or files than one may have: before any teacher runs."""

    def parts(count: int) -> int:
        return -(-count // settings.part_size)

    full, logits = parts(len(texts.full)), parts(len(texts.evaluation)) + parts(len(texts.transfer))
    files = (2 + len(teachers)) * (full + logits) + full * sum(_files_of_layers(teacher.spec) for teacher in teachers)
    if full + logits > MAX_PARTS or files > MAX_FILES:
        enough = settings.part_size
        while max((full + logits) / MAX_PARTS, files / MAX_FILES) * settings.part_size > enough:
            enough *= 2
        raise RecipeError(
            f"the cache would have {files:,} files in {full + logits:,} parts of {settings.part_size:,} texts; it may "
            f"have {MAX_FILES:,} files in {MAX_PARTS:,} parts",
            f"Set dump.part_size = {enough} for a new cache, store fewer layers, or divide the texts among caches.",
        )


def _files_of_layers(spec: TeacherSpec) -> int:
    """Files of a teacher's layers in a part, with that of its tokens."""
    arrays = sum(len(format_of(layer).arrays(layer, 1)) for layer in spec.layers.values())
    return bool(arrays) + 2 * arrays + needs_tokens(spec.layers)


def check_task(task: TaskData, bundle: Bundle, teachers_dir: Path) -> None:
    """MismatchError if the teachers were trained on other text columns or labels than the data's."""
    cure = "Set data.text and data.labels as the teachers were trained, or train them again: kdcache cofinetune."
    check_same_task(task, bundle, ("the data", f"the teachers in '{teachers_dir}'"), cure)


def prepare_teachers(recipe: Recipe, bundle: Bundle, teachers_dir: Path, classes: int) -> list[PreparedTeacher]:
    """The recipe's teachers in order, one in memory at a time.

    Raises ModelError for a missing teacher, layer or dimension; MismatchError if its files changed since co-finetuning.
    """
    if not recipe.teachers:
        raise ModelError(
            f"recipe '{recipe.name}' names no teachers: there is nothing to dump", "Add a [[teachers]] table."
        )
    student_layers = student_depth(recipe, {name: record.depth for name, record in bundle.teachers.items()})
    asked = recipe.dump.out_of_fold
    if asked is None and recipe.cofinetune.folds is not None:
        asked = True  # a recipe with folds is not dumped without them
    dump = recipe.dump.model_copy(update={"out_of_fold": asked})
    teachers = [
        prepare(
            section.name, teachers_dir, dump, classes,
            max_length=section.max_length or recipe.data.max_length,
            layers=lambda teacher, section=section: layer_specs(recipe, section, teacher, student_layers),  # type: ignore[misc]
            trust_remote_code=section.trust_remote_code,
        )
        for section in recipe.teachers
    ]  # fmt: skip
    everywhere = sorted({layer for teacher in teachers for layer in teacher.spec.layers})
    check_names(
        recipe.dump.per_layer, everywhere, "dump.per_layer", "' or '".join(teacher.name for teacher in teachers)
    )
    return teachers


def folds_notes(teachers: Sequence[PreparedTeacher]) -> Iterator[str]:
    """A line for each teacher whose train texts get out-of-fold logits."""
    for teacher in teachers:
        if teacher.spec.folds is not None:
            yield (
                f"teacher '{teacher.name}': the logits of {teacher.spec.folds.texts:,} train texts come from "
                f"{len(teacher.spec.folds.weights)} bundles that did not see them"
            )


def student_depth(recipe: Recipe, teacher_depths: Mapping[str, int]) -> int | None:
    """K, the number of student layers; None if the recipe has no student."""
    student = recipe.student
    if student is None:
        return None
    if student.layers is not None:
        return student.layers if isinstance(student.layers, int) else len(student.layers)
    origin = student.init_from or ""
    if origin.startswith(_TEACHER_PREFIX):
        name = recipe.teacher(origin.removeprefix(_TEACHER_PREFIX)).name
        return teacher_depths.get(name)
    from transformers import AutoConfig

    try:
        config = (
            AutoConfig.for_model(**student.config)
            if student.config is not None
            else AutoConfig.from_pretrained(origin, trust_remote_code=student.trust_remote_code)
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        if wants_code(error):
            raise code_not_run(origin) from error
        reason = first_line(error)
        raise ModelError(
            f"the depth of the student '{origin or student.config}', which dump.layers needs, is not known: {reason}",
            "Set student.layers, or list the layers in dump.layers.",
        ) from error
    return int(config.num_hidden_layers)


def prepare(
    name: str,
    teachers_dir: Path,
    dump: DumpSection,
    classes: int,
    *,
    max_length: int,
    layers: Callable[[Teacher], Mapping[int, LayerSpec]],
    trust_remote_code: bool = False,
) -> PreparedTeacher:
    """One teacher with the settings of ``dump``; ``layers`` maps the loaded teacher to the layers to store.

    Raises as ``prepare_teachers``.
    """
    teacher = load_teacher(teachers_dir, name, trust_remote_code=trust_remote_code)
    check_max_length(name, teacher.model.encoder, max_length)
    folds = choose_folds(teachers_dir, name, max_length, asked=dump.out_of_fold)
    spec = TeacherSpec(
        name=name,
        head=teacher.head_kind,
        fingerprints=teacher.fingerprints,
        depth=teacher.depth,
        width=teacher.width,
        max_length=max_length,
        truncation=TRUNCATION,
        backend=dump.backend,
        precision=_with_head(dump.precision, teacher) + (COMPILED if dump.compile else ""),
        target=TargetSpec(shape=(classes,)),
        pooled=_pooled_width(teacher) if dump.pooled else None,
        sample_texts=dump.sample_texts,
        layers=layers(teacher),
        folds=None if folds is None else folds.spec,
    )
    _check_first_token(teacher, spec)
    teacher.model.to("meta")  # frees the weights before the next teacher is loaded
    return PreparedTeacher(
        spec, teacher.tokenizer, tokenizer_json(teacher.tokenizer), dump.seed, trust_remote_code, folds
    )


def _with_head(precision: str, teacher: Teacher) -> str:
    """The precision of a new dump; logits of half precision would be rounded, so the head runs in float32."""
    return precision + FLOAT32_HEAD if precision != "float32" and head_modules(teacher.model) else precision


def _check_first_token(teacher: Teacher, spec: TeacherSpec) -> None:
    """ModelError if a decoder's layer is stored for the first token, which sees nothing of the text."""
    layers = [layer for layer, layer_spec in spec.layers.items() if layer_spec.tokens == "first"]
    if not layers:
        return
    if first_token_sees_only_itself(teacher.model.encoder, teacher.tokenizer, spec.max_length):
        raise ModelError(
            f"teacher '{spec.name}' is a causal decoder: the first token, for which layer {layers[0]} would be stored, "
            "sees nothing of the text",
            'Set dump.tokens, or tokens of that layer, to "all" or "pooled".',
        )


def layer_specs(
    recipe: Recipe, section: TeacherSection, teacher: Teacher, student_layers: int | None
) -> dict[int, LayerSpec]:
    """The layers that the recipe stores of a teacher; RecipeError, ModelError if they do not fit."""
    setting = recipe.dump.layers if section.layers is None else section.layers
    layers = resolve_layers(setting, teacher.depth, student_layers, section.name)
    check_names(section.per_layer, layers, f"teachers.{section.name}.per_layer", section.name)
    return {layer: layer_spec(recipe, section, layer, teacher.depth, teacher.width) for layer in layers}


def _pooled_width(teacher: Teacher) -> int:
    """Width of the shared space, or, with an own head, of the first token's last state."""
    return teacher.width if teacher.model.head is None else teacher.model.head.width


_TOKEN = 4 + 4 + 1 + 1  # start, end, segment, role
_OFFSET = 8  # per text


def hidden_bytes(tokens: int, texts: int, spec: LayerSpec) -> int:
    """Bytes of one layer of ``texts`` texts with ``tokens`` tokens in total."""
    return (texts if spec.per_text else tokens) * format_of(spec).row_bytes(spec)


def outputs_bytes(texts: int, spec: TeacherSpec) -> int:
    """Bytes of logits and pooled vectors of ``texts`` texts."""
    return texts * 4 * (sum(spec.target.shape) + (spec.pooled or 0))


def tokens_bytes(tokens: int, texts: int) -> int:
    """Bytes of spans, segments and roles."""
    return tokens * _TOKEN + (texts + 1) * _OFFSET
