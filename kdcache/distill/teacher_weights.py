"""``distill.teacher_weights``: how much each teacher counts in the losses, and its temperature.

A weight multiplies the weight that the method gives the teacher on a row, w_i(x) -> N w_i w_i(x), so that equal weights
change nothing. A temperature divides the teacher's logits before anything else reads them. A teacher of weight 0 is not
read at all, and N is the number of the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from kdcache.distill.mixture import Mixture
from kdcache.distill.weigh import fitted_mixture, labelled_logits, mixture_settings
from kdcache.errors import RecipeError
from kdcache.loading.choice import check_teacher_names

if TYPE_CHECKING:
    from kdcache.cache.reader import Cache
    from kdcache.loading.data import StudentData
    from kdcache.recipe import DistillSection

SPLIT = "validation"  # that weights are fitted to


@dataclass(frozen=True, eq=False)
class TeacherWeights:
    """The weights of a training. ``mixture`` is over ``names``; ``rows``: that it was fitted to, 0 if it was given."""

    names: tuple[str, ...]
    mixture: Mixture
    rows: int

    @property
    def used(self) -> tuple[str, ...]:
        """The teachers whose weight is not 0."""
        return tuple(self.names[index] for index in self._used)

    @property
    def of_used(self) -> Mixture:
        """The mixture of these alone."""
        found, used = self.mixture, self._used
        classes = None if found.class_weights is None else found.class_weights[used]
        return Mixture(found.weights[used], found.temperatures[used], classes)

    @property
    def _used(self) -> np.ndarray:
        return np.flatnonzero(self.mixture.weights)

    def record(self) -> dict[str, Any]:
        """For results.json and the identity of the training."""
        return {"fitted_rows": self.rows, **mixture_settings(self.mixture, self.names)}

    def line(self) -> str:
        """For the user, when the training begins."""
        values = zip(self.names, self.mixture.weights, self.mixture.temperatures, strict=True)
        shown = ", ".join(f"{name} {weight:.4g} (temperature {hot:.4g})" for name, weight, hot in values)
        fitted = f", fitted to {self.rows} rows of {SPLIT}" if self.rows else ""
        classes = "; by predicted class" if self.mixture.class_weights is not None else ""
        return f"weights of the teachers{fitted}: {shown}{classes}"

    def section(self, section: DistillSection) -> DistillSection:
        """``section`` for the teachers that are used."""
        layers = section.teacher_layers
        if layers is not None:
            layers = {name: own for name, own in layers.items() if name in self.used or name not in self.names}
        return section.model_copy(update={"teachers": list(self.used), "teacher_layers": layers})


def chosen_weights(section: DistillSection, data: StudentData, cache: Cache) -> TeacherWeights | None:
    """The weights that a recipe asks for, fitted if it says so; None for equal ones.

    Raises RecipeError for names that are not those of the teachers used, DataError and MismatchError as
    ``labelled_logits``.
    """
    if section.teacher_weights is None and section.teacher_temperatures is None:
        return None
    names = tuple(cache.teachers if section.teachers is None else section.teachers)
    check_teacher_names(cache, names)
    if section.teacher_weights == "fitted":
        logits = labelled_logits(cache, names, SPLIT, examples=data.examples, missing=section.missing)
        return TeacherWeights(names, fitted_mixture(logits), len(logits.labels))
    given = section.teacher_weights if isinstance(section.teacher_weights, Mapping) else dict.fromkeys(names, 1.0)
    weights = _of(names, given, "teacher_weights")
    temperatures = section.teacher_temperatures
    by_class = section.teacher_class_weights
    classes = None if by_class is None else _class_weights(names, by_class, len(data.label_names))
    if classes is not None and ((weights > 0) != (classes > 0).any(axis=1)).any():
        raise RecipeError(
            "distill.teacher_weights and distill.teacher_class_weights do not give weight 0 to the same teachers",
            "Take both from the output of kdcache weigh, or leave teacher_class_weights out.",
        )
    return TeacherWeights(
        names,
        Mixture(
            weights / weights.sum(),
            np.ones(len(names)) if temperatures is None else _of(names, temperatures, "teacher_temperatures"),
            classes,
        ),
        0,
    )


def _of(names: Sequence[str], given: Mapping[str, float], key: str) -> np.ndarray:
    _check_names(names, given, key)
    return np.array([given[name] for name in names], np.float64)


def _check_names(names: Sequence[str], given: Mapping[str, object], key: str) -> None:
    unknown = [name for name in given if name not in names]
    if unknown:
        raise RecipeError(
            f"distill.{key} names teacher '{unknown[0]}', which is not used; used are: {', '.join(names)}",
            "Remove it there, or add it to distill.teachers.",
        )
    lacking = [name for name in names if name not in given]
    if lacking:
        cure = "0 leaves a teacher out" if key != "teacher_temperatures" else "1 keeps its logits as they are"
        raise RecipeError(
            f"distill.{key} has no value for teacher '{lacking[0]}'; it has: {', '.join(given)}",
            f"Give one for each of {', '.join(names)}; {cure}.",
        )


def _class_weights(names: Sequence[str], given: Mapping[str, Sequence[float]], classes: int) -> np.ndarray:
    """[N, C], each column divided by its sum."""
    _check_names(names, given, "teacher_class_weights")
    for name, own in given.items():
        if len(own) != classes:
            raise RecipeError(
                f"distill.teacher_class_weights gives {len(own)} weights for teacher '{name}'; the task has {classes} "
                "classes",
                "Give one weight for each class, in the order of the labels.",
            )
    table = np.array([given[name] for name in names], np.float64)
    sums = table.sum(axis=0)
    if not sums.all():
        raise RecipeError(
            f"distill.teacher_class_weights gives class {int(np.flatnonzero(sums == 0)[0])} no teacher",
            "Give at least one teacher a weight above 0 for each class.",
        )
    return np.asarray(table / sums)


class WeightedTeachers(nn.Module):
    """A mixture of the N teachers of a batch, on its device. It has no parameters and nothing to save."""

    inverse: Tensor
    weights: Tensor
    by_class: Tensor | None

    def __init__(self, mixture: Mixture) -> None:
        super().__init__()
        count = len(mixture.weights)
        classes = mixture.class_weights
        self.factors = tuple((count * mixture.weights).tolist())  # N w_i
        tensors = {
            "inverse": torch.tensor(1 / mixture.temperatures, dtype=torch.float32)[:, None, None],
            "weights": torch.tensor(mixture.weights, dtype=torch.float32),
            "by_class": None if classes is None else torch.tensor(count * classes, dtype=torch.float32),
        }
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=False)

    def scaled(self, logits: Tensor) -> Tensor:
        """z_i / T_i of ``logits`` [N, batch, C]."""
        return logits * self.inverse

    def row_factors(self, scaled: Tensor) -> Tensor:
        """N w_i, or N w_ic where the mixture predicts class c, as [N, batch] or [N, 1]."""
        if self.by_class is None:
            return (self.weights * len(self.weights))[:, None]
        mixed = torch.einsum("i,inc->nc", self.weights, torch.softmax(scaled, dim=-1))
        return self.by_class[:, mixed.argmax(dim=-1)]
