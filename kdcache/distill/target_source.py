"""Where a student's batches come from: which teachers, which of their layers, cached or live or none.

Everything that the recipe chooses is checked against the cache here, before a model is trained on it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kdcache.cache.selection import Selection
from kdcache.data.encoding import encode, pad
from kdcache.errors import MismatchError, RecipeError
from kdcache.loader.cached import CachedBatches
from kdcache.loader.choice import chosen_teachers, target_dim
from kdcache.loader.data import with_data
from kdcache.loader.without_targets import PlainBatches
from kdcache.methods.parts.features import FITS
from kdcache.methods.parts.layer_map import LayerMap, LayersOfEpoch, TeacherLayers, layers_read
from kdcache.training.loop import default_device

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from kdcache.cache.reader import Cache
    from kdcache.distill.objective import ObjectiveSettings
    from kdcache.loader.data import StudentData
    from kdcache.loader.targets import TargetSource
    from kdcache.recipe import DistillSection
    from kdcache.students.build import Student

_LATENCY_TEXTS = 30
_THROUGHPUT_TEXTS = 96
_SECONDS = 2.0  # at most, for each of the two; a busy machine must not hold up the training


@dataclass(frozen=True)
class Speed:
    """Measured on this machine, after a warm-up, tokenisation left out. ``latency_ms``: median of single texts."""

    device: str
    latency_ms: float
    texts_per_second: float  # in batches of 32 texts


@dataclass(frozen=True)
class TeacherFacts:
    """What is known of a teacher that is at hand."""

    parameters: int
    speed: Speed


def open_source(
    section: DistillSection,
    settings: ObjectiveSettings,
    data: StudentData,
    student: Student,
    cache: Cache | None,
    live_teachers: Path | None,
    trusted: Collection[str] = (),
) -> TargetSource:
    """The source that the recipe asks for. Methods without teachers take no transfer texts: these carry no label.

    ``trusted``: names of the teachers whose own Python code may be run. Raises RecipeError where a method needs
    teachers and there is no cache; MismatchError where the cache lacks something.
    """
    uses_teachers = settings.method.uses_teachers
    common = {"batch_size": section.batch_size, "max_length": student.max_length, "seed": section.seed}
    if cache is None:
        if uses_teachers:
            raise RecipeError(
                f"method '{settings.method.name}' learns from teachers, and there is no cache",
                "Give the cache of their targets with --cache, or set distill.method = 'fine-tune'.",
            )
        return PlainBatches(data, student.tokenizer, **common)
    names, layer_map, layers_at = choose(section, settings, cache, student.model.depth)
    cache.select(Selection({name: layers_read(layer_map.get(name, ())) for name in names}))
    joined = with_data(cache, data)
    shared = common | {
        "window": section.window,
        "missing": section.missing,
        "with_transfer": uses_teachers and "transfer" in data.splits,
        "layer_map": layer_map,
        "layers_at": layers_at,
        "hidden": settings.needs_hidden,
        "logits": settings.needs_logits,
        "texts": None if cache.has_text_here else data.texts,
    }
    if live_teachers is not None and uses_teachers:
        return _live(joined, student.tokenizer, names, live_teachers, shared, trusted)
    return CachedBatches(joined, student.tokenizer, teachers=names, **shared)  # type: ignore[arg-type]  # plain keywords


def choose(
    section: DistillSection, settings: ObjectiveSettings, cache: Cache, student_layers: int
) -> tuple[tuple[str, ...], LayerMap, LayersOfEpoch | None]:
    """Teachers and layers: the layer map of the method or recipe, or what ``distill.teacher_layers`` says.

    Where the map changes from epoch to epoch, it names all layers that any epoch uses, and a function gives that of an
    epoch. A layer that the cache lacks is never replaced by another. Raises MismatchError naming the stored ones, and
    for layers whose stored vectors a term cannot use; RecipeError for lists of the wrong length and for teachers that
    are not used.
    """
    if not settings.method.uses_teachers:
        return (), {}, None
    names, _ = chosen_teachers(cache, section.teachers, None)
    if not settings.needs_hidden:
        return names, {}, None
    lists = _chosen_lists(section, names, student_layers)
    teachers = {
        name: TeacherLayers(cache.teachers[name].depth, tuple(sorted(cache.teachers[name].layers))) for name in names
    }
    mapping = settings.layer_map

    def layers_at(epoch: int) -> LayerMap:
        return mapping.layers(teachers, student_layers, seed=section.seed, epoch=epoch) | lists

    _, layer_map = chosen_teachers(cache, names, layers_at(0))
    if not any(layers_read(layers) for layers in layer_map.values()):
        raise RecipeError(
            f"method '{settings.method.name}' pairs no layer of a student with {student_layers} layers",
            "Take a student with more layers (student.layers), or name teacher layers with distill.teacher_layers.",
        )
    if mapping.per_epoch:
        layer_map = {name: teachers[name].stored for name in names} | lists
        _check_one_width(cache, layer_map)
    _check_stored_vectors(settings, cache, layer_map)
    return names, layer_map, layers_at if mapping.per_epoch else None


def _chosen_lists(section: DistillSection, names: Sequence[str], student_layers: int) -> LayerMap:
    """``distill.teacher_layers``, checked."""
    for name, layers in (section.teacher_layers or {}).items():
        if name not in names:
            raise RecipeError(
                f"distill.teacher_layers names teacher '{name}', which is not used; used are: {', '.join(names)}",
                "Take it out there, or add it to distill.teachers.",
            )
        if len(layers) != student_layers:
            raise RecipeError(
                f"distill.teacher_layers gives {len(layers)} layers for teacher '{name}'; the student has "
                f"{student_layers} layers",
                "Name one teacher layer for each student layer.",
            )
    return {name: tuple(layers) for name, layers in (section.teacher_layers or {}).items()}


def _check_one_width(cache: Cache, layer_map: LayerMap) -> None:
    """Layers that take turns share a projection, so their targets must be equally wide."""
    for name, layers in layer_map.items():
        widths = {layer: target_dim(cache, name, layer) for layer in layers_read(layers)}
        if len(set(widths.values())) > 1:
            told = ", ".join(f"layer {layer}: {width}" for layer, width in widths.items())
            raise MismatchError(
                f"layers of teacher '{name}' in cache '{cache.path}' have different widths ({told}), so they cannot "
                "take turns",
                'Choose distill.layer_map = "even", or dump all layers with one dim.',
            )


def _check_stored_vectors(settings: ObjectiveSettings, cache: Cache, layer_map: LayerMap) -> None:
    used = [(name, layer) for name, layers in layer_map.items() for layer in layers_read(layers)]
    for term in settings.terms:
        for name, layer in used if term.needs.hidden else ():
            assert term.needs.hidden is not None
            stored, usable = cache.teachers[name].layers[layer].tokens, FITS[term.needs.hidden]
            if stored not in usable:
                raise MismatchError(
                    f"the term '{term.name}' of method '{settings.method.name}' needs {_VECTORS[term.needs.hidden]}; "
                    "cache "
                    f"'{cache.path}' holds {_STORED[stored]} for layer {layer} of teacher '{name}'",
                    f"Dump it with dump.tokens = {' or '.join(f'{tokens!r}' for tokens in usable)}, or choose another "
                    "method.",
                )


_VECTORS = {"tokens": "a vector for every token", "first": "the first token's vector", "mean": "the mean of the tokens"}
_STORED = {"all": "a vector for every token", "first": "the first token's vector", "pooled": "the mean of the tokens"}


def _live(
    cache: Cache,
    tokenizer: PreTrainedTokenizerBase,
    names: Sequence[str],
    directory: Path,
    options: Mapping[str, object],
    trusted: Collection[str],
) -> TargetSource:
    from kdcache.loader.live import LiveBatches
    from kdcache.teachers.bundle import load_teacher

    teachers = [load_teacher(directory, name, trust_remote_code=name in trusted) for name in names]
    return LiveBatches(cache, tokenizer, teachers=teachers, **options)  # type: ignore[arg-type]  # plain keywords


def teachers_beside(cache: Path | None, run_root: Path) -> Path | None:
    """The directory of co-finetuned teachers that is at hand: the run's own, or the one beside the cache."""
    from kdcache.teachers.bundle import is_bundle

    candidates = [run_root / "teachers", *([cache.parent / "teachers"] if cache is not None else [])]
    return next((directory for directory in candidates if is_bundle(directory)), None)


