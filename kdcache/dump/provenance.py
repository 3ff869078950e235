"""How a cache came about: what the manifest says outside the identity, as strings and integers.

A teacher that did not run this time keeps the record of the run that made it, so that extending a cache loses nothing.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdcache import __version__
from kdcache.cache.layout import MANIFEST
from kdcache.cache.manifest import read_manifest
from kdcache.errors import KdcacheError

if TYPE_CHECKING:
    from kdcache.dump.run import TeacherRun
    from kdcache.recipe import Recipe
    from kdcache.teachers.bundle import Bundle, TeacherRecord

_PACKAGES = ("torch", "transformers", "tokenizers", "zarr", "pyarrow", "numpy", "safetensors")


def dump_provenance(
    recipe: Recipe, bundle: Bundle, runs: Sequence[TeacherRun], given: Mapping[str, Any], earlier: Mapping[str, Any]
) -> dict[str, Any]:
    """``given`` (of the caller: the command, the system) with recipe, versions, time, and a record per teacher."""
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    teachers = dict(earlier.get("teachers", {}))
    for section in recipe.teachers:
        known = teachers.get(section.name, {})
        teachers[section.name] = {**known, **_origin(bundle.teachers[section.name])}
    for run in runs:
        teachers[run.teacher] |= {
            "dumped": now,
            "texts_run": run.texts,
            "seconds": f"{run.seconds:.1f}",
            "texts_per_second": f"{run.texts / run.seconds:.1f}" if run.seconds else "",
            **run.record,
        }
    return {
        **given,
        "versions": {**_versions(), **given.get("versions", {})},
        "published": now,
        "recipe": recipe.name,
        "licence": recipe.licence,
        "data_licence": recipe.data.licence,
        "mean_scores": _strings(bundle.mean_scores),
        "teachers": teachers,
    }


def earlier_provenance(cache_dir: Path) -> dict[str, Any]:
    """The provenance of the cache as it was published before; empty where it was not, or is not readable."""
    if not (cache_dir / MANIFEST).is_file():
        return {}
    try:
        return read_manifest(cache_dir).provenance
    except KdcacheError:
        return {}


def _origin(record: TeacherRecord) -> dict[str, Any]:
    return {
        "source": record.source,
        "revision": record.revision or "",
        "licence": record.licence,
        "scores": _strings(record.scores),
    }


def _strings(scores: Mapping[str, float]) -> dict[str, str]:
    return {name: f"{value:.6g}" for name, value in scores.items()}


def _versions() -> dict[str, str]:
    found = {"kdcache": __version__}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
