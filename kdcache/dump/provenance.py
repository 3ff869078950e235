"""The provenance of a cache: the part of the manifest outside the identity, as strings and integers.

A teacher that does not run keeps the record of its last run, so that extending a cache or continuing an interrupted
dump loses no record. The counts of a part are written before its commit record: however the process ends, what it ran
is counted, each part once.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import time
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdcache import __version__
from kdcache.cache.layout import MANIFEST, STATE
from kdcache.cache.manifest import read_manifest
from kdcache.errors import KdcacheError
from kdcache.files import remove_file, write_file

if TYPE_CHECKING:
    from kdcache.dump.run import TeacherRun
    from kdcache.dump.specs import PreparedTeacher
    from kdcache.recipe import Recipe
    from kdcache.teachers.bundle import Bundle, TeacherRecord

_PACKAGES = ("torch", "transformers", "tokenizers", "zarr", "pyarrow", "numpy", "safetensors")
_OF_ORIGIN = ("source", "revision", "licence", "scores")  # of a teacher, not of its run
BATCH = "tokens_per_batch"  # in the record of a run, if it was chosen by the memory of a GPU
_SUFFIX = ".run"  # of records in the directory of a dump in progress
_COUNTS = ".counts"  # of what one run of a teacher counted, there too: NAME.RUN.counts


def dump_provenance(recipe: Recipe, bundle: Bundle, cache_dir: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """``given`` by the caller (command, system) with recipe, versions, time, and a record per teacher."""
    teachers = dict(_earlier(cache_dir).get("teachers", {}))
    for section in recipe.teachers:
        origin = _origin(bundle.teachers[section.name])
        stated = {"licence": section.licence} if section.licence else {}
        teachers[section.name] = {**teachers.get(section.name, {}), **origin, **stated}
    about = {
        "recipe": recipe.name,
        "licence": recipe.licence,
        "data_licence": recipe.data.licence,
        "mean_scores": _strings(bundle.mean_scores),
    }
    return _published(given, teachers, cache_dir) | about


def extended_provenance(
    before: Mapping[str, Any], added: Mapping[str, TeacherRecord], cache_dir: Path, given: Mapping[str, Any]
) -> dict[str, Any]:
    """The provenance ``before``, with records of the teachers ``added`` and of the runs since."""
    known = before.get("teachers")
    teachers = dict(known) if isinstance(known, Mapping) else {}
    for name, origin in added.items():
        stated = {key: value for key, value in _origin(origin).items() if value}
        teachers[name] = {**teachers.get(name, {}), **stated}
    return {**before, **_published(given, teachers, cache_dir)}


def with_folds(provenance: dict[str, Any], teachers: Iterable[PreparedTeacher]) -> dict[str, Any]:
    """``provenance`` with accuracy and NLL on the labelled train rows, of teachers with out-of-fold logits.

    ``in_fold``: of the teacher itself, which was trained on them. ``out_of_fold``: of the logits in the cache.
    """
    records = dict(provenance["teachers"])
    for teacher in teachers:
        if teacher.out_of_fold is not None:
            scores = teacher.out_of_fold.facts["scores"]
            on_train = {
                kind: _strings({"accuracy": values["accuracy"], "nll": values["loss"]})
                for kind, values in scores.items()
            }
            records[teacher.name] = {**records.get(teacher.name, {}), "train_rows": on_train}
    return {**provenance, "teachers": records}


def _published(given: Mapping[str, Any], teachers: Mapping[str, Any], cache_dir: Path) -> dict[str, Any]:
    """``given`` with versions, time, and the records of ``teachers`` with those of their runs."""
    remembered = _remembered(cache_dir)
    runs = {name: {**teachers[name], **remembered[name]} for name in teachers if name in remembered}
    versions = {**library_versions(), **given.get("versions", {})}
    return {**given, "versions": versions, "published": _now(), "teachers": {**teachers, **runs}}


class RunCounts:
    """Counts of one run of a teacher, by part. Every run has a file of its own, so several may run at a time."""

    def __init__(self, cache_dir: Path, name: str) -> None:
        self._path = cache_dir / STATE / f"{name}.{secrets.token_hex(4)}{_COUNTS}"
        self._parts: dict[str, tuple[int, int, float]] = {}
        self._since = time.perf_counter()

    def add(self, part: str, texts: int, truncated: int) -> None:
        """Write the counts of a part, and the seconds since the part before, ahead of its commit record.

        Raises StorageError.
        """
        now = time.perf_counter()
        self._parts[part] = texts, truncated, round(now - self._since, 3)
        self._since = now
        write_file(self._path, json.dumps(self._parts).encode())


def remember_run(cache_dir: Path, run: TeacherRun, *, shared: bool = False) -> None:
    """Write the record of a finished run; it outlives this process until the cache is published.

    Counts that the run wrote by part are not written again. ``shared``: the run is one of several that share the work,
    so its counts are added to those of the others. Seconds are then those of all workers together.
    """
    before = _records(cache_dir).get(run.teacher, {}) if shared or run.counted else {}
    counts = {} if run.counted else _added(before, run.texts, run.truncated, run.seconds)
    _write_record(cache_dir, run.teacher, {**before, "dumped": _now(), **counts, **run.record})


def remember_batch(cache_dir: Path, name: str, tokens: int) -> None:
    """Write the size of a teacher's batches before its first part: what comes later takes the same."""
    _write_record(cache_dir, name, {**_records(cache_dir).get(name, {}), BATCH: str(tokens)})


