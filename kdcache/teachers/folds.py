"""Out-of-fold teachers: which rows a bundle of a fold was not trained on, and what it answers on them.

    teachers/_folds/1/                          the first bundle, trained on all rows outside fold 1
    teachers/_folds/1/_logits/bert.safetensors  its logits for the texts of fold 1: text_ids, logits [n, classes]

A teacher answers with great certainty on the rows that it was trained on. The logits of a train text therefore come
from the bundle that saw neither that text nor another text of its group. They are computed once, in float32, when the
bundle is trained; a dump looks them up by text id. So every engine of a dump stores the same values, none loads more
than one model, and a transfer text that equals a train text gets them too.

teachers.json names the folds under ``training.folds`` when all of them are complete; it is written last.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kdcache.cache.ids import IdIndex, id_list
from kdcache.cache.spec import FoldsSpec
from kdcache.data.texts import seeded_keys
from kdcache.errors import DamageError, DataError, MismatchError, first_line
from kdcache.files import make_directory, write_file
from kdcache.progress import counted
from kdcache.teachers.bundle import read_bundle

if TYPE_CHECKING:
    from kdcache.cache.ids import Examples
    from kdcache.data.task import TaskData
    from kdcache.teachers.bundle import Bundle

_FOLDS = "_folds"  # not a possible name of a teacher
_AGAIN = "Run the same kdcache cofinetune again: it continues."


def fold_directory(teachers_dir: Path, fold: int) -> Path:
    """The bundle that was not trained on the rows of ``fold`` (from 0)."""
    return teachers_dir / _FOLDS / str(fold + 1)


def begin_folds(teachers_dir: Path) -> None:
    """Mark that the teachers are to have folds."""
    make_directory(teachers_dir / _FOLDS)


def folds_begun(teachers_dir: Path) -> bool:
    """Whether the teachers have folds, or are to have them."""
    return (teachers_dir / _FOLDS).is_dir()


def folds_complete(teachers_dir: Path, trained: Sequence[str], record: Mapping[str, Any]) -> bool:
    """Whether the folds of ``record``, from teachers.json, are there for all ``trained`` teachers."""
    directories = [fold_directory(teachers_dir, fold) for fold in range(record["count"])]
    return [*record["teachers"]] == list(trained) and all(
        _logits_file(directory, name).is_file() for directory in directories for name in trained
    )


def folds_cure(teachers_dir: Path) -> str:
    """The hint for folds that were made with other inputs."""
    return f"Restore these, or make the folds again after: rm -r '{teachers_dir / _FOLDS}'"


def assign_folds(examples: Examples, folds: int, seed: int) -> np.ndarray:
    """The fold of every row, int64[n]; -1 for rows that no bundle is trained on.

    Rows of one text, and rows of one group, are in one fold. Rows that are connected so and have no label are in none.
    Folds have equally many labelled rows, as far as groups allow. Which rows a fold has depends on the set of rows and
    the seed, not on their order. Raises DataError for fewer groups than folds.
    """
    owner = _connected(examples)
    labelled = np.bincount(owner, weights=examples.labels >= 0).astype(np.int64)
    first = [b"\xff" * 16] * len(labelled)  # the smallest text id names a group of rows
    for row, one in zip(owner.tolist(), id_list(examples.text_ids), strict=True):
        first[row] = min(first[row], one)
    known = np.flatnonzero(labelled).tolist()
    if len(known) < folds:
        raise DataError(
            f"the labelled rows of train are {counted(len(known), 'group')} of texts; {folds} folds need as many",
            "Give a smaller cofinetune.folds, or check data.group.",
        )
    keys = dict(zip(known, seeded_keys([first[group] for group in known], seed, "folds"), strict=True))
    fold_of = np.full(len(labelled), -1, np.int64)
    filled = [(0, fold) for fold in range(folds)]  # a heap: labelled rows so far, fold
    for group in sorted(known, key=lambda group: (-labelled[group], keys[group], first[group])):
        rows, fold = filled[0]
        fold_of[group] = fold
        heapq.heapreplace(filled, (rows + int(labelled[group]), fold))
    assigned: np.ndarray = fold_of[owner]
    return assigned


def _connected(examples: Examples) -> np.ndarray:
    """A number for every row, int64[n], the same for rows that share a text or a group; an empty group is none."""
    parent = list(range(len(examples)))

    def root(row: int) -> int:
        while parent[row] != row:
            parent[row] = row = parent[parent[row]]
        return row

    seen: dict[bytes | str, int] = {}
    groups: Sequence[str] = examples.groups or ("",) * len(examples)
    for row, (one, group) in enumerate(zip(id_list(examples.text_ids), groups, strict=True)):
        for key in (one, group) if group else (one,):
            parent[root(row)] = root(seen.setdefault(key, row))
    roots = np.array([root(row) for row in range(len(examples))], np.int64)
    return np.unique(roots, return_inverse=True)[1].astype(np.int64)


def without_fold(task: TaskData, assigned: np.ndarray, fold: int) -> TaskData:
    """The task with the train rows outside ``fold`` alone."""
    return replace(task, splits={**task.splits, "train": rows_where(task.splits["train"], assigned != fold)})


def rows_where(examples: Examples, keep: np.ndarray) -> Examples:
    """The rows where ``keep`` [n] is true, in their order."""
    groups = examples.groups
    return replace(
        examples,
        text_ids=examples.text_ids[keep],
        labels=examples.labels[keep],
        groups=None if groups is None else tuple(group for group, kept in zip(groups, keep, strict=True) if kept),
    )


def texts_of_fold(task: TaskData, assigned: np.ndarray, fold: int) -> np.ndarray:
    """The ids of the distinct texts of ``fold``, uint8[n, 16], sorted."""
    ids: np.ndarray = np.unique(task.splits["train"].text_ids[assigned == fold], axis=0)
    return ids


@dataclass(frozen=True, eq=False)
class FoldLogits:
    """What the bundles answer on the texts that they did not see.

    ``text_ids`` uint8[n, 16]; ``folds`` int64[n] from 0; ``logits`` float32[n, classes]. ``facts``: of teachers.json.
    """

    spec: FoldsSpec
    text_ids: np.ndarray
    folds: np.ndarray
    logits: np.ndarray
    facts: Mapping[str, Any]

    @cached_property
    def _index(self) -> IdIndex:
        return IdIndex(self.text_ids)

    def places(self, text_ids: np.ndarray) -> np.ndarray:
        """The row of each text here, int64[m]; -1 for a text that is no train text."""
        return self._index.find(text_ids)

    def instead_of(self, logits: np.ndarray, text_ids: np.ndarray) -> np.ndarray:
        """``logits`` [m, classes] of texts, those of train texts from the bundle that did not see them."""
        places = self.places(text_ids)
        replaced: np.ndarray = np.where((places >= 0)[:, None], self.logits[places], logits)
        return replaced


def write_fold_logits(directory: Path, name: str, text_ids: np.ndarray, logits: np.ndarray, made_by: str) -> None:
    """Write what teacher ``name`` of the bundle in ``directory`` answers.

    ``made_by``: the fingerprint of its weights.
    """
    from safetensors.numpy import save

    path = _logits_file(directory, name)
    make_directory(path.parent)
    tensors = {"text_ids": np.ascontiguousarray(text_ids), "logits": np.ascontiguousarray(logits)}
    write_file(path, save(tensors, {"weights": made_by}))


def has_fold_logits(directory: Path, name: str, text_ids: np.ndarray, made_by: str) -> bool:
    """Whether the answers of this teacher on these texts are there."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(_logits_file(directory, name), framework="numpy") as file:
            return (file.metadata() or {}).get("weights") == made_by and np.array_equal(
                file.get_tensor("text_ids"), text_ids
            )
    except (OSError, SafetensorError):
        return False


