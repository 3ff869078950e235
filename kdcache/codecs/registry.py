"""Finds the storage formats: every ``StorageFormat`` that a module of this package defines."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

import kdcache.codecs
from kdcache.codecs.base import StorageFormat
from kdcache.errors import MismatchError

if TYPE_CHECKING:
    from kdcache.codecs.base import LayerSpec


@functools.cache
def storage_formats() -> Mapping[str, StorageFormat]:
    """All formats by name in manifests."""
    formats: dict[str, StorageFormat] = {}
    for module in pkgutil.iter_modules(kdcache.codecs.__path__, "kdcache.codecs."):
        if module.name != __name__:
            for value in vars(importlib.import_module(module.name)).values():
                if isinstance(value, StorageFormat):
                    formats[value.name] = value
    return MappingProxyType(formats)


def storage_format(name: str) -> StorageFormat:
    """The format with that name in manifests. Raises MismatchError, which lists the known ones."""
    try:
        return storage_formats()[name]
    except KeyError:
        known = ", ".join(storage_formats())
        raise MismatchError(
            f"storage format '{name}' is not known to this kdcache; it knows: {known}",
            "A newer version may know it: pip install -U kdcache",
        ) from None


def format_of(spec: LayerSpec) -> StorageFormat:
    """The format of a layer."""
    return storage_format(spec.dtype)


def stored_name(spelling: str) -> str:
    """The name in manifests of a format that a recipe names by name or title. Raises as ``storage_format``."""
    titles = {known.title: name for name, known in storage_formats().items()}
    return storage_format(titles.get(spelling, spelling)).name
