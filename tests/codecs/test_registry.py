"""Formats by name: found, refused, and without torch until a device is used."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kdcache.cache.canonical import digest_of, readable_json
from kdcache.cache.manifest import read_manifest
from kdcache.cache.reader import open_cache
from kdcache.cache.verify import verify
from kdcache.codecs.base import LayerSpec
from kdcache.codecs.registry import format_of, storage_formats, stored_name
from kdcache.errors import MismatchError
from kdcache.testing.caches import dump, made_plan


def test_every_format_of_the_first_version_is_there() -> None:
    assert {"float32", "float16", "int8", "coded"} <= storage_formats().keys()
    titles = [one.title for one in storage_formats().values()]
    assert len(set(titles)) == len(titles)
    assert stored_name("trellis") == "coded"


def test_an_unknown_format_is_refused_by_name_and_never_taken_for_another() -> None:
    with pytest.raises(MismatchError, match=r"storage format 'int4' is not known.* it knows: .*int8") as caught:
        format_of(LayerSpec("none", 4, "int4"))
    assert "newer" in caught.value.hint
    with pytest.raises(MismatchError, match="storage format 'int'"):
        stored_name("int")


def test_a_manifest_with_an_unknown_format_asks_for_a_newer_program(tmp_path: Path) -> None:
    """It is signed again: nothing about it is damaged."""
    dump(tmp_path, made_plan())
    path = tmp_path / "manifest.json"
    document: dict[str, Any] = json.loads(path.read_text())
    document["teachers"]["bert"]["layers"]["2"]["dtype"] = "int4"
    document = {key: value for key, value in document.items() if key not in ("identity", "checksum")}
    document["identity"] = digest_of({key: value for key, value in document.items() if key != "provenance"})
    document["checksum"] = digest_of(document)
    path.write_bytes(readable_json(document))
    for read in (read_manifest, open_cache, verify):
        with pytest.raises(MismatchError, match=r"bert.layers.2.dtype: storage format 'int4' is not known") as caught:
            read(tmp_path)
        assert "newer kdcache" in caught.value.hint


def test_formats_are_found_and_blocks_decoded_without_torch() -> None:
    code = """
import sys
import numpy as np
from kdcache.codecs.base import Basis, LayerSpec
from kdcache.codecs.registry import storage_formats
from kdcache.codecs import base, projection, registry
from kdcache.codecs import token_selection as selection
from kdcache.cache import reader, verify, writer
for one in storage_formats().values():
    if not one.by_bytes:
        spec, basis = LayerSpec("none", 3, one.name), Basis(None, None, None, 1.0, 1.0)
        block = one.encode(np.ones((2, 3), np.float32), spec, basis)
        one.check_block(block, spec, 2)
        assert (one.decode(block, basis) == 1).all()
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