def gather_folds(teachers_dir: Path, name: str, weights: Sequence[str], facts: Mapping[str, Any]) -> FoldLogits:
    """The answers of all folds of teacher ``name``; ``weights``: the fingerprint of each. Raises DamageError."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    parts = []
    for fold in range(len(weights)):
        path = _logits_file(fold_directory(teachers_dir, fold), name)
        try:
            parts.append(load_file(path))
        except (OSError, SafetensorError) as error:
            raise DamageError(f"'{path}' is missing or not readable: {first_line(error)}", _AGAIN) from error
    ids, logits = (np.concatenate([part[key] for part in parts]) for key in ("text_ids", "logits"))
    folds = np.repeat(np.arange(len(parts)), [len(part["text_ids"]) for part in parts])
    if len(np.unique(ids, axis=0)) != len(ids):
        raise DamageError(f"a text is in two folds of '{teachers_dir / _FOLDS}'", folds_cure(teachers_dir))
    digest = hashlib.sha256(b"".join((ids.tobytes(), folds.astype("<i8").tobytes(), logits.astype("<f4").tobytes())))
    spec = FoldsSpec(weights=tuple(weights), logits=digest.hexdigest(), texts=len(ids))
    return FoldLogits(spec, ids, folds, logits, facts)


def read_folds(teachers_dir: Path, name: str, bundle: Bundle | None = None) -> FoldLogits | None:
    """The out-of-fold logits of a teacher; None if it was fine-tuned elsewhere or the teachers have no folds.

    Raises MismatchError where co-finetuning with folds did not end; DamageError for files that are not those of
    teachers.json.
    """
    bundle = bundle or read_bundle(teachers_dir)
    record = bundle.training.get("folds")
    if bundle.teachers[name].head == "own" or (record is None and not folds_begun(teachers_dir)):
        return None
    facts = {} if record is None else record["teachers"].get(name, {})
    if not facts:
        raise MismatchError(
            f"the folds of teacher '{name}' in '{teachers_dir}' are not complete",
            f"{_AGAIN} For the logits of the full training set dump.out_of_fold = false.",
        )
    found = gather_folds(teachers_dir, name, facts["weights"], facts)
    if found.spec.logits != facts["logits"]:
        raise DamageError(
            f"the out-of-fold logits of teacher '{name}' in '{teachers_dir}' are not those that teachers.json names",
            folds_cure(teachers_dir),
        )
    return found


def choose_folds(teachers_dir: Path, name: str, max_length: int, *, asked: bool | None) -> FoldLogits | None:
    """The out-of-fold logits that a dump takes of a teacher; ``asked``: ``dump.out_of_fold``, None if not given.

    Raises MismatchError if they are asked for and not there, or were computed with another ``max_length``; as
    ``read_folds``.
    """
    if asked is False:
        return None
    bundle = read_bundle(teachers_dir)
    found = read_folds(teachers_dir, name, bundle)
    if found is None:
        if asked and bundle.teachers[name].head == "shared":
            raise MismatchError(
                f"out-of-fold logits of teacher '{name}' are asked for, and '{teachers_dir}' has no folds",
                "Train them: kdcache cofinetune RECIPE --folds 5; or set dump.out_of_fold = false.",
            )
        return None
    if bundle.teachers[name].max_length != max_length:
        raise MismatchError(
            f"the out-of-fold logits of teacher '{name}' were computed with max_length "
            f"{bundle.teachers[name].max_length}; the dump asks for {max_length}",
            "Dump with the max_length of co-finetuning, or set dump.out_of_fold = false.",
        )
    return found


def folds_of_cache(teachers_dir: Path, name: str, spec: FoldsSpec | None) -> FoldLogits | None:
    """The out-of-fold logits that a cache says it has of a teacher; MismatchError if ``teachers_dir`` has others."""
    if spec is None:
        return None
    found = read_folds(teachers_dir, name)
    if found is None or found.spec != spec:
        raise MismatchError(
            f"the cache has logits of teacher '{name}' from {spec}; '{teachers_dir}' has "
            f"{'no folds' if found is None else found.spec}",
            "Give the teachers that the cache was dumped from, with their folds.",
        )
    return found


def _logits_file(directory: Path, name: str) -> Path:
    return directory / "_logits" / f"{name}.safetensors"