def remembered_run(cache_dir: Path, name: str) -> dict[str, Any] | None:
    """What is recorded of a teacher's runs since the cache was published; None if it did not run."""
    return _remembered(cache_dir).get(name)


def remembered_batch(cache_dir: Path, name: str) -> int | None:
    """The size of batches that was chosen for a teacher's parts; None if there was nothing to choose."""
    for record in (_remembered(cache_dir).get(name), dict(_earlier(cache_dir).get("teachers", {})).get(name)):
        given = record.get(BATCH) if isinstance(record, Mapping) else None
        if isinstance(given, str) and given.isascii() and given.isdigit() and 0 < int(given) < 2**31:
            return int(given)
    return None


def inherit_run(source: Path, cache_dir: Path, name: str) -> None:
    """Copy the record of a teacher's runs from the directory that its files were taken from.

    Counts stay by part: what is not taken runs again, and counts once.
    """
    counts = _counts_files(source).get(name, [])
    record = _records(source).get(name, {})
    if not record and not counts:
        record = dict(_earlier(source).get("teachers", {})).get(name, {})
    known = (
        {key: value for key, value in record.items() if key not in _OF_ORIGIN} if isinstance(record, Mapping) else {}
    )
    if known:
        _write_record(cache_dir, name, known)
    for path in counts:
        write_file(cache_dir / STATE / path.name, path.read_bytes())


def forget_runs(cache_dir: Path, teachers: Iterable[str]) -> None:
    """Remove the records of the runs of ``teachers``, which the manifest has now."""
    counts = _counts_files(cache_dir)
    for name in teachers:
        for path in (*counts.get(name, ()), cache_dir / STATE / f"{name}{_SUFFIX}"):
            remove_file(path)


def _remembered(cache_dir: Path) -> dict[str, dict[str, Any]]:
    """Per teacher that ran since the cache was published, the record of its runs."""
    records, counts = _records(cache_dir), _counts_files(cache_dir)
    return {name: _with_counts(records.get(name, {}), counts.get(name, ())) for name in {**records, **counts}}


def _records(cache_dir: Path) -> dict[str, dict[str, Any]]:
    """The records without the counts by part."""
    paths = sorted((cache_dir / STATE).glob(f"*{_SUFFIX}"))
    return {path.name.removesuffix(_SUFFIX): json.loads(path.read_bytes()) for path in paths}


def _write_record(cache_dir: Path, name: str, record: Mapping[str, Any]) -> None:
    write_file(cache_dir / STATE / f"{name}{_SUFFIX}", json.dumps(record).encode())


def _counts_files(cache_dir: Path) -> dict[str, list[Path]]:
    """The files of ``RunCounts``, by teacher."""
    found: dict[str, list[Path]] = {}
    for path in sorted((cache_dir / STATE).glob(f"*{_COUNTS}")):
        found.setdefault(path.name.removesuffix(_COUNTS).rpartition(".")[0], []).append(path)
    return found


def _with_counts(record: Mapping[str, Any], files: Iterable[Path]) -> dict[str, Any]:
    """``record`` with the counts by part; a part that ran twice counts once."""
    parts: dict[str, tuple[int, int, float]] = {}
    for path in files:
        parts |= json.loads(path.read_bytes())
    if not parts:
        return dict(record)
    texts, truncated, seconds = zip(*parts.values(), strict=True)
    return {**record, **_added(record, sum(texts), sum(truncated), sum(seconds))}


def _added(record: Mapping[str, Any], texts: int, truncated: int, seconds: float) -> dict[str, Any]:
    """The counts of ``record`` and these together."""
    texts += int(record.get("texts_run", 0))
    seconds += float(record.get("seconds", 0.0))
    return {
        "texts_run": texts,
        "texts_truncated": truncated + int(record.get("texts_truncated", 0)),  # of those
        "seconds": f"{seconds:.1f}",
        "texts_per_second": f"{texts / seconds:.1f}" if seconds else "",
    }


def _earlier(cache_dir: Path) -> dict[str, Any]:
    """The provenance of the published cache; empty if there is none, or if it is unreadable."""
    if (cache_dir / MANIFEST).is_file():
        with contextlib.suppress(KdcacheError):
            return read_manifest(cache_dir).provenance
    return {}


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _origin(record: TeacherRecord) -> dict[str, Any]:
    code = {"trust_remote_code": "true"} if record.trust_remote_code else {}
    return code | {
        "source": record.source,
        "revision": record.revision or "",
        "licence": record.licence,
        "scores": _strings(record.scores),
    }


def _strings(scores: Mapping[str, float]) -> dict[str, str]:
    return {name: f"{value:.6g}" for name, value in scores.items()}


def library_versions() -> dict[str, str]:
    """Versions of kdcache and of the libraries that the bytes of a cache depend on."""
    versions = {"kdcache": __version__}
    for name in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions
