"""What a dump would run and write, and how long it would take: ``dump-teachers --dry-run``.

Rows, tokens and bytes are counted: every missing text is tokenised. Minutes come from timing each teacher on a few
batches on this machine. Nothing is written to the cache.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kdcache.cache.ids import IdIndex, id_array, id_list
from kdcache.cache.layout import MANIFEST
from kdcache.cache.reader import open_cache
from kdcache.cache.spec import Settings, needs_tokens
from kdcache.cache.stale import check_task as check_cache_task
from kdcache.cache.stale import check_teacher
from kdcache.cache.text_table import TextTable, ids_of_texts, list_of
from kdcache.data.encoding import count_tokens, encode, truncation_note
from kdcache.data.task import load_task
from kdcache.dump.run import open_teacher, text_batches
from kdcache.dump.specs import (
    NO_IDS,
    PreparedTeacher,
    check_counts,
    check_task,
    folds_notes,
    hidden_bytes,
    outputs_bytes,
    prepare_teachers,
    scopes,
    settings_of,
    task_spec,
    tokens_bytes,
)
from kdcache.dump.student_texts import TruncationPlan, student_truncation
from kdcache.errors import StorageError
from kdcache.progress import format_bytes, format_seconds
from kdcache.teachers.bundle import read_bundle

if TYPE_CHECKING:
    from kdcache.cache.reader import Cache
    from kdcache.cache.spec import Scope, TaskSpec, TeacherSpec
    from kdcache.cache.writer import CacheWriter, PartTask
    from kdcache.data.counts import DataCounts
    from kdcache.progress import Progress
    from kdcache.recipe import Recipe

_TIMED_TEXTS = 512
_TIMED_SECONDS = 5.0
_SAMPLED_TEXTS = 256  # for the check of free space at the start of a dump

Text = tuple[str, ...]


@dataclass(frozen=True)
class TeacherDryRun:
    """The work for one teacher. ``hidden`` is bytes by layer; ``stored_layers`` are in the cache already."""

    teacher: str
    texts: int
    tokens: int
    hidden: Mapping[int, int]
    outputs: int
    spans: int
    seconds: float
    stored_layers: tuple[int, ...]
    truncated: int = 0  # of ``texts``
    max_length: int = 0

    @property
    def bytes(self) -> int:
        return sum(self.hidden.values()) + self.outputs + self.spans

    def as_dict(self) -> dict[str, Any]:
        """The JSON document."""
        return {
            "texts": self.texts,
            "texts_truncated": self.truncated,
            "tokens": self.tokens,
            "bytes": {
                "hidden": {str(layer): size for layer, size in self.hidden.items()},
                "outputs": self.outputs,
                "tokens": self.spans,
            },
            "seconds": round(self.seconds, 1),
            "layers_in_cache": list(self.stored_layers),
        }

    def lines(self) -> list[str]:
        """Text for the terminal."""
        if not self.texts:
            return [f"{self.teacher}: nothing is missing"]
        cut = truncation_note(f"teacher '{self.teacher}'", self.truncated, self.texts, self.max_length)
        return [
            f"{self.teacher}: {self.texts:,} texts, {self.tokens:,} tokens, {format_bytes(self.bytes)}, "
            f"about {format_seconds(self.seconds)}",
            *(f"  {line}" for line in cut),
            *(f"  layer {layer}: {format_bytes(size)}" for layer, size in self.hidden.items()),
            f"  logits and pooled vectors: {format_bytes(self.outputs)}; token spans: {format_bytes(self.spans)}",
        ]


@dataclass(frozen=True)
class DryRun:
    """The whole dump. ``existing_texts`` and ``existing_teachers`` are in the cache; ``free`` bytes on its disk."""

    cache: Path
    counts: DataCounts
    full_texts: int
    logits_texts: int
    existing_texts: int
    existing_teachers: tuple[str, ...]
    teachers: tuple[TeacherDryRun, ...]
    free: int
    student: TruncationPlan | None = None

    @property
    def bytes(self) -> int:
        return sum(teacher.bytes for teacher in self.teachers)

    @property
    def seconds(self) -> float:
        return sum(teacher.seconds for teacher in self.teachers)

    def as_dict(self) -> dict[str, Any]:
        """The document that ``--json`` prints."""
        return {
            "cache": str(self.cache),
            "data": self.counts.as_dict(),
            "texts": {"full": self.full_texts, "logits_only": self.logits_texts, "in_cache": self.existing_texts},
            "teachers_in_cache": list(self.existing_teachers),
            "teachers": {teacher.teacher: teacher.as_dict() for teacher in self.teachers},
            "bytes": self.bytes,
            "minutes": round(self.seconds / 60, 1),
            "free_bytes": self.free,
            "student": None if self.student is None else self.student.as_dict(),
        }

    def lines(self) -> list[str]:
        """Text for the terminal."""
        there = ", ".join(self.existing_teachers) or "none"
        return [
            *self.counts.lines(),
            f"texts: {self.full_texts:,} with hidden states, {self.logits_texts:,} with logits only; "
            f"{self.existing_texts:,} of them in the cache already (teachers there: {there})",
            *(line for teacher in self.teachers for line in teacher.lines()),
            *(() if self.student is None else self.student.lines()),
            f"together: {format_bytes(self.bytes)}, about {format_seconds(self.seconds)}; free on the disk: "
            f"{format_bytes(self.free)}",
        ]


def estimate_dump(recipe: Recipe, teachers_dir: Path, cache_dir: Path, *, progress: Progress) -> DryRun:
    """What ``dump_teachers`` with the same arguments would do; raises what it would raise before a teacher runs.

    Parts of an interrupted dump that is not published are not subtracted.
    """
    task = load_task(recipe.data)
    bundle = read_bundle(teachers_dir)
    check_task(task, bundle, teachers_dir)
    teachers = prepare_teachers(recipe, bundle, teachers_dir, len(task.label_names))
    for line in folds_notes(teachers):
        progress.note(line)
    cache = _published(cache_dir)
    if cache is not None:
        _refuse_stale(cache, recipe, task_spec(task), teachers)
    there = np.concatenate([NO_IDS, *(_ids(cache, "full") if cache is not None else ())])
    wanted = scopes(task, recipe.dump.hidden_transfer, there)
    check_counts(settings_of(recipe.dump, len(task.texts), cache_dir), teachers, wanted)
    full, logits_only = wanted.full, wanted.logits_only
    new_full, new_logits = _unknown(cache, full, "full"), _unknown(cache, logits_only, "logits")
    counted = []
    for teacher in teachers:
        groups = _missing_groups(cache, teacher.spec, new_full, new_logits)
        counted.append(_count_teacher(teacher, cache, groups, teachers_dir, recipe.dump.shared_batch_tokens, progress))
    existing = tuple(cache.teachers) if cache is not None else ()
    known = len(full) + len(logits_only) - len(new_full) - len(new_logits)
    student = student_truncation(recipe, teachers_dir, teachers, wanted.trained_on)
    counts, free = task.counts, free_bytes(cache_dir)
    return DryRun(cache_dir, counts, len(full), len(logits_only), known, existing, tuple(counted), free, student)


def check_free_space(
    writer: CacheWriter, teachers: Sequence[PreparedTeacher], missing: Mapping[str, Sequence[PartTask]]
) -> None:
    """StorageError if the missing parts need more bytes than the disk has free; tokens are estimated on a few texts."""
    needed = 0
    for teacher in teachers:
        tasks = missing[teacher.name]
        with_layers = [task for task in tasks if task.layers]
        per_text = (
            _tokens_per_text(teacher, writer.texts_of(with_layers[0].part)[:_SAMPLED_TEXTS]) if with_layers else 0.0
        )
        for task in tasks:
            texts = len(task.part.text_ids)
            needed += outputs_bytes(texts, teacher.spec) if task.outputs else 0
            needed += sum(
                hidden_bytes(int(per_text * texts), texts, teacher.spec.layers[layer]) for layer in task.layers
            )
    free = free_bytes(writer.root)
    if needed > free:
        raise StorageError(
            f"the dump needs about {format_bytes(needed)}, but the disk of '{writer.root}' has {format_bytes(free)} "
            "free",
            'Free some space, or store less: dump.dtype = "int8", a smaller dump.dim, fewer dump.layers '
            "(kdcache dump-teachers --dry-run shows the bytes of each).",
        )


def free_bytes(path: Path) -> int:
    """Free bytes of the disk of ``path``, which need not exist."""
    place = path.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def _tokens_per_text(teacher: PreparedTeacher, texts: Sequence[Text]) -> float:
    return float(encode(teacher.tokenizer, texts, teacher.spec.max_length).lengths.mean())


@dataclass(frozen=True)
class _Group:
    """Texts that lack the same outputs and layers."""

    texts: Sequence[Text]
    outputs: bool
    layers: tuple[int, ...]


def _published(cache_dir: Path) -> Cache | None:
    return open_cache(cache_dir) if (cache_dir / MANIFEST).is_file() else None


def _refuse_stale(cache: Cache, recipe: Recipe, task: TaskSpec, teachers: Sequence[PreparedTeacher]) -> None:
    settings = Settings(recipe.dump.seed, recipe.dump.part_size or cache.settings.part_size)
    check_cache_task(cache.path, (cache.task, cache.settings, cache.has_text), (task, settings, cache.has_text))
    for teacher in teachers:
        old = cache.teachers.get(teacher.name)
        if old is not None:
            check_teacher(cache.path, old, teacher.spec, set(old.layers), published=set(old.layers))


def _unknown(cache: Cache | None, texts: Mapping[bytes, Text], scope: Scope) -> Sequence[Text]:
    """The texts that the cache lacks in parts of that scope."""
    known = [] if cache is None or not texts else _ids(cache, scope)
    if not known:
        return list_of(texts)
    index = IdIndex(np.concatenate(known))
    ids = ids_of_texts(texts)
    new = ids[index.find(ids) < 0]
    if isinstance(texts, TextTable):
        return texts.view(new).texts()
    return [texts[one] for one in id_list(new)]


def _ids(cache: Cache, scope: Scope) -> list[np.ndarray]:
    """Ids uint8[n, 16] per part, of texts that have at least what ``scope`` asks for."""
    return [cache.text_ids(part.name) for part in cache.parts if scope == "logits" or part.scope == "full"]


def _missing_groups(
    cache: Cache | None, spec: TeacherSpec, new_full: Sequence[Text], new_logits: Sequence[Text]
) -> list[_Group]:
    """What a dump would have to run, in its order."""
    groups = []
    old = None if cache is None else cache.teachers.get(spec.name)
    for part in () if cache is None else cache.parts:
        layers = tuple(spec.layers.keys() - (old.layers if old else {})) if part.scope == "full" else ()
        if cache is not None and (old is None or layers):
            groups.append(_Group(cache.texts(part.name), old is None, layers))
    groups += [_Group(new_full, True, tuple(spec.layers)), _Group(new_logits, True, ())]
    return [group for group in groups if group.texts]


def _count_teacher(
    teacher: PreparedTeacher,
    cache: Cache | None,
    groups: Sequence[_Group],
    teachers_dir: Path,
    tokens_per_batch: int,
    progress: Progress,
) -> TeacherDryRun:
    spec = teacher.spec
    stored = cache.teachers[spec.name].layers if cache is not None and spec.name in cache.teachers else {}
    hidden = {layer: 0 for group in groups for layer in sorted(group.layers)}
    texts = tokens = outputs = spans = full = truncated = 0
    for group in groups:
        count, cut = count_tokens(teacher.tokenizer, group.texts, spec.max_length)
        truncated += cut
        texts, tokens = texts + len(group.texts), tokens + count
        outputs += outputs_bytes(len(group.texts), spec) if group.outputs else 0
        wanted = {layer: spec.layers[layer] for layer in group.layers}
        spans += tokens_bytes(count, len(group.texts)) if group.outputs and needs_tokens(wanted) else 0
        full += len(group.texts) if group.layers else 0
        for layer in group.layers:
            hidden[layer] += hidden_bytes(count, len(group.texts), spec.layers[layer])
    seconds = 0.0
    if texts:
        fitted_on = min(spec.sample_texts, full) if spec.layers.keys() - stored.keys() else 0
        progress.note(f"timing teacher '{spec.name}' on a few batches")
        per_token = _seconds_per_token(teacher, groups[0], teachers_dir, tokens_per_batch)
        seconds = per_token * tokens * (1 + fitted_on / texts)
    layers = tuple(sorted(stored))
    return TeacherDryRun(spec.name, texts, tokens, hidden, outputs, spans, seconds, layers, truncated, spec.max_length)


def _seconds_per_token(teacher: PreparedTeacher, group: _Group, teachers_dir: Path, tokens_per_batch: int) -> float:
    """Wall time per token without padding, over a few batches after a first one that warms up."""
    texts = group.texts[:_TIMED_TEXTS]
    batches = text_batches(teacher, texts, id_array([bytes(16)] * len(texts)), tokens_per_batch)
    with open_teacher(teacher, teachers_dir) as backend:
        next(batches.run(backend, group.layers))
        began = time.perf_counter()
        tokens = 0
        for rows, output in batches.run(backend, group.layers):
            output.logits.cpu()  # waits for the device
            tokens += int(batches.encoded.lengths[rows].sum())
            if time.perf_counter() - began > _TIMED_SECONDS:
                break
        return (time.perf_counter() - began) / max(tokens, 1)
