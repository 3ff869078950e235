"""A run directory: its layout, and which stages are finished with which inputs.

    runs/<name>/
      recipe.toml     the resolved recipe        teachers/    the co-finetuned teachers and their shared head
      run.json        stage records              cache/       the teacher outputs
      metrics.jsonl   every logged loss          student/     the student, loadable by transformers
      results.json    scores                     baseline/    the same student without teachers (a run directory itself)
      report.html     the page of the run        checkpoints/ from which an interrupted stage continues
      predictions.safetensors                    the student's logits on validation and test, the teachers' answers
      sweep/          the students of a sweep, each a run directory itself; sweep.json, sweep.html

A stage record is written when the stage is finished. It holds, by key, everything the result depends on: the values of
recipe keys and the sha256 of every local file they name. If the record equals the current inputs, the stage is skipped;
otherwise the differing keys are named, and the stage decides: teachers and cache compare their own fingerprints.

Keys that begin with ``OF_TEACHERS`` stand for what the student without teachers takes over from co-finetuned ones.
Earlier records do not have them, and they are not known where the teachers' files are gone. A missing one is no
difference.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from kdcache.errors import DamageError, StorageError
from kdcache.files import make_directory, replace_file

if TYPE_CHECKING:
    from kdcache.recipe import Recipe

Stage = Literal["teachers", "cache", "student", "baseline"]
_LONGEST_VALUE = 200  # characters of a value in a message
_SWEEP = "sweep"
_OF_A_SWEEP = re.compile(r"[0-9a-f]{12}-s[0-9]+")  # the directory of a student: digest of its settings, seed
Inputs = dict[str, str]  # recipe key or file path -> JSON value or sha256
OF_TEACHERS = "teachers/"  # begins the keys of what a student takes over from co-finetuned teachers


@dataclass(frozen=True)
class RunDirectory:
    """The layout under ``root``; only ``create`` writes."""

    root: Path

    @property
    def recipe_file(self) -> Path:
        return self.root / "recipe.toml"

    @property
    def record(self) -> Path:
        return self.root / "run.json"

    @property
    def teachers(self) -> Path:
        return self.root / "teachers"

    @property
    def cache(self) -> Path:
        return self.root / "cache"

    @property
    def student(self) -> Path:
        return self.root / "student"

    @property
    def baseline(self) -> RunDirectory:
        return RunDirectory(self.root / "baseline")

    @property
    def sweep(self) -> Path:
        return self.root / _SWEEP

    def of_sweep(self, digest: str, seed: int) -> RunDirectory:
        """The directory of one student of the sweep; ``digest`` as ``student_digest`` gives it."""
        return RunDirectory(self.sweep / f"{digest[:12]}-s{seed}")

    @property
    def whole(self) -> RunDirectory:
        """The run that this one belongs to: for a student of a sweep that of the recipe, else the run itself."""
        in_sweep = self.root.parent.name == _SWEEP and _OF_A_SWEEP.fullmatch(self.root.name)
        return RunDirectory(self.root.parent.parent) if in_sweep else self

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def results(self) -> Path:
        return self.root / "results.json"

    @property
    def predictions(self) -> Path:
        return self.root / "predictions.safetensors"

    @property
    def report(self) -> Path:
        return self.root / "report.html"

    @property
    def plan(self) -> Path:
        return self.root / "plan.json"

    def create(self) -> None:
        """Make the directory, durably. Raises StorageError."""
        try:
            make_directory(self.root)
        except StorageError as error:
            raise StorageError(
                f"cannot make the run directory '{self.root}': {error.message}", "Give another --output-dir."
            ) from error


def changes(run: RunDirectory, stage: Stage, inputs: Inputs) -> list[str] | None:
    """The differences between ``inputs`` and those the stage was finished with; None if it is not finished.

    Keys of ``OF_TEACHERS`` count where both have them.
    """
    entry = read_record(run).get("stages", {}).get(stage)
    if entry is None:
        return None
    recorded: Inputs = entry["inputs"]
    unknown = {key for key in recorded.keys() ^ inputs.keys() if key.startswith(OF_TEACHERS)}
    old, new = ({key: value for key, value in each.items() if key not in unknown} for each in (recorded, inputs))
    return differences(old, new)


def mark_finished(run: RunDirectory, stage: Stage, inputs: Inputs, seconds: float) -> None:
    """Record that the stage is complete; ``seconds``: duration of its last, perhaps resumed, execution."""
    finished = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    entry = {"inputs": inputs, "digest": digest(inputs), "finished": finished, "seconds": round(seconds, 1)}
    _update(run, {**read_record(run).get("stages", {}), stage: entry})


def forget(run: RunDirectory, stage: Stage) -> None:
    """Remove the stage's record, before its result is made again."""
    stages = read_record(run).get("stages", {})
    if stage in stages:
        _update(run, {name: entry for name, entry in stages.items() if name != stage})


