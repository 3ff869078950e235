"""The choice of a student's target source: which teachers and layers, cached, live or none.

Everything that the recipe chooses is checked against the cache here, before training starts.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from kdcache.cache.selection import Selection
from kdcache.errors import MismatchError, RecipeError
from kdcache.loading.cached import CachedBatches
from kdcache.loading.choice import TargetChoice, check_teacher_names, chosen_window, target_dim
from kdcache.loading.order import BatchSettings
from kdcache.loading.without_targets import PlainBatches
from kdcache.methods.parts.features import FITS
from kdcache.methods.parts.layer_map import TeacherLayers
from kdcache.training.processes import current

if TYPE_CHECKING:
    from kdcache.cache.reader import Cache
    from kdcache.distill.objective import ObjectiveSettings
    from kdcache.loading.data import StudentData
    from kdcache.loading.targets import TargetSource
    from kdcache.methods.parts.layer_map import LayerMap
    from kdcache.recipe import DistillSection
    from kdcache.students.model import Student


def open_source(
    section: DistillSection,
    settings: ObjectiveSettings,
    data: StudentData,
    student: Student,
    cache: Cache | None,
    live_teachers: Path | None,
    trusted: Collection[str] = (),
) -> TargetSource:
    """The source that the recipe asks for. Methods without teachers take no transfer texts, which have no labels.

    With several processes, it gives the share of this one. ``trusted``: names of the teachers whose own Python code
    may be run. Raises RecipeError where a method needs teachers and there is no cache; MismatchError where the cache
    lacks something.
    """
    uses_teachers = settings.method.uses_teachers
    processes = current()
    batches = BatchSettings(
        section.batch_size,
        student.max_length,
        section.seed,
        chosen_window(cache) if section.window is None else section.window,
        section.missing,
        processes.rank,
        processes.world,
        every_row=True,
    )
    if cache is None:
        if uses_teachers:
            raise RecipeError(
                f"method '{settings.method.name}' learns from teachers, and there is no cache",
                "Give the cache of their targets with --cache, or set distill.method = 'fine-tune'.",
            )
        return PlainBatches(data, student.tokenizer, batches)
    choice = choose(section, settings, cache, student.model.depth)
    cache.select(Selection({name: choice.used.get(name, ()) for name in choice.teachers}))
    splits = ("train", "transfer") if uses_teachers and "transfer" in data.splits else ("train",)
    texts = None if cache.has_text_here else data.texts
    if live_teachers is None or not uses_teachers:
        return CachedBatches(
            cache, student.tokenizer, batches, choice, splits=splits, examples=data.examples, texts=texts
        )
    from kdcache.loading.live import LiveBatches
    from kdcache.teachers.bundle import load_teacher
    from kdcache.teachers.folds import folds_of_cache

    folds = {name: folds_of_cache(live_teachers, name, cache.teachers[name].folds) for name in choice.teachers}
    teachers = [load_teacher(live_teachers, name, trust_remote_code=name in trusted) for name in choice.teachers]
    return LiveBatches(
        cache, student.tokenizer, batches, choice, teachers, splits=splits, examples=data.examples, texts=texts,
        out_of_fold={name: found for name, found in folds.items() if found is not None},
    )  # fmt: skip


def choose(section: DistillSection, settings: ObjectiveSettings, cache: Cache, student_layers: int) -> TargetChoice:
    """Teachers and layers: the layer map of the method or recipe, or ``distill.teacher_layers``.

    A layer that the cache lacks is never replaced by another. Raises MismatchError naming the stored ones, and for
    layers whose stored vectors a term cannot use; RecipeError for lists of the wrong length and for teachers that are
    not used.
    """
    if not settings.method.uses_teachers:
        return TargetChoice((), logits=settings.needs_logits)
    names = tuple(cache.teachers if section.teachers is None else section.teachers)
    check_teacher_names(cache, names)
    if not settings.needs_hidden:
        return TargetChoice(names, logits=settings.needs_logits)
    lists = _chosen_lists(section, names, student_layers)
    teachers = {
        name: TeacherLayers(cache.teachers[name].depth, tuple(sorted(cache.teachers[name].layers))) for name in names
    }
    mapping = settings.layer_map

    def layers_at(epoch: int) -> LayerMap:
        return mapping.layers(teachers, student_layers, seed=section.seed, epoch=epoch) | lists

    choice = TargetChoice(names, layers_at(0), logits=settings.needs_logits)
    choice.check(cache)
    if not any(choice.used.values()):
        raise RecipeError(
            f"method '{settings.method.name}' pairs no layer of a student with {student_layers} layers",
            "Take a student with more layers (student.layers), or name teacher layers with distill.teacher_layers.",
        )
    if mapping.per_epoch:
        every_layer = {name: teachers[name].stored for name in names} | lists
        choice = replace(choice, layer_map=every_layer, layers_at=layers_at)
        _check_one_width(cache, choice)
    _check_stored_vectors(settings, cache, choice)
    return choice


def _chosen_lists(section: DistillSection, names: Sequence[str], student_layers: int) -> LayerMap:
    """``distill.teacher_layers``, checked."""
    for name, layers in (section.teacher_layers or {}).items():
        if name not in names:
            raise RecipeError(
                f"distill.teacher_layers names teacher '{name}', which is not used; used are: {', '.join(names)}",
                "Remove it there, or add it to distill.teachers.",
            )
        if len(layers) != student_layers:
            raise RecipeError(
                f"distill.teacher_layers gives {len(layers)} layers for teacher '{name}'; the student has "
                f"{student_layers} layers",
                "Name one teacher layer for each student layer.",
            )
    return {name: tuple(layers) for name, layers in (section.teacher_layers or {}).items()}


def _check_one_width(cache: Cache, choice: TargetChoice) -> None:
    """Layers that alternate between epochs share a projection, so their targets must be equally wide."""
    for name, layers in choice.used.items():
        widths = {layer: target_dim(cache, name, layer) for layer in layers}
        if len(set(widths.values())) > 1:
            shown = ", ".join(f"layer {layer}: {width}" for layer, width in widths.items())
            raise MismatchError(
                f"layers of teacher '{name}' in cache '{cache.path}' have different widths ({shown}), so they cannot "
                "take turns",
                'Choose distill.layer_map = "even", or dump all layers with one dim.',
            )


def _check_stored_vectors(settings: ObjectiveSettings, cache: Cache, choice: TargetChoice) -> None:
    used = [(name, layer) for name, layers in choice.used.items() for layer in layers]
    for term in settings.terms:
        needed = term.needs.hidden
        for name, layer in used if needed else ():
            assert needed is not None
            stored, usable = cache.teachers[name].layers[layer].tokens, FITS[needed]
            if stored not in usable:
                raise MismatchError(
                    f"the term '{term.name}' of method '{settings.method.name}' needs {_VECTORS[needed]}; cache "
                    f"'{cache.path}' holds {_STORED[stored]} for layer {layer} of teacher '{name}'",
                    f"Dump it with dump.tokens = {' or '.join(f'{tokens!r}' for tokens in usable)}, or choose another "
                    "method.",
                )


_VECTORS = {"tokens": "a vector for every token", "first": "the first token's vector", "mean": "the mean of the tokens"}
_STORED = {"all": "a vector for every token", "first": "the first token's vector", "pooled": "the mean of the tokens"}
