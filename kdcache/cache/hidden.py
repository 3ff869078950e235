"""Encodes and decodes the hidden states of a part: a zarr array per layer, and one more for scales if there are any."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from kdcache.cache import layout
from kdcache.cache.arrays import ArrayDamageError, array_metadata, decode_shard, encode_shard, group_metadata
from kdcache.cache.digests import enough_memory
from kdcache.cache.tokens import not_finite
from kdcache.codecs.base import HiddenBlock
from kdcache.codecs.registry import format_of

if TYPE_CHECKING:
    from kdcache.cache.digests import CheckedFiles
    from kdcache.cache.spec import TeacherSpec
    from kdcache.codecs.base import LayerSpec
    from kdcache.files import Buffer


def check_hidden(
    block: HiddenBlock, layer: int, spec: TeacherSpec, part: str, ids: np.ndarray, offsets: np.ndarray
) -> None:
    """Raises ValueError for a wrong shape or dtype, NonFiniteError (with text id and layer) for NaN or infinity.

    ``offsets`` int64 [n + 1]: text i owns rows ``offsets[i]:offsets[i + 1]`` of the layer.
    """
    layer_spec = spec.layers[layer]
    storage = format_of(layer_spec)
    try:
        storage.check_block(block, layer_spec, int(offsets[-1]))
    except ValueError as error:
        raise ValueError(f"layer {layer} of {part} {error}") from error
    good = storage.finite_rows(block)
    if not good.all():
        token = int((~good).argmax())
        text = int(np.searchsorted(offsets, token, side="right")) - 1
        raise not_finite(f"layer {layer}", spec, part, ids, text)


def encode_layers(
    spec: TeacherSpec, part: str, ids: np.ndarray, offsets: np.ndarray | None, blocks: Mapping[int, HiddenBlock]
) -> dict[str, Iterable[Buffer]]:
    """The files of some layers of a part, with the group's metadata. Raises as ``check_hidden``.

    ``offsets`` int64 [n + 1]: of the texts' tokens; None if every layer has one row per text.
    """
    files: dict[str, Iterable[Buffer]] = {layout.group_file(spec.name, part): [group_metadata()]}
    for layer, block in sorted(blocks.items()):
        texts = np.arange(len(ids) + 1)
        check_hidden(
            block, layer, spec, part, ids, texts if spec.layers[layer].per_text or offsets is None else offsets
        )
        arrays = layout.array_shapes(layer, spec.layers[layer], len(block.values))
        for (name, (shape, dtype)), values in zip(arrays.items(), (block.values, block.scales), strict=False):
            metadata, shard = layout.array_files(spec.name, part, name, shape)
            files[metadata] = [array_metadata(shape, dtype)]
            if shard and values is not None:
                files[shard] = encode_shard(values)
    return files


def decode_layer(
    files: CheckedFiles, teacher: str, part: str, layer: int, spec: LayerSpec, rows: int, into: HiddenBlock | None
) -> HiddenBlock:
    """Read one layer of a part with ``rows`` rows, into the arrays of ``into`` where it is given.

    Raises DamageError, which names the file.
    """
    files.read(layout.group_file(teacher, part))
    given = (None, None) if into is None else (into.values, into.scales)
    arrays = []
    for (name, (shape, dtype)), own in zip(layout.array_shapes(layer, spec, rows).items(), given, strict=False):
        metadata, shard = layout.array_files(teacher, part, name, shape)
        files.read(metadata)  # checked: this shape and dtype allow one content only
        arrays.append(_read_array(files, shard, shape, dtype, own))
    return HiddenBlock(arrays[0], arrays[1] if len(arrays) > 1 else None)


def _read_array(
    files: CheckedFiles, shard: str | None, shape: tuple[int, ...], dtype: str, into: np.ndarray | None
) -> np.ndarray:
    if shard is None:
        return np.empty(shape, dtype=dtype) if into is None else into
    try:
        with files.open(shard) as file, enough_memory(files.root / shard, file.left):
            return decode_shard(file, shape, dtype, into)
    except ArrayDamageError as error:
        raise files.damage(shard, error) from error
