"""What to store: every form of every layer, what it costs over the whole data and what it keeps; and the best that fits
a budget.

    kdcache plan RECIPE --budget 2GB

Each teacher runs once, over a seeded sample of texts: bases are fitted on most of them, fidelity is measured on the
others. How long the pass takes says how long the dump will.
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
from kdcache.codecs.registry import format_of, storage_formats
from kdcache.codecs.token_selection import select_tokens
from kdcache.data.encoding import encode
from kdcache.data.task import load_task
from kdcache.dump.fidelity import Fidelity, candidates, measure, rebuilt, soft_label_kl
from kdcache.dump.fitting import Sample, fit_basis
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
    from kdcache.dump.fidelity import Fidelity
    from kdcache.progress import Progress
    from kdcache.recipe import Recipe
    from kdcache.teachers.teacher import Teacher


UNSEEN_TEXTS = 256
_TRAINING_ROWS = 2048  # half of a dump's: a codebook for each of many budgets is trained, and loses a thousandth by it


@dataclass(frozen=True)
class LayerCandidates:
    """The forms of one layer and what they keep; ``bytes`` over the whole data, in the order of ``forms``."""

    teacher: str
    layer: int
    forms: tuple[Fidelity, ...]
    bytes: tuple[int, ...]
    asked: int  # place of the recipe's own form; -1 where it was not measured

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "teacher": self.teacher,
            "layer": self.layer,
            "in_recipe": self.forms[self.asked].form if self.asked >= 0 else None,
            "forms": [{**form.as_dict(), "bytes": size} for form, size in zip(self.forms, self.bytes, strict=True)],
        }


@dataclass(frozen=True)
class StoragePlan:
    """``fixed``.

    Bytes of logits, pooled vectors and spans, which every choice pays. ``seconds``: of the dump, per teacher.
    """

    layers: tuple[LayerCandidates, ...]
    texts: int
    fixed: int
    seconds: Mapping[str, float]
    budget: int | None
    recommendation: Recommendation | None
    truncated: Mapping[str, TruncationPlan] = field(default_factory=dict)  # per teacher
    student: TruncationPlan | None = None

    def as_dict(self) -> dict[str, Any]:
        """JSON-able; what ``--json`` prints and the report draws."""
        return {
            "texts": self.texts,
            "bytes_fixed": self.fixed,
            "budget": self.budget,
            "minutes": {name: round(seconds / 60, 2) for name, seconds in self.seconds.items()},
            "truncation": {
                "teachers": {name: one.as_dict() for name, one in self.truncated.items()},
                "student": None if self.student is None else self.student.as_dict(),
            },
            "layers": [layer.as_dict() for layer in self.layers],
            "recommendation": None if self.recommendation is None else self.recommendation.as_dict(),
        }

    def lines(self) -> list[str]:
        """For people, the recommendation apart."""
        total = sum(self.seconds.values())
        per_teacher = ", ".join(f"{name} {format_seconds(seconds)}" for name, seconds in self.seconds.items())
        return [
            f"{self.texts:,} texts with hidden states; logits, pooled vectors and spans take "
            f"{format_bytes(self.fixed)} in any case",
            f"the dump takes about {format_seconds(total)} in any form ({per_teacher})",
            *(line for name, one in self.truncated.items() for line in one.lines(f"teacher '{name}'")),
            *(() if self.student is None else self.student.lines()),
        ]


def plan_storage(
    recipe: Recipe, teachers_dir: Path, *, budget: int | None = None, unseen: int = UNSEEN_TEXTS, progress: Progress
) -> StoragePlan:
    """Run the recipe's teachers on a sample and work out what each form of their layers costs and keeps.

    ``budget``: bytes of the whole cache; without one the smallest forms that keep nine tenths are recommended.
    ``unseen``: texts to measure on. Raises what the dump would raise before it runs, and DataError where there are too
    few texts to measure on.
    """
    task = load_task(recipe.data)
    for line in task.counts.notes():
        progress.note(line)
    bundle = read_bundle(teachers_dir)
    check_task(task, bundle, teachers_dir)
    teachers = prepare_teachers(recipe, bundle, teachers_dir, len(task.label_names))
    if not any(teacher.spec.layers for teacher in teachers):
        raise RecipeError(
            "the recipe stores no hidden states: there is nothing to plan", 'Set dump.layers, for example to "even".'
        )
    full, logits_only = scopes(task)
    sample = _sample(list(full.values()), recipe.dump.sample_texts, unseen, recipe.dump.seed)
    layers: list[LayerCandidates] = []
    seconds: dict[str, float] = {}
    truncated: dict[str, TruncationPlan] = {}
    fixed = 0
    for teacher in teachers:
        encoded = encode(teacher.tokenizer, list(full.values()), teacher.spec.max_length)
        tokens = int(encoded.lengths.sum())
        truncated[teacher.name] = TruncationPlan(len(full), encoded.truncated_count, teacher.spec.max_length)
        fixed += outputs_bytes(len(full) + len(logits_only), teacher.spec)
        fixed += tokens_bytes(tokens, len(full)) if needs_tokens(teacher.spec.layers) else 0
        measured, per_text = _measured(teacher, teachers_dir, sample, recipe.dump.tokens_per_batch, progress)
        seconds[teacher.name] = per_text * (len(full) + len(logits_only) + min(recipe.dump.sample_texts, len(full)))
        for layer, forms in measured.items():
            sizes = tuple(hidden_bytes(tokens, len(full), form.spec) for form in forms)
            asked = [place for place, form in enumerate(forms) if form.spec == teacher.spec.layers[layer]]
            layers.append(LayerCandidates(teacher.name, layer, tuple(forms), sizes, asked[0] if asked else -1))
    choices = [Choice(one.teacher, one.layer, one.forms, one.bytes) for one in layers]
    student = student_truncation(recipe, teachers_dir, teachers, list(full.values()))
    recommended = recommend(choices, None if budget is None else budget - fixed, fixed)
    return StoragePlan(tuple(layers), len(full), fixed, seconds, budget, recommended, truncated, student)


@dataclass(frozen=True)
class _Sample:
    """Texts to fit on, first, and texts to measure on."""

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


class _Gathered:
    """One layer while its teacher runs: what bases are fitted from, and the rows to measure on."""

    def __init__(self, asked: LayerSpec, width: int, rows: np.ndarray, seed: int) -> None:
        self.asked = asked
        self._unseen = rows  # bool [rows of the sample]
        self._order = np.cumsum(~rows) - 1
        keep = max(one.sample_rows for one in storage_formats().values())
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
        """[rows, width] in the order of the sample."""
        order = np.argsort(np.concatenate(self._places), kind="stable")
        return torch.cat(self._kept)[torch.from_numpy(order)]


def _measured(
    teacher: PreparedTeacher, teachers_dir: Path, sample: _Sample, tokens_per_batch: int, progress: Progress
) -> tuple[dict[int, list[Fidelity]], float]:
    """Fidelity of every form of every layer, and seconds per text of the forward pass."""
    spec = teacher.spec
    loaded = load_teacher(teachers_dir, spec.name, trust_remote_code=teacher.trust_remote_code)
    backend = open_backend(spec.backend, loaded, tuple(spec.layers), precision=spec.precision, work_dir=home())
    batches = text_batches(teacher, sample.texts, id_array([bytes(16)] * len(sample.texts)), tokens_per_batch)
    lengths = batches.encoded.lengths
    apart = np.arange(len(sample.texts)) >= sample.fit
    gathered = {
        layer: _Gathered(one, spec.width, apart if one.per_text else np.repeat(apart, lengths), sample.seed)
        for layer, one in spec.layers.items()
    }
    logits = np.empty((len(sample.texts), *spec.target.shape), np.float32)
    try:
        progress.start(f"run {spec.name}", len(sample.texts), "texts")
        began, spent = time.perf_counter(), 0.0
        for rows, output in batches.run(backend, tuple(spec.layers)):
            logits[rows] = output.logits.cpu().numpy()
            spent += time.perf_counter() - began
            for layer, one in spec.layers.items():
                gathered[layer].add(
                    select_tokens(output.hidden[layer], lengths[rows], one.tokens), batches.places(rows, one)
                )
            progress.advance(len(rows))
            began = time.perf_counter()
        progress.finish()
        unseen_lengths, unseen_logits = lengths[apart].tolist(), logits[apart]
        progress.start(f"measure forms of {spec.name}", len(spec.layers), "layers")
        forms = {}
        for layer, one in spec.layers.items():
            head_of = loaded if layer == spec.depth else None
            forms[layer] = _forms(one, spec.width, gathered.pop(layer), head_of, unseen_lengths, unseen_logits)
            progress.advance(1)
        progress.finish()
        return forms, spent / len(sample.texts)
    finally:
        backend.close()
        loaded.model.to("meta")


def _forms(
    asked: LayerSpec,
    width: int,
    gathered: _Gathered,
    head_of: Teacher | None,
    lengths: Sequence[int],
    logits: np.ndarray,
) -> list[Fidelity]:
    whole = fit_basis(gathered.fit.moments, "pca", width, seed=0, name="", layer=0)
    kept, unseen = gathered.fit.kept(), gathered.unseen()
    assert kept is not None
    sample = kept.cpu()[:_TRAINING_ROWS]
    forms = []
    for spec in candidates(width, asked):
        back = rebuilt(spec, whole, sample, unseen)
        kl = soft_label_kl(head_of.model, back, lengths, logits) if head_of is not None and not spec.per_text else None
        forms.append(replace(measure(spec, back, unseen), kl=kl))
    return forms


ENOUGH = 0.9  # share of the variance to keep where no budget is given


@dataclass(frozen=True)
class Choice:
    """The forms that one layer could be stored in, with their bytes over the whole data."""

    teacher: str
    layer: int
    forms: Sequence[Fidelity]
    bytes: Sequence[int]


@dataclass(frozen=True)
class Recommendation:
    """A form for every layer. ``bytes`` of the whole cache; ``explained``: mean over the layers."""

    forms: dict[tuple[str, int], Fidelity]
    bytes: int
    explained: float

    def settings(self) -> list[str]:
        """What asks for it, as ``--set`` takes it.

        The form of most layers in ``[dump]``, the others per teacher and layer.
        """
        common = Counter(_keys(form.spec) for form in self.forms.values()).most_common(1)[0][0]
        lines = [f"dump.{key}={value}" for key, value in common]
        for (teacher, layer), form in self.forms.items():
            mine = _keys(form.spec)
            if mine != common:
                table = ", ".join(f"{key} = {value}" for key, value in mine)
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
        """JSON-able."""
        layers = [
            {"teacher": teacher, "layer": layer, **form.as_dict()} for (teacher, layer), form in self.forms.items()
        ]
        return {
            "bytes": self.bytes,
            "explained": round(self.explained, 6),
            "layers": layers,
            "settings": self.settings(),
        }


def recommend(choices: Sequence[Choice], budget: int | None, fixed: int) -> Recommendation | None:
    """The best forms in ``budget`` bytes of hidden states; None where even the smallest forms take more.

    From the smallest form of every layer, the step that keeps most per byte is taken again and again: along the upper
    hull of each layer's forms that is the best there is but for the last step. Without a budget, the smallest forms
    that keep ``ENOUGH``.
    """
    hulls = [_hull(choice) for choice in choices]
    place = [0] * len(choices)
    if budget is None:
        for index, (choice, hull) in enumerate(zip(choices, hulls, strict=True)):
            enough = [one for one in hull if choice.forms[one].explained >= ENOUGH]
            place[index] = hull.index(enough[0]) if enough else len(hull) - 1
        return _made(choices, hulls, place, fixed)
    spent = sum(choice.bytes[hull[0]] for choice, hull in zip(choices, hulls, strict=True))
    if spent > budget:
        return None
    while True:
        steps = []
        for index, (choice, hull) in enumerate(zip(choices, hulls, strict=True)):
            if place[index] + 1 < len(hull):
                now, then = hull[place[index]], hull[place[index] + 1]
                cost = choice.bytes[then] - choice.bytes[now]
                if spent + cost <= budget:
                    steps.append(
                        ((choice.forms[then].explained - choice.forms[now].explained) / max(cost, 1), -index, cost)
                    )
        if not steps:
            return _made(choices, hulls, place, fixed)
        _, index, cost = max(steps)
        place[-index] += 1
        spent += cost


def _hull(choice: Choice) -> list[int]:
    """Places of the forms that no mixture of others beats, by rising bytes."""
    order = sorted(range(len(choice.forms)), key=lambda one: (choice.bytes[one], -choice.forms[one].explained))
    hull: list[int] = []
    for one in order:
        if hull and choice.forms[one].explained <= choice.forms[hull[-1]].explained:
            continue
        while len(hull) > 1 and _gain(choice, hull[-2], hull[-1]) <= _gain(choice, hull[-1], one):
            hull.pop()
        hull.append(one)
    return hull


def _gain(choice: Choice, less: int, more: int) -> float:
    return (choice.forms[more].explained - choice.forms[less].explained) / max(
        choice.bytes[more] - choice.bytes[less], 1
    )


def _made(choices: Sequence[Choice], hulls: Sequence[list[int]], place: Sequence[int], fixed: int) -> Recommendation:
    chosen = [hull[one] for hull, one in zip(hulls, place, strict=True)]
    forms = {(choice.teacher, choice.layer): choice.forms[one] for choice, one in zip(choices, chosen, strict=True)}
    total = fixed + sum(choice.bytes[one] for choice, one in zip(choices, chosen, strict=True))
    return Recommendation(forms, total, sum(form.explained for form in forms.values()) / len(forms))


def _keys(spec: LayerSpec) -> tuple[tuple[str, str], ...]:
    """The recipe keys that ask for a form, with their values in TOML."""
    keys = format_of(spec).keys(spec)
    return tuple((key, json.dumps(value)) for key, value in keys.items())
