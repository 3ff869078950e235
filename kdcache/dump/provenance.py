"""The provenance of a cache: the part of the manifest outside the identity, as strings and integers.

A teacher that does not run keeps the record of its last run, so that extending a cache or continuing an interrupted
dump loses no record.
"""

from __future__ import annotations

import contextlib
import json
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


def remember_run(cache_dir: Path, run: TeacherRun, *, shared: bool = False) -> None:
    """Write the record of a finished run; it outlives this process until the cache is published.

    ``shared``: the run is one of several that share the work, so its counts are added to those of the others. Seconds
    are then those of all workers together.
    """
    before = _remembered(cache_dir).get(run.teacher, {}) if shared else {}
    texts = run.texts + int(before.get("texts_run", 0))
    seconds = run.seconds + float(before.get("seconds", 0.0))
    record = {
        "dumped": _now(),
        "texts_run": texts,
        "texts_truncated": run.truncated + int(before.get("texts_truncated", 0)),  # of those
        "seconds": f"{seconds:.1f}",
        "texts_per_second": f"{texts / seconds:.1f}" if seconds else "",
        **run.record,
    }
    write_file(cache_dir / STATE / f"{run.teacher}{_SUFFIX}", json.dumps(record).encode())


def remember_batch(cache_dir: Path, name: str, tokens: int) -> None:
    """Write the size of a teacher's batches before its first part: what comes later takes the same."""
    record = {**_remembered(cache_dir).get(name, {}), BATCH: str(tokens)}
    write_file(cache_dir / STATE / f"{name}{_SUFFIX}", json.dumps(record).encode())


def remembered_batch(cache_dir: Path, name: str) -> int | None:
    """The size of batches that was chosen for a teacher's parts; None if there was nothing to choose."""
    for record in (_remembered(cache_dir).get(name), dict(_earlier(cache_dir).get("teachers", {})).get(name)):
        given = record.get(BATCH) if isinstance(record, Mapping) else None
        if isinstance(given, str) and given.isascii() and given.isdigit() and 0 < int(given) < 2**31:
            return int(given)
    return None


def inherit_run(source: Path, cache_dir: Path, name: str) -> None:
    """Copy the record of a teacher's run from the directory that its files were taken from."""
    record = _remembered(source).get(name) or dict(_earlier(source).get("teachers", {})).get(name, {})
    known = (
        {key: value for key, value in record.items() if key not in _OF_ORIGIN} if isinstance(record, Mapping) else {}
    )
    if known:
        write_file(cache_dir / STATE / f"{name}{_SUFFIX}", json.dumps(known).encode())


def forget_runs(cache_dir: Path, teachers: Iterable[str]) -> None:
    """Remove the records of the runs of ``teachers``, which the manifest has now."""
    for name in teachers:
        remove_file(cache_dir / STATE / f"{name}{_SUFFIX}")


def _remembered(cache_dir: Path) -> dict[str, dict[str, Any]]:
    paths = sorted((cache_dir / STATE).glob(f"*{_SUFFIX}"))
    return {path.name.removesuffix(_SUFFIX): json.loads(path.read_bytes()) for path in paths}


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
