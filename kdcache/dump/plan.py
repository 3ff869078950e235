"""What to store: the bytes and the fidelity of every storage format of every layer, and the best choice for a budget.

    kdcache plan RECIPE --budget 2GB

Each teacher runs once over a seeded sample of texts: most are for fitting bases, the rest for measuring fidelity.
The duration of this pass gives the estimate for the dump. ``recommend`` solves a knapsack problem greedily along each
layer's convex hull of variance over bytes, which is optimal but for the last step.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kdcache.cache.ids import id_array
from kdcache.cache.spec import needs_tokens
from kdcache.cache.text_table import list_of
from kdcache.codecs.registry import format_of, storage_formats
from kdcache.codecs.token_selection import select_tokens
from kdcache.data.encoding import count_tokens
from kdcache.data.task import load_task
from kdcache.dump.fidelity import Fidelity, candidates, measure, rebuilt, soft_label_kl
from kdcache.dump.fitting import Sample, fit_basis
from kdcache.dump.fold_costs import FoldsPlan, folds_plan, without_folds
from kdcache.dump.run import text_batches
from kdcache.dump.specs import (
    PreparedTeacher,
    check_task,
    hidden_bytes,
    outputs_bytes,
    prepare_teachers,
    scopes,
    tokens_bytes,
)
from kdcache.dump.student_texts import TruncationPlan, student_truncation
from kdcache.errors import DataError, RecipeError
from kdcache.progress import format_bytes, format_seconds
from kdcache.runs import home
from kdcache.teachers.backends import open_backend
from kdcache.teachers.bundle import load_teacher, read_bundle

if TYPE_CHECKING:
    from kdcache.codecs.base import LayerSpec
    from kdcache.progress import Progress
    from kdcache.recipe import Recipe
    from kdcache.teachers.teacher import Teacher


UNSEEN_TEXTS = 256
_TRAINING_ROWS = 2048  # half of a dump's, because many codebooks are trained; it costs a thousandth of the variance


@dataclass(frozen=True)
class LayerCandidates:
    """The storage formats of one layer with their fidelity; ``bytes`` over the whole data, in the same order."""

    teacher: str
    layer: int
    formats: tuple[Fidelity, ...]
    bytes: tuple[int, ...]
    asked: int = -1  # place of the recipe's format; -1 if it was not measured

    def as_dict(self) -> dict[str, Any]:
        """The JSON document."""
        return {
            "teacher": self.teacher,
            "layer": self.layer,
            "in_recipe": self.formats[self.asked].form if self.asked >= 0 else None,
            "forms": [{**kept.as_dict(), "bytes": size} for kept, size in zip(self.formats, self.bytes, strict=True)],
        }


@dataclass(frozen=True)
class StoragePlan:
    """The plan. ``fixed``: bytes of logits, pooled vectors and spans; ``seconds``: of the dump, by teacher."""

    layers: tuple[LayerCandidates, ...]
    texts: int
    fixed: int
    seconds: Mapping[str, float]
    budget: int | None
    recommendation: Recommendation | None
    truncated: Mapping[str, TruncationPlan] = field(default_factory=dict)  # per teacher
    student: TruncationPlan | None = None
    logits_texts: int = 0  # texts with logits only
    folds: FoldsPlan | None = None

    def as_dict(self) -> dict[str, Any]:
        """The document that ``--json`` prints and the report draws."""
        return {
            "texts": self.texts,
            "texts_logits_only": self.logits_texts,
            "bytes_fixed": self.fixed,
            "budget": self.budget,
            "minutes": {name: round(seconds / 60, 2) for name, seconds in self.seconds.items()},
            "truncation": {
                "teachers": {name: plan.as_dict() for name, plan in self.truncated.items()},
                "student": None if self.student is None else self.student.as_dict(),
            },
            **({} if self.folds is None else {"folds": self.folds.as_dict()}),
            "layers": [layer.as_dict() for layer in self.layers],
            "recommendation": None if self.recommendation is None else self.recommendation.as_dict(),
        }

    def lines(self) -> list[str]:
        """Text for the terminal, without the recommendation."""
        total = sum(self.seconds.values())
        per_teacher = ", ".join(f"{name} {format_seconds(seconds)}" for name, seconds in self.seconds.items())
        return [
            f"{self.texts:,} texts with hidden states, {self.logits_texts:,} with logits only; logits, pooled vectors "
            f"and spans take {format_bytes(self.fixed)} in any case",
            f"the dump takes about {format_seconds(total)} in any format ({per_teacher})",
            *(() if self.folds is None else self.folds.lines()),
            *(line for name, plan in self.truncated.items() for line in plan.lines(f"teacher '{name}'")),
            *(() if self.student is None else self.student.lines()),
        ]


def plan_storage(
    recipe: Recipe, teachers_dir: Path, *, budget: int | None = None, unseen: int = UNSEEN_TEXTS, progress: Progress
) -> StoragePlan:
    """Run the recipe's teachers on a sample and measure the storage formats of their layers.

    ``budget``: bytes of the whole cache; without one, the smallest formats that keep ``ENOUGH`` of the variance are
    recommended. ``unseen``: number of texts to measure on. Raises what the dump would raise before a teacher runs, and
    DataError for too few texts.
    """
    task = load_task(recipe.data)
    for line in task.counts.notes():
        progress.note(line)
    bundle = read_bundle(teachers_dir)
    check_task(task, bundle, teachers_dir)
    teachers = prepare_teachers(without_folds(recipe), bundle, teachers_dir, len(task.label_names))
    if not any(teacher.spec.layers for teacher in teachers):
        raise RecipeError(
            "the recipe stores no hidden states: there is nothing to plan", 'Set dump.layers, for example to "even".'
        )
    wanted = scopes(task, recipe.dump.hidden_transfer)
    full, logits_only = wanted.full, wanted.logits_only
    sample = _sample(list_of(full), recipe.dump.sample_texts, unseen, recipe.dump.seed)
    layers: list[LayerCandidates] = []
    forward: dict[str, float] = {}  # seconds per text
    truncated: dict[str, TruncationPlan] = {}
    fixed = 0
    for teacher in teachers:
        tokens, cut = count_tokens(teacher.tokenizer, list_of(full), teacher.spec.max_length)
        cut += count_tokens(teacher.tokenizer, list_of(wanted.transfer), teacher.spec.max_length)[1]
        truncated[teacher.name] = TruncationPlan(len(wanted.trained_on), cut, teacher.spec.max_length)
        fixed += outputs_bytes(len(full) + len(logits_only), teacher.spec)
        fixed += tokens_bytes(tokens, len(full)) if needs_tokens(teacher.spec.layers) else 0
        measured, per_text = _measured(teacher, teachers_dir, sample, recipe.dump.shared_batch_tokens, progress)
        forward[teacher.name] = per_text
        for layer, formats in measured.items():
            sizes = tuple(hidden_bytes(tokens, len(full), kept.spec) for kept in formats)
            asked = [place for place, kept in enumerate(formats) if kept.spec == teacher.spec.layers[layer]]
            layers.append(LayerCandidates(teacher.name, layer, tuple(formats), sizes, asked[0] if asked else -1))
    student = student_truncation(recipe, teachers_dir, teachers, wanted.trained_on)
    texts = len(full) + len(logits_only) + min(recipe.dump.sample_texts, len(full))
    seconds = {name: per_text * texts for name, per_text in forward.items()}
    recommended = recommend(layers, None if budget is None else budget - fixed, fixed)
    return StoragePlan(
        tuple(layers), len(full), fixed, seconds, budget, recommended, truncated, student, len(logits_only),
        folds_plan(recipe, task, bundle, forward),
    )  # fmt: skip


@dataclass(frozen=True)
class _Sample:
    """The first ``fit`` texts are for fitting, the others for measuring."""

    texts: list[tuple[str, ...]]
    fit: int
    seed: int


def _sample(texts: Sequence[tuple[str, ...]], fit: int, unseen: int, seed: int) -> _Sample:
    if len(texts) < 8:
        raise DataError(
            f"there are {len(texts)} texts to store; a plan needs 8 at least", "Give more train or transfer texts."
        )
    unseen = min(unseen, len(texts) // 4)
    fit = min(fit, len(texts) - unseen)
    order = np.argsort(np.random.PCG64(seed).random_raw(len(texts)), kind="stable")[: fit + unseen]
    return _Sample([texts[place] for place in order], fit, seed)


class _LayerSample:
    """One layer while its teacher runs: the sample for fitting, and the rows to measure on."""

    def __init__(self, width: int, rows: np.ndarray, seed: int) -> None:
        self._unseen = rows  # bool [rows of the sample]
        self._order = np.cumsum(~rows) - 1
        keep = max(storage.sample_rows for storage in storage_formats().values())
        self.fit = Sample(width, int((~rows).sum()), seed, cross=True, keep=keep)
        self._kept: list[torch.Tensor] = []
        self._places: list[np.ndarray] = []

    def add(self, hidden: torch.Tensor, places: np.ndarray) -> None:
        apart = self._unseen[places]
        mask = torch.from_numpy(apart).to(hidden.device)
        self.fit.add(hidden[~mask], self._order[places[~apart]])
        self._kept.append(hidden[mask].float().cpu())
        self._places.append(places[apart])

    def unseen(self) -> torch.Tensor:
        """The rows to measure on, [rows, width], in the order of the sample."""
        order = np.argsort(np.concatenate(self._places), kind="stable")
        return torch.cat(self._kept)[torch.from_numpy(order)]


def _measured(
    teacher: PreparedTeacher, teachers_dir: Path, sample: _Sample, tokens_per_batch: int, progress: Progress
) -> tuple[dict[int, list[Fidelity]], float]:
    """Fidelity of the formats of every layer, and seconds per text of the forward pass."""
    spec = teacher.spec
    loaded = load_teacher(teachers_dir, spec.name, trust_remote_code=teacher.trust_remote_code)
    backend = open_backend(spec.backend, loaded, tuple(spec.layers), precision=spec.uncompiled, work_dir=home())
    batches = text_batches(teacher, sample.texts, id_array([bytes(16)] * len(sample.texts)), tokens_per_batch)
    lengths = batches.encoded.lengths
    apart = np.arange(len(sample.texts)) >= sample.fit
    gathered = {
        layer: _LayerSample(spec.width, apart if asked.per_text else np.repeat(apart, lengths), sample.seed)
        for layer, asked in spec.layers.items()
    }
    logits = np.empty((len(sample.texts), *spec.target.shape), np.float32)
    try:
        progress.start(f"run {spec.name}", len(sample.texts), "texts")
        began, spent = time.perf_counter(), 0.0
        for rows, output in batches.run(backend, tuple(spec.layers)):
            logits[rows] = output.logits.cpu().numpy()
            spent += time.perf_counter() - began
            for layer, asked in spec.layers.items():
                selected = select_tokens(output.hidden[layer], lengths[rows], asked.tokens)
                gathered[layer].add(selected, batches.places(rows, asked))
            progress.advance(len(rows))
            began = time.perf_counter()
        progress.finish()
        unseen_lengths, unseen_logits = lengths[apart].tolist(), logits[apart]
        progress.start(f"measure storage formats of {spec.name}", len(spec.layers), "layers")
        formats = {}
        for layer, asked in spec.layers.items():
            head_of = loaded if layer == spec.depth else None
            formats[layer] = _fidelities(asked, spec.width, gathered.pop(layer), head_of, unseen_lengths, unseen_logits)
            progress.advance(1)
        progress.finish()
        return formats, spent / len(sample.texts)
    finally:
        backend.close()
        loaded.model.to("meta")


def _fidelities(
    asked: LayerSpec,
    width: int,
    gathered: _LayerSample,
    head_of: Teacher | None,
    lengths: Sequence[int],
    logits: np.ndarray,
) -> list[Fidelity]:
    whole = fit_basis(gathered.fit.moments, "pca", width, seed=0, name="", layer=0)
    kept, unseen = gathered.fit.kept(), gathered.unseen()
    assert kept is not None
    sample = kept.cpu()[:_TRAINING_ROWS]
    fidelities = []
    for spec in candidates(width, asked):
        back = rebuilt(spec, whole, sample, unseen)
        kl = soft_label_kl(head_of.model, back, lengths, logits) if head_of is not None and not spec.per_text else None
        fidelities.append(replace(measure(spec, back, unseen), kl=kl))
    return fidelities


ENOUGH = 0.9  # share of the variance to keep without a budget


@dataclass(frozen=True)
class Recommendation:
    """A storage format for every layer. ``bytes`` of the whole cache; ``explained``: mean over the layers."""

    formats: dict[tuple[str, int], Fidelity]
    bytes: int
    explained: float

    def settings(self) -> list[str]:
        """Arguments of ``--set``: the format of most layers for ``dump``, the others by teacher and layer."""
        common = Counter(_keys(kept.spec) for kept in self.formats.values()).most_common(1)[0][0]
        lines = [f"dump.{key}={value}" for key, value in common]
        for (teacher, layer), kept in self.formats.items():
            keys = _keys(kept.spec)
            if keys != common:
                table = ", ".join(f"{key} = {value}" for key, value in keys)
                lines.append(f"teachers.{teacher}.per_layer.{layer}={{ {table} }}")
        return lines

    def toml(self) -> list[str]:
        """The same as lines of a recipe."""
        lines, teacher = ["[dump]"], ""
        for setting in self.settings():
            key, value = setting.split("=", 1)
            steps = key.split(".")
            if steps[0] == "dump":
                lines.append(f"{steps[1]} = {value}")
                continue
            name = ".".join(steps[1:-2])
            lines += [] if name == teacher else [f"# under [[teachers]], name = {json.dumps(name)}:"]
            teacher = name
            lines.append(f"per_layer.{steps[-1]} = {value}")
        return lines

    def as_dict(self) -> dict[str, Any]:
        """The JSON document."""
        layers = [
            {"teacher": teacher, "layer": layer, **kept.as_dict()} for (teacher, layer), kept in self.formats.items()
        ]
        return {
            "bytes": self.bytes,
            "explained": round(self.explained, 6),
            "layers": layers,
            "settings": self.settings(),
        }


def recommend(choices: Sequence[LayerCandidates], budget: int | None, fixed: int) -> Recommendation | None:
    """The best formats for ``budget`` bytes of hidden states; None if even the smallest ones take more.

    Starts with the smallest format of every layer and repeatedly takes the step that adds the most variance per byte.
    Without a budget, the smallest formats that keep ``ENOUGH``.
    """
    hulls = [_hull(choice) for choice in choices]
    corners = [0] * len(choices)
    if budget is None:
        for index, (choice, hull) in enumerate(zip(choices, hulls, strict=True)):
            enough = [corner for corner in hull if choice.formats[corner].explained >= ENOUGH]
            corners[index] = hull.index(enough[0]) if enough else len(hull) - 1
        return _recommendation(choices, hulls, corners, fixed)
    spent = sum(choice.bytes[hull[0]] for choice, hull in zip(choices, hulls, strict=True))
    if spent > budget:
        return None
    while True:
        steps = []
        for index, (choice, hull) in enumerate(zip(choices, hulls, strict=True)):
            if corners[index] + 1 < len(hull):
                now, then = hull[corners[index]], hull[corners[index] + 1]
                cost = choice.bytes[then] - choice.bytes[now]
                if spent + cost <= budget:
                    steps.append((_gain(choice, now, then), -index, cost))
        if not steps:
            return _recommendation(choices, hulls, corners, fixed)
        _, index, cost = max(steps)
        corners[-index] += 1
        spent += cost


def _hull(choice: LayerCandidates) -> list[int]:
    """Places of the formats on the upper convex hull of variance over bytes, by ascending bytes."""
    order = sorted(
        range(len(choice.formats)), key=lambda place: (choice.bytes[place], -choice.formats[place].explained)
    )
    hull: list[int] = []
    for place in order:
        if hull and choice.formats[place].explained <= choice.formats[hull[-1]].explained:
            continue
        while len(hull) > 1 and _gain(choice, hull[-2], hull[-1]) <= _gain(choice, hull[-1], place):
            hull.pop()
        hull.append(place)
    return hull


def _gain(choice: LayerCandidates, less: int, more: int) -> float:
    """Variance per byte that the step from format ``less`` to ``more`` adds."""
    added = choice.formats[more].explained - choice.formats[less].explained
    return added / max(choice.bytes[more] - choice.bytes[less], 1)


def _recommendation(
    choices: Sequence[LayerCandidates], hulls: Sequence[list[int]], corners: Sequence[int], fixed: int
) -> Recommendation:
    chosen = [(choice, hull[corner]) for choice, hull, corner in zip(choices, hulls, corners, strict=True)]
    formats = {(choice.teacher, choice.layer): choice.formats[place] for choice, place in chosen}
    total = fixed + sum(choice.bytes[place] for choice, place in chosen)
    return Recommendation(formats, total, sum(kept.explained for kept in formats.values()) / len(formats))


def _keys(spec: LayerSpec) -> tuple[tuple[str, str], ...]:
    """The recipe keys of a storage format, with their values in TOML."""
    keys = format_of(spec).keys(spec)
    return tuple((key, json.dumps(value)) for key, value in keys.items())
