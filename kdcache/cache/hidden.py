"""Hidden states of a part on their way to files: one zarr array per layer, one more for the scales of int8 codes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from kdcache.cache import layout
from kdcache.cache.arrays import ArrayDamageError, array_metadata, decode_shard, encode_shard, group_metadata
from kdcache.cache.blocks import HiddenBlock
from kdcache.cache.checks import check_hidden

if TYPE_CHECKING:
    from kdcache.cache.digests import CheckedFiles
    from kdcache.cache.files import Buffer
    from kdcache.cache.spec import LayerSpec, TeacherSpec


def encode_layers(
    spec: TeacherSpec, part: str, ids: np.ndarray, offsets: np.ndarray, blocks: Mapping[int, HiddenBlock]
) -> dict[str, Iterable[Buffer]]:
    """The files of some layers of a part, the group's metadata among them. Raises as ``check_hidden``."""
    files: dict[str, Iterable[Buffer]] = {layout.group_file(spec.name, part): [group_metadata()]}
    for layer, block in sorted(blocks.items()):
        check_hidden(block, layer, spec.layers[layer], spec, part, ids, offsets)
        arrays = layout.array_shapes(layer, spec.layers[layer], int(offsets[-1]))
        for (name, (shape, dtype)), values in zip(arrays.items(), (block.values, block.scales), strict=False):
            metadata, shard = layout.array_files(spec.name, part, name, shape)
            files[metadata] = [array_metadata(shape, dtype)]
            if shard and values is not None:
                files[shard] = encode_shard(values)
    return files


def decode_layer(files: CheckedFiles, teacher: str, part: str, layer: int, spec: LayerSpec, tokens: int) -> HiddenBlock:
    """Read one layer of a part. Raises DamageError, which names the file."""
    files.read(layout.group_file(teacher, part))
    arrays = []
    for name, (shape, dtype) in layout.array_shapes(layer, spec, tokens).items():
        metadata, shard = layout.array_files(teacher, part, name, shape)
        files.read(metadata)  # its digest is that of the only metadata that this shape and dtype can have
        arrays.append(_read_array(files, shard, shape, dtype))
    return HiddenBlock(arrays[0], arrays[1] if len(arrays) > 1 else None)


def known_files(teacher: TeacherSpec, part: str, tokens: int) -> dict[str, bytes]:
    """Files whose bytes follow from shapes alone: they can be written again without the teacher."""
    if not teacher.layers:
        return {}
    files = {layout.group_file(teacher.name, part): group_metadata()}
    for layer, spec in teacher.layers.items():
        for name, (shape, dtype) in layout.array_shapes(layer, spec, tokens).items():
            files[layout.array_files(teacher.name, part, name, shape)[0]] = array_metadata(shape, dtype)
    return files


def _read_array(files: CheckedFiles, shard: str | None, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    if shard is None:
        return np.empty(shape, dtype=dtype)
    try:
        with files.open(shard) as file:
            return decode_shard(file, shape, dtype)
    except ArrayDamageError as error:
        raise files.damage(shard, error) from error
