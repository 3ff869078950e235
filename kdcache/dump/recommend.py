"""Which form for which layer: the most variance kept, on average over the layers, in a budget of bytes."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kdcache.codecs.registry import format_of

if TYPE_CHECKING:
    from kdcache.codecs.base import LayerSpec
    from kdcache.dump.fidelity import Fidelity

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
        """What asks for it, as ``--set`` takes it: the form of most layers in ``[dump]``, the others per teacher and layer."""
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
        layers = [{"teacher": teacher, "layer": layer, **form.as_dict()} for (teacher, layer), form in self.forms.items()]
        return {"bytes": self.bytes, "explained": round(self.explained, 6), "layers": layers, "settings": self.settings()}


def recommend(choices: Sequence[Choice], budget: int | None, fixed: int) -> Recommendation | None:
    """The best forms in ``budget`` bytes of hidden states; None where even the smallest forms take more.

    From the smallest form of every layer, the step that keeps most per byte is taken again and again: along the upper hull of
    each layer's forms that is the best there is but for the last step. Without a budget, the smallest forms that keep ``ENOUGH``.
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
                    steps.append(((choice.forms[then].explained - choice.forms[now].explained) / max(cost, 1), -index, cost))
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
    return (choice.forms[more].explained - choice.forms[less].explained) / max(choice.bytes[more] - choice.bytes[less], 1)


def _made(choices: Sequence[Choice], hulls: Sequence[list[int]], place: Sequence[int], fixed: int) -> Recommendation:
    chosen = [hull[one] for hull, one in zip(hulls, place, strict=True)]
    forms = {(choice.teacher, choice.layer): choice.forms[one] for choice, one in zip(choices, chosen, strict=True)}
    total = fixed + sum(choice.bytes[one] for choice, one in zip(choices, chosen, strict=True))
    return Recommendation(forms, total, sum(form.explained for form in forms.values()) / len(forms))


def _keys(spec: LayerSpec) -> tuple[tuple[str, str], ...]:
    """The recipe keys that ask for a form, with their values in TOML."""
    keys = format_of(spec).keys(spec)
    return tuple((key, json.dumps(value)) for key, value in keys.items())
