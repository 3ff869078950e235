"""Whether the student without teachers is the run's student on the same rows: else a verdict on the two says nothing.

``kdcache distill --replace`` makes the student again and leaves the one without teachers, which may then have other
layers, another learning rate or other data.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdcache.errors import KdcacheError
from kdcache.recipe import load_recipe
from kdcache.runs import TRANSFER_KEYS, read_record, training_inputs

if TYPE_CHECKING:
    from kdcache.runs import Inputs, RunDirectory

_MOST = 4  # settings in a message
_NOT_COMPARED = {
    "distill.projection_learning_rate",  # is an input of the baseline, which has no projections
    "distill.task",  # there only where the student has task weight 0; the baseline always has its own
}


def other_settings(run: RunDirectory, results: Mapping[str, Any], baseline: Mapping[str, Any]) -> list[str]:
    """The settings in which the student without teachers is not the run's student on the same rows; empty if it is.

    What the stage records say is compared, else what the two ``results.json`` say. Keys of ``[baseline]``, method and
    transfer texts may differ. What is not recorded counts as equal. Raises DamageError for an unreadable run.json.
    """
    return _by_records(run) or list(_by_results(results, baseline))


def not_compared(settings: Sequence[str]) -> str:
    """The line that takes the place of the verdict."""
    more = f" and {len(settings) - _MOST} more" if len(settings) > _MOST else ""
    return (
        f"The student without teachers was made with other settings ({', '.join(settings[:_MOST])}{more}), so the two "
        "are not compared: kdcache run RECIPE --replace makes it again."
    )


def _by_records(run: RunDirectory) -> list[str]:
    stages = read_record(run).get("stages", {})
    if not {"student", "baseline"} <= stages.keys():
        return []
    ours, alone = stages["student"]["inputs"], stages["baseline"]["inputs"]
    one, two = _of_both(ours), _of_both(alone)
    unknown = {key for each in (one, two) for key, values in each.items() if _file_was_missing(values)}
    keys = sorted((one.keys() | two.keys()) - unknown)
    return [*(key for key in keys if one.get(key) != two.get(key)), *_of_training(run, ours, alone)]


def _of_both(inputs: Inputs) -> dict[str, Inputs]:
    """The inputs by recipe key that student and baseline must share; the files of a directory are under one key."""
    found: dict[str, Inputs] = {}
    for key, value in inputs.items():
        section, _, rest = key.partition(".")
        if section in ("data", "student") and rest.split(".")[0] not in TRANSFER_KEYS:
            found.setdefault(key.partition("/")[0], {})[key] = value
    return found


def _file_was_missing(values: Inputs) -> bool:
    """Whether a path was recorded, not a sha256: such a student took its texts from the cache."""
    return any(value.startswith('"/') for value in values.values())


def _of_training(run: RunDirectory, ours: Inputs, alone: Inputs) -> list[str]:
    """The keys of its training that differ from those that the student's recipe gives; empty without that recipe."""
    try:
        recipe = load_recipe(run.recipe_file)
    except KdcacheError:
        return []
    if training_inputs(recipe, "student") != _training_keys(ours):
        return []  # a later command brought another recipe
    wanted, found = training_inputs(recipe, "baseline"), _training_keys(alone)
    keys = sorted((wanted.keys() | found.keys()) - _NOT_COMPARED)
    return [key for key in keys if wanted.get(key) != found.get(key)]


def _training_keys(inputs: Inputs) -> Inputs:
    return {key: value for key, value in inputs.items() if key.startswith("distill.")}


def _by_results(results: Mapping[str, Any], baseline: Mapping[str, Any]) -> Iterator[str]:
    one, two = _facts(results), _facts(baseline)
    for key, value in one.items():
        if value is not None and two.get(key) is not None and value != two[key]:
            yield key


def _facts(results: Mapping[str, Any]) -> dict[str, Any]:
    """What both must share, by the name in a message."""
    student = results.get("student", {})
    split = "test" if "test" in results.get("scores", {}) else "validation"
    origin = student.get("init_from")
    return {
        "student.init_from": None if Path(str(origin)).is_absolute() else origin,  # a moved model is the same
        **{f"student.{key}": student.get(key) for key in ("head", "layers", "width")},
        **student.get("taken_over", {}),
        "distill.seed": results.get("seed"),
        "data.max_length": results.get("max_length"),
        "data.labels": results.get("label_names"),
        "data.text": results.get("text_columns"),
        f"rows of {split}": results.get("rows", {}).get(split),
    }
