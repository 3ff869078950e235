"""The teachers whose files are beside the cache or the run: checked against the cache, counted and timed.

A student can be distilled without them. Where they are there, they must be the ones that the cache was dumped from.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kdcache.cache.spec import differing
from kdcache.errors import MismatchError
from kdcache.runs import RunDirectory
from kdcache.students.speed import Speed, measure_speed

if TYPE_CHECKING:
    from kdcache.cache.reader import Cache
    from kdcache.cache.spec import Fingerprints


@dataclass(frozen=True)
class TeacherFacts:
    """Size and speed of a teacher."""

    parameters: int
    speed: Speed


def teachers_beside(cache: Path | None, run_root: Path) -> Path | None:
    """The directory of co-finetuned teachers: that of the run, or the one beside the cache; None without either."""
    from kdcache.teachers.bundle import is_bundle

    own = dict.fromkeys((RunDirectory(run_root).teachers, RunDirectory(run_root).whole.teachers))
    candidates = [*own, *([cache.parent / "teachers"] if cache is not None else [])]
    return next((directory for directory in candidates if is_bundle(directory)), None)


def check_teachers(
    directory: Path | None,
    cache: Cache | None,
    names: Sequence[str],
    texts: Sequence[tuple[str, ...]],
    trusted: Collection[str] = (),
) -> dict[str, TeacherFacts]:
    """Compare the teachers in ``directory`` with those of the cache and measure them, one in memory at a time.

    A process does this once per teacher, as long as its files stay as they are.

    ``texts`` are what speed is measured on; ``trusted`` teachers may run their own Python code. Raises MismatchError
    where one is another teacher: the cache would then hold targets that these teachers do not give.
    """
    from kdcache.teachers.bundle import teacher_names

    if directory is None or cache is None or not names:
        return {}
    known, facts = teacher_names(directory), {}
    for name in [name for name in names if name in known]:
        files = _Files(directory, name, name in trusted, _stamp(directory, name))
        fingerprints, facts[name] = _loaded(files, tuple(texts))
        changed = differing(cache.teachers[name].fingerprints, fingerprints)
        if changed:
            raise MismatchError(
                f"teacher '{name}' in '{directory}' is not the one of cache '{cache.path}'; they differ in {changed}",
                "Dump again with kdcache dump-teachers, or move those teachers away from beside the cache.",
            )
    return facts


@dataclass(frozen=True)
class _Files:
    """A teacher on disk; ``stamp``: names, sizes and times of its files."""

    directory: Path
    name: str
    trusted: bool
    stamp: tuple[tuple[str, int, int], ...]


@functools.lru_cache(maxsize=64)
def _loaded(files: _Files, texts: tuple[tuple[str, ...], ...]) -> tuple[Fingerprints, TeacherFacts]:
    """Fingerprints and facts of a teacher. A process that trains many students loads it once."""
    from kdcache.teachers.bundle import load_teacher

    teacher = load_teacher(files.directory, files.name, trust_remote_code=files.trusted)
    parameters = sum(parameter.numel() for parameter in teacher.model.parameters())
    speed = measure_speed(teacher.model, teacher.tokenizer, teacher.max_length, texts)
    return teacher.fingerprints, TeacherFacts(parameters, speed)


def _stamp(directory: Path, name: str) -> tuple[tuple[str, int, int], ...]:
    files = [*directory.iterdir(), *(directory / name).rglob("*")]
    found = ((str(file.relative_to(directory)), file.stat()) for file in sorted(files) if file.is_file())
    return tuple((path, stat.st_size, stat.st_mtime_ns) for path, stat in found)
