"""The teachers of a cache: their size and speed as the dump recorded them, and their files, where these are at hand.

A student is distilled without teachers. Where their files are beside the cache or the run, they must be the ones that
the cache was dumped from. They are read and hashed, one tensor after the other; no model is made of them, so that a
teacher may be larger than the memory of this machine's device.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdcache.cache.spec import differing
from kdcache.errors import MismatchError
from kdcache.runs import OF_TEACHERS, Inputs, RunDirectory, digest, file_identity

if TYPE_CHECKING:
    from kdcache.cache.reader import Cache
    from kdcache.recipe import StudentSection


@dataclass(frozen=True)
class TeacherFacts:
    """Size and speed of a teacher; None where neither the cache nor files at hand say it.

    ``measured_on``: device, precision and backend of the dump, which measured the speed.
    """

    parameters: int | None = None
    latency_ms: float | None = None
    texts_per_second: float | None = None
    measured_on: str | None = None


def teachers_beside(cache: Cache | None, run_root: Path) -> Path | None:
    """The directory of co-finetuned teachers: that of the run, or the one beside the cache; None without either.

    A student of a sweep may have another cache than the sweep: then the one beside it, or that of the run if its
    teachers are the cache's.
    """
    from kdcache.teachers.bundle import is_bundle

    run = RunDirectory(run_root)
    own = [one for one in dict.fromkeys((run.teachers, run.whole.teachers)) if is_bundle(one)]
    if cache is None:
        return next(iter(own), None)
    place = teachers_beside_cache(cache.path)
    beside = [] if place is None else [place]
    if run.whole.root == run.root or cache.path.resolve() == run.whole.cache.resolve():
        return next(iter((*own, *beside)), None)
    return next(iter((*beside, *(one for one in own if not _differing(one, cache)))), None)


def teachers_beside_cache(cache: Path) -> Path | None:
    """The directory of co-finetuned teachers beside the directory of a cache; None if there is none."""
    from kdcache.teachers.bundle import is_bundle

    place = cache.parent / "teachers"
    return place if is_bundle(place) else None


def taken_over(student: StudentSection, directory: Path | None) -> Inputs:
    """What the student takes over from the co-finetuned teachers of ``directory``: ``teachers/NAME`` -> sha256.

    These are the teacher of ``init_from = "teacher:NAME"``, by its fingerprints, and the shared head with ``head =
    "shared"``. teachers.json as a whole does not count, since a teacher that is added changes it. Empty for other
    students, and where no directory is known. Raises DamageError for an unreadable teachers.json.
    """
    from kdcache.students.build import TEACHER_PREFIX
    from kdcache.teachers.bundle import HEAD_FILE, read_bundle

    origin, shared = student.init_from or "", student.head == "shared"
    if directory is None or not (shared or origin.startswith(TEACHER_PREFIX)):
        return {}
    bundle, found = read_bundle(directory), {}
    teacher = bundle.teachers.get(origin.removeprefix(TEACHER_PREFIX)) if origin.startswith(TEACHER_PREFIX) else None
    if teacher is not None:
        found[origin.removeprefix(TEACHER_PREFIX)] = asdict(teacher.fingerprints)
    if shared:
        settings = {"pooling": str(bundle.pooling), "dropout": str(bundle.dropout)}
        found[HEAD_FILE] = {"tensors": file_identity(directory / HEAD_FILE), **settings}
    return {f"{OF_TEACHERS}{name}": f"sha256:{digest(parts)}" for name, parts in found.items()}


def teacher_facts(
    directory: Path | None, cache: Cache | None, names: Sequence[str], trusted: Collection[str] = ()
) -> dict[str, TeacherFacts]:
    """Size and speed of the teachers ``names``, from the cache. Files in ``directory`` must be those of its teachers.

    A process reads the files of a teacher once, as long as they stay as they are. ``trusted`` teachers may run their
    own Python code. Raises MismatchError where a directory holds another teacher: the cache would then hold targets
    that these teachers do not give.
    """
    if cache is None:
        return {}
    counts = {} if directory is None else _counted(directory, cache, names, trusted)
    records = cache.manifest.provenance.get("teachers")
    facts = {}
    for name in names:
        record = records.get(name) if isinstance(records, Mapping) else None
        facts[name] = _recorded(cache, name, record if isinstance(record, Mapping) else {}, counts.get(name))
    return facts


def _recorded(cache: Cache, name: str, record: Mapping[str, Any], parameters: int | None) -> TeacherFacts:
    stored = _positive(record.get("parameters"))
    parameters = parameters or (None if stored is None else int(stored))
    latency, rate = _positive(record.get("latency_ms")), _positive(record.get("forward_texts_per_second"))
    if latency is None or rate is None:  # a cache of 0.1.0
        return TeacherFacts(parameters)
    spec = cache.teachers[name]
    return TeacherFacts(parameters, latency, rate, f"{record.get('device')}, {spec.precision}, {spec.backend}")


def _positive(value: Any) -> float | None:
    """A positive number of a manifest, which may come from somebody else."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) and number > 0 else None


def _counted(directory: Path, cache: Cache, names: Sequence[str], trusted: Collection[str]) -> dict[str, int]:
    """Parameters of the teachers whose files are in ``directory``, compared with the cache's."""
    from kdcache.teachers.bundle import read_bundle

    known, changed, counts = read_bundle(directory).teachers, _differing(directory, cache), {}
    for name in [name for name in names if name in known]:
        if name in changed:
            raise MismatchError(
                f"teacher '{name}' in '{directory}' is not the one of cache '{cache.path}'; they differ in "
                f"{changed[name]}",
                "Dump again with kdcache dump-teachers, or move those teachers away from beside the cache.",
            )
        counts[name] = _checked(_Files(directory, name, name in trusted, _stamp(directory, name)))
    return counts


def _differing(directory: Path, cache: Cache) -> dict[str, str]:
    """Names of teachers in ``directory`` that are others than the cache's, with what is different."""
    from kdcache.teachers.bundle import read_bundle

    known = read_bundle(directory).teachers
    changed = {
        name: differing(spec.fingerprints, known[name].fingerprints)
        for name, spec in cache.teachers.items()
        if name in known
    }
    return {name: what for name, what in changed.items() if what}


@dataclass(frozen=True)
class _Files:
    """A teacher on disk; ``stamp``: names, sizes and times of its files."""

    directory: Path
    name: str
    trusted: bool
    stamp: tuple[tuple[str, int, int], ...]


@functools.lru_cache(maxsize=64)
def _checked(files: _Files) -> int:
    """The parameters of a teacher whose files are those of teachers.json."""
    from kdcache.teachers.bundle import check_files, read_bundle

    return check_files(files.directory, files.name, read_bundle(files.directory), trust_remote_code=files.trusted)


def _stamp(directory: Path, name: str) -> tuple[tuple[str, int, int], ...]:
    files = [*directory.iterdir(), *(directory / name).rglob("*")]
    found = ((str(file.relative_to(directory)), file.stat()) for file in sorted(files) if file.is_file())
    return tuple((path, stat.st_size, stat.st_mtime_ns) for path, stat in found)
