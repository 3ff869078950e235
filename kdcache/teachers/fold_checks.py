"""What must hold before folds are trained: the bundle of each fold is to be trained as the teachers of all rows were.

A fold has the same teachers as the bundle of all rows, so the recipe must still give what teachers.json records of
them: train rows, settings and pretrained models. This is compared for the teachers that a fold lacks, before anything
is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdcache.errors import MismatchError, RecipeError
from kdcache.progress import listed
from kdcache.teachers import joint
from kdcache.teachers.bundle import is_bundle, read_bundle
from kdcache.teachers.folds import assign_folds, begin_folds, fold_directory, folds_begun, folds_cure
from kdcache.training.checkpoints import identity_changes
from kdcache.training.processes import current

if TYPE_CHECKING:
    from kdcache.data.task import TaskData
    from kdcache.recipe import Recipe, TeacherSection
    from kdcache.teachers.bundle import Bundle
    from kdcache.teachers.head import Pooling
    from kdcache.teachers.placement import Opened

Open = Callable[[Sequence["TeacherSection"], "Pooling | None"], "Opened"]


@dataclass(frozen=True)
class Folds:
    """How many folds teachers are to have, and which teachers: those with a shared head."""

    count: int
    trained: Sequence[str]


def folds_there(teachers_dir: Path, bundle: Bundle) -> Mapping[str, Any] | None:
    """``training.folds`` of teachers.json; None without folds, and if somebody removed them."""
    record: Mapping[str, Any] | None = bundle.training.get("folds")
    return record if record is not None and fold_directory(teachers_dir, 0).is_dir() else None


def folds_to_make(
    recipe: Recipe,
    task: TaskData,
    teachers_dir: Path,
    bundle: Bundle,
    open_teachers: Open,
    newcomer: TeacherSection | None = None,
) -> Folds | None:
    """The folds that the recipe asks for, or that the teachers of ``bundle`` have; None without any.

    An added teacher that the recipe does not name, and that has no folds, gets none. ``newcomer``: a teacher that is
    about to be added to ``bundle``. Marks the folds as begun.

    Raises MismatchError for another number of folds, and for a teacher that a fold lacks and that this recipe would
    train with other rows, settings or models than ``bundle`` records; RecipeError and DataError for impossible folds.
    """
    record = folds_there(teachers_dir, bundle)
    count = recipe.cofinetune.folds or (record["count"] if record else None)
    if count is None:
        return None
    known = {section.name for section in recipe.teachers} | {*(record["teachers"] if record else ())}
    added = bundle.training.get("added", {})
    shared = [name for name, teacher in bundle.teachers.items() if teacher.head == "shared"]
    trained = [name for name in shared if name not in added or name in known]
    if newcomer is not None and newcomer.head == "shared":
        trained.append(newcomer.name)
    check_possible(recipe, task, trained)
    if record is not None and record["count"] != count:
        raise MismatchError(
            f"the teachers in '{teachers_dir}' have {record['count']} folds; the recipe asks for {count}",
            folds_cure(teachers_dir),
        )
    lacking = _lacking(teachers_dir, trained, count)
    _refuse_other_rows(task, teachers_dir, bundle, trained, lacking)
    folds = Folds(count, trained)
    if current().world == 1:  # several processes train no folds
        _Inputs(recipe, task, bundle, folds, open_teachers).refuse_others(lacking & bundle.teachers.keys())
    if recipe.cofinetune.folds is not None:
        begin_folds(teachers_dir)
    return folds


def check_possible(recipe: Recipe, task: TaskData, trained: Collection[str]) -> None:
    """Refuse impossible folds of teachers ``trained``, if the recipe asks for folds. Raises RecipeError, DataError."""
    count = recipe.cofinetune.folds
    if count is None:
        return
    if current().world > 1:
        raise RecipeError(
            f"cofinetune.folds is {count}, and folds are trained in one process; there are {current().world}",
            "Train the teachers in several processes without cofinetune.folds, then the folds in one: --folds K.",
        )
    if not trained:
        raise RecipeError(
            f"cofinetune.folds is {count}, and every teacher has a head of its own: none of them is trained here",
            'Leave out cofinetune.folds, or give a teacher without head = "own".',
        )
    assign_folds(task.splits["train"], count, recipe.cofinetune.seed)


def refuse_other_fold(directory: Path, existing: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    """MismatchError if the fold in ``directory`` was not made with ``identity``."""
    differing = list(identity_changes(existing, identity))
    if differing:
        raise MismatchError(
            f"the fold in '{directory}' was made with other inputs; what differs: {', '.join(differing[:6])}",
            folds_cure(directory.parent.parent),
        )


def _lacking(teachers_dir: Path, trained: Sequence[str], count: int) -> set[str]:
    """The teachers that are not in the bundle of every fold."""
    directories = [fold_directory(teachers_dir, fold) for fold in range(count)]
    there = [read_bundle(one).teachers if is_bundle(one) else {} for one in directories]
    return {name for name in trained if any(name not in teachers for teachers in there)}


def _refuse_other_rows(
    task: TaskData, teachers_dir: Path, bundle: Bundle, trained: Collection[str], lacking: Collection[str]
) -> None:
    """MismatchError if a fold is missing and the train rows are not those that a teacher was trained on."""
    rows = joint.examples_digest(task.splits["train"])
    if lacking and bundle.training.get("identity", {}).get("data.train") != rows:
        remove = f", after: rm -r '{fold_directory(teachers_dir, 0).parent}'" if folds_begun(teachers_dir) else ""
        raise MismatchError(
            f"the recipe has other train rows than the teachers in '{teachers_dir}', whose folds are of their rows",
            f"Use their train rows, or another --output-dir. Or do without folds: leave out cofinetune.folds{remove}",
        )
    for name, identity in bundle.training.get("added", {}).items():
        if name in trained and identity["data.train"] != rows:
            raise MismatchError(
                f"teacher '{name}' was added with other train rows than the recipe's, so it may have seen texts of "
                "every fold",
                f"Leave '{name}' out of the recipe: the others then get folds without it. Or train the teachers "
                "together in another --output-dir.",
            )


@dataclass(frozen=True)
class _Inputs:
    """What this recipe would train the folds with, and what ``bundle`` records of its teachers."""

    recipe: Recipe
    task: TaskData
    bundle: Bundle
    folds: Folds
    open_teachers: Open

    def refuse_others(self, lacking: AbstractSet[str]) -> None:
        """MismatchError if a teacher of ``lacking`` would be trained with other inputs than are recorded."""
        added: Mapping[str, Mapping[str, Any]] = self.bundle.training.get("added", {})
        together = [name for name in self.folds.trained if name in self.bundle.teachers and name not in added]
        command = "kdcache cofinetune RECIPE"
        if not lacking.isdisjoint(together):
            self._compare(
                together,
                self._of_trained(),
                None,
                "Make their folds with the recipe that they were made with, then run this command again: "
                f"{command} --folds {self.folds.count}",
            )
        for name in [name for name in added if name in lacking]:
            self._compare(
                [name],
                added[name],
                self.bundle.pooling,
                f"Leave '{name}' out of the recipe here. It gets folds by the recipe that it was added with: "
                f"{command} --add {name} --folds {self.folds.count}",
            )

    def _of_trained(self) -> dict[str, Any]:
        """The recorded inputs of the joint training, without those of ready classifiers."""
        own = tuple(f"teachers.{name}." for name, teacher in self.bundle.teachers.items() if teacher.head == "own")
        return {key: value for key, value in self.bundle.training["identity"].items() if not key.startswith(own)}

    def _compare(self, names: Sequence[str], recorded: Mapping[str, Any], pooling: Pooling | None, cure: str) -> None:
        opened = self.open_teachers([self.recipe.teacher(name) for name in names], pooling)
        now = joint.identity(self.recipe, self.task, opened.identities(), shared_head=recorded.get("shared_head"))
        differing = list(identity_changes(recorded, now, joint.newer_keys(now)))
        if differing:
            raise MismatchError(
                f"the folds of {'teacher' if len(names) == 1 else 'teachers'} {listed(names, quoted=True)} would be "
                f"made with other inputs than on all rows; what differs: {listed(differing, most=6)}",
                cure,
            )