def check_teachers(
    directory: Path | None,
    cache: Cache | None,
    names: Sequence[str],
    texts: Sequence[tuple[str, ...]],
    trusted: Collection[str] = (),
) -> dict[str, TeacherFacts]:
    """Compare the teachers at hand, files and all, with those of the cache, and measure them one at a time on
    ``texts``.

    Raises MismatchError where one is another: then the cache would teach what these teachers do not say.
    """
    from kdcache.teachers.bundle import load_teacher, teacher_names

    if directory is None or cache is None or not names:
        return {}
    known, facts = teacher_names(directory), {}
    for name in [name for name in names if name in known]:
        teacher = load_teacher(directory, name, trust_remote_code=name in trusted)
        stored, found = asdict(cache.teachers[name].fingerprints), asdict(teacher.fingerprints)
        differing = [
            f"{key} ({stored[key][:12]} in the cache, {found[key][:12]} there)"
            for key in stored
            if stored[key] != found[key]
        ]
        if differing:
            raise MismatchError(
                f"teacher '{name}' in '{directory}' is not the one of cache '{cache.path}'; they differ in "
                f"{', '.join(differing)}",
                "Dump again with kdcache dump-teachers, or move those teachers away from beside the cache.",
            )
        parameters = sum(parameter.numel() for parameter in teacher.model.parameters())
        facts[name] = TeacherFacts(
            parameters, measure_speed(teacher.model, teacher.tokenizer, teacher.max_length, texts)
        )
    return facts


def measure_speed(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, max_length: int, texts: Sequence[tuple[str, ...]]
) -> Speed:
    """Median milliseconds of a single text, and texts per second in batches of 32, on the device that training would
    take.
    """
    import torch

    device = default_device()
    model.to(device).eval()
    texts = texts[:_THROUGHPUT_TEXTS]
    encoded, padding = encode(tokenizer, texts, max_length), int(tokenizer.pad_token_id or 0)

    def seconds(rows: Sequence[int]) -> float:
        inputs = {name: tensor.to(device) for name, tensor in pad(encoded, rows, padding).items()}
        started = time.perf_counter()
        model(inputs).logits.cpu()  # the copy waits for the device
        return time.perf_counter() - started

    def measured(batches: Sequence[Sequence[int]]) -> list[tuple[int, float]]:
        """(texts, seconds) of each batch, as many as fit into the time allowed, one at least."""
        found, ends = [], time.perf_counter() + _SECONDS
        for rows in batches:
            found.append((len(rows), seconds(rows)))
            if time.perf_counter() > ends:
                break
        return found

    with torch.no_grad():
        seconds([0]), seconds([0])
        singles = measured([[row] for row in range(min(len(texts), _LATENCY_TEXTS))])
        whole = measured([range(first, min(first + 32, len(texts))) for first in range(0, len(texts), 32)])
    latency = statistics.median(time_taken for _, time_taken in singles)
    rate = sum(count for count, _ in whole) / sum(time_taken for _, time_taken in whole)
    return Speed(device.type, round(1000 * latency, 3), round(rate, 1))