def read_record(run: RunDirectory) -> dict[str, Any]:
    """``run.json``, or an empty record."""
    try:
        record = json.loads(run.record.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise DamageError(
            f"'{run.record}' is not readable: {error}", "Delete it; the stages are then checked again."
        ) from error
    if not isinstance(record, dict) or record.get("format") != 1:
        raise DamageError(
            f"'{run.record}' is not a stage record of format 1", "Delete it; the stages are then checked again."
        )
    return record


def differences(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    """``key: old value -> new value`` for every key that differs, in the order of the keys."""
    lines = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if before != after:
            file = (before or after or "").startswith("sha256:")
            lines.append(
                f"{key}: contents differ"
                if file and before and after
                else f"{key}: {_short(before)} -> {_short(after)}"
            )
    return lines


def _short(value: str | None) -> str:
    """A value for a message, shortened: a list of labels may have thousands."""
    return (value or "none") if len(value or "") <= _LONGEST_VALUE else f"{(value or '')[:_LONGEST_VALUE]}…"


def digest(inputs: Inputs) -> str:
    """sha256 of the inputs in canonical JSON."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


TRANSFER_KEYS = frozenset(("transfer", "transfer_rows"))  # of the data section, for the dump and the student only
_SOFT = {
    "method",
    "paper",
    "temperature",
    "t_squared",
    "hidden_direction",
    "layer_map",
    "teachers",
    "teacher_layers",
    "teacher_weights",
    "teacher_temperatures",
    "teacher_class_weights",
    "student_scores",
    "missing",
    "weights",
    "task_mean",
}
_STORED = {"layers", "per_layer"}  # keys of a teacher for the dump only
_NEVER = {
    "licence",
    "checkpoint_steps",
    "checkpoint_minutes",
    "trust_remote_code",
    "trackers",
    "placement",
}  # keys that change no result


_PART_SIZE, _WINDOW = 4096, 8  # where a recipe has none: the defaults of 0.1.0, whose finished stages stay finished


def stage_inputs(recipe: Recipe, stage: Stage, *, upstream: str = "") -> Inputs:
    """Everything the stage's result depends on; ``upstream``: the identity of the previous stage's result."""
    document = recipe.model_dump(mode="json")
    data = document["data"]
    labelled = {key: value for key, value in data.items() if key not in TRANSFER_KEYS}
    trained = [{key: value for key, value in teacher.items() if key not in _STORED} for teacher in document["teachers"]]
    parts: dict[Stage, dict[str, Any]] = {
        "teachers": {"data": labelled, "teachers": trained, "cofinetune": document["cofinetune"]},
        "cache": {
            "data": data,
            "teachers": document["teachers"],
            "dump": {**document["dump"], "part_size": document["dump"]["part_size"] or _PART_SIZE},
            "student": _layers(document),
        },
        "student": {"data": data, "student": document["student"]},
        "baseline": {"data": labelled, "student": document["student"]},
    }
    training = training_inputs(recipe, stage) if stage in ("student", "baseline") else {}
    return dict(_flatten(parts[stage])) | training | ({"upstream": upstream} if upstream else {})


def training_inputs(recipe: Recipe, stage: Literal["student", "baseline"]) -> Inputs:
    """The ``distill`` keys of ``stage_inputs``, for which no file is read."""
    section = recipe.distill if stage == "student" else recipe.without_teachers()
    values = section.model_dump(mode="json")
    values["window"] = values["window"] or _WINDOW
    if stage == "student":
        return dict(_flatten({"distill": values}))
    optimisation = {key: value for key, value in values.items() if key not in _SOFT}
    if not recipe.distill.weights.task:
        optimisation["task"] = values["weights"]["task"]  # 0.2.0 took that of [distill], and learned nothing
    return dict(_flatten({"distill": optimisation}))


def student_digest(recipe: Recipe, *, upstream: str = "") -> str:
    """Hex sha256 of what a student depends on, whatever its seed.

    As ``stage_inputs``, without keys that have their default: a key that a later version adds changes no digest.
    """
    document = recipe.model_dump(mode="json", exclude_defaults=True, include={"data", "student", "distill"})
    section = document.get("distill", {})
    section.pop("seed", None)
    if section.get("window") == _WINDOW:  # was a default
        del section["window"]
    return digest(dict(_flatten(document)) | {"upstream": upstream})


def file_identity(path: Path) -> str:
    """``sha256:…`` of a file, or an empty string if it is missing."""
    try:
        with path.open("rb") as opened:
            return "sha256:" + hashlib.file_digest(opened, "sha256").hexdigest()
    except FileNotFoundError:
        return ""


def home() -> Path:
    """The directory for files that can be fetched again: ``KDCACHE_HOME``, or ``~/.cache/kdcache``."""
    return Path(os.environ.get("KDCACHE_HOME") or Path.home() / ".cache" / "kdcache")


def _update(run: RunDirectory, stages: dict[str, Any]) -> None:
    replace_file(run.record, (json.dumps({"format": 1, "stages": stages}, indent=1, sort_keys=True) + "\n").encode())


def _layers(document: dict[str, Any]) -> dict[str, Any]:
    student = document["student"] or {}
    return {"layers": student.get("layers")} if document["dump"]["layers"] == "even" else {}


def _flatten(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Nested tables and lists of named tables as dotted keys, as in ``--set``; files as their sha256."""
    if isinstance(value, dict):
        for name, inner in value.items():
            if name not in _NEVER:
                yield from _flatten(inner, f"{key}.{name}" if key else name)
    elif isinstance(value, list) and value and all(isinstance(entry, dict) and "name" in entry for entry in value):
        for entry in value:
            yield from _flatten(entry, f"{key}.{entry['name']}")
    elif isinstance(value, list) and any(_is_local(entry) for entry in value):
        for position, entry in enumerate(value):
            yield from _flatten(entry, f"{key}.{position}")
    elif _is_local(value):
        yield from _contents(Path(value), key)
    elif value is not None:
        yield key, json.dumps(value, ensure_ascii=False)


def _is_local(value: Any) -> bool:
    return isinstance(value, str) and Path(value).is_absolute() and Path(value).exists()  # recipes hold absolute paths


def _contents(path: Path, key: str) -> Iterator[tuple[str, str]]:
    """The sha256 of the files under a path, so that a moved checkout is the same run."""
    if path.is_file():
        yield key, file_identity(path)
        return
    for file in sorted(entry for entry in path.rglob("*") if entry.is_file()):
        yield f"{key}/{file.relative_to(path)}", file_identity(file)
