"""The paths of files in a cache. They follow from names and numbers, so a forged manifest cannot name other paths.

The list of files in a manifest must be exactly what these functions derive from the rest of it.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from kdcache.cache.arrays import shard_name
from kdcache.codecs.registry import format_of

if TYPE_CHECKING:
    from kdcache.codecs.base import LayerSpec

MANIFEST = "manifest.json"
CARD = "README.md"
STATE = ".dump"  # state of a dump in progress: lock, records

PART_NAME = re.compile(r"part-[0-9]{5}")
TEACHER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
SPLIT_NAME = re.compile(r"[a-z][a-z0-9_-]{0,31}")


def part_name(index: int) -> str:
    """``part-00000`` and so on."""
    return f"part-{index:05d}"


def part_number(name: str) -> int | None:
    """The inverse of ``part_name``; None for another name."""
    return int(name[5:]) if PART_NAME.fullmatch(name) else None


def layer_name(layer: int) -> str:
    """``layer-04`` and so on."""
    return f"layer-{layer:02d}"


def ids_file(part: str) -> str:
    """The text ids of a part; all files of the part have this order."""
    return f"texts/{part}.arrow"


def text_file(part: str) -> str:
    """The text columns of a part."""
    return f"text/{part}.arrow"


def examples_file(split: str, sha256: str) -> str:
    """The examples of a split.

    Content-addressed: a replaced split is another file, and readers of the old one keep theirs.
    """
    return f"data/{split}-{sha256[:16]}.arrow"


def outputs_file(teacher: str, part: str) -> str:
    """Logits and pooled vectors."""
    return f"teachers/{teacher}/outputs/{part}.arrow"


def tokens_file(teacher: str, part: str) -> str:
    """Spans, segments and roles."""
    return f"teachers/{teacher}/tokens/{part}.arrow"


def basis_file(teacher: str, layer: int) -> str:
    """Projection and variances of a layer.

    One file per layer, so that a layer can come later and files stay immutable.
    """
    return f"teachers/{teacher}/basis/{layer_name(layer)}.safetensors"


def tokenizer_file(teacher: str) -> str:
    """The teacher's tokenizer.json."""
    return f"teachers/{teacher}/tokenizer/tokenizer.json"


def group_directory(teacher: str, part: str) -> str:
    """The zarr group of a part."""
    return f"teachers/{teacher}/hidden/{part}.zarr"


def group_file(teacher: str, part: str) -> str:
    """Metadata of the zarr group of a part."""
    return f"{group_directory(teacher, part)}/zarr.json"


def array_shapes(layer: int, spec: LayerSpec, rows: int) -> dict[str, tuple[tuple[int, ...], str]]:
    """The arrays of a layer with so many rows (tokens, or texts): name inside the group -> shape and dtype."""
    arrays = format_of(spec).arrays(spec, rows)
    return {layer_name(layer) + suffix: (shape, dtype) for suffix, shape, dtype in arrays}


def array_files(teacher: str, part: str, name: str, shape: tuple[int, ...]) -> tuple[str, str | None]:
    """Metadata and shard of one array; None for the shard if the array has no rows."""
    directory = f"{group_directory(teacher, part)}/{name}"
    return f"{directory}/zarr.json", f"{directory}/{shard_name(len(shape))}" if shape[0] else None


def layer_files(teacher: str, part: str, layer: int, spec: LayerSpec, rows: int) -> list[str]:
    """All files of one layer of one part, without the group's metadata."""
    files: list[str] = []
    for name, (shape, _) in array_shapes(layer, spec, rows).items():
        metadata, shard = array_files(teacher, part, name, shape)
        files += [metadata, *([shard] if shard else [])]
    return files
