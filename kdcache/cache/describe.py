"""What ``cache info`` says: a cache in numbers, from its manifest alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kdcache.cache import layout
from kdcache.cache.schema import teacher_document
from kdcache.codecs.base import LayerSpec
from kdcache.codecs.registry import format_of

if TYPE_CHECKING:
    from kdcache.cache.contents import Contents
    from kdcache.cache.manifest import Manifest
    from kdcache.cache.reader import Cache


def describe(cache: Cache) -> dict[str, Any]:
    """``describe_manifest``, and where the cache lies and what of it is there. No data file is read."""
    facts = {"path": str(cache.path), **describe_manifest(cache.manifest)}
    for name, one in facts["teachers"].items():
        one["here"] = _here(cache, layout.tokenizer_file(name))
        for layer, stored in one["layers"].items():
            stored["here"] = _here(cache, layout.basis_file(name, int(layer)))
    return {**facts, "selection": _selection(cache)}


def describe_manifest(manifest: Manifest) -> dict[str, Any]:
    """JSON-able: counts, tokens, bytes per teacher and layer, label names, identity, provenance.

    Of a layer, ``row_bytes`` is what one row (a token, or a text) takes, ``bytes`` the size of all of its files.
    """
    contents = manifest.contents
    texts = {scope: sum(part.texts for part in contents.parts if part.scope == scope) for scope in ("full", "logits")}
    return {
        "identity": manifest.identity,
        "text_columns": list(contents.task.text_columns),
        "label_names": list(contents.task.label_names),
        "texts": sum(texts.values()),
        "texts_full": texts["full"],
        "texts_logits_only": texts["logits"],
        "text_stored": contents.has_text,
        "parts": len(contents.parts),
        "part_size": contents.settings.part_size,
        "seed": contents.settings.seed,
        "examples": {name: split.examples for name, split in contents.splits.items()},
        "bytes": sum(digest.size for digest in contents.files.values()),
        "teachers": {name: _teacher(contents, name) for name in contents.teachers},
        "provenance": manifest.provenance,
    }


def stored_as(layer: Mapping[str, Any]) -> str:
    """How a layer of ``describe_manifest`` is stored, in words: ``pca 128 int8``, ``trellis, 96 bytes per token``."""
    selected = str(layer.get("tokens", ""))
    spec = LayerSpec(layer["projection"], layer["dim"], layer["dtype"])
    storage = format_of(spec)
    stored = storage.label(spec)
    if storage.by_bytes:
        stored = f"{storage.title}, {layer['row_bytes']} bytes per {'text' if selected else 'token'}"
    return stored + {"first": ", first token", "pooled": ", mean of tokens"}.get(selected, "")


def _selection(cache: Cache) -> dict[str, Any] | None:
    """What of the cache is here, where that is not all; ``bytes_absent`` are selected and still to be fetched."""
    if cache.local is None:
        return None
    local, files = cache.local, cache.manifest.contents.files
    selected = local.selection.covers(cache.manifest.contents)
    absent = set() if local.complete else {path for path in selected if not cache.is_here(path)}
    teachers = local.selection.teachers
    return {
        "teachers": list(cache.teachers) if teachers is None else list(teachers),
        "text": local.selection.text,
        "complete": not absent,
        "origin": local.origin,
        "bytes_here": sum(files[path].size for path in selected - absent),
        "bytes_absent": sum(files[path].size for path in absent),
        "bytes_not_selected": sum(digest.size for path, digest in files.items() if path not in selected),
    }


def _here(cache: Cache, path: str) -> bool:
    return cache.local is None or cache.local.selection.takes(path)


def _teacher(contents: Contents, name: str) -> dict[str, Any]:
    spec = contents.teachers[name]
    home = f"{layout.teacher_directory(name)}/"
    counts = contents.tokens.get(name, {})
    sizes = {path: digest.size for path, digest in contents.files.items() if path.startswith(home)}
    document = teacher_document(spec)
    full = [part for part in contents.parts if part.scope == "full"]
    for layer, one in spec.layers.items():
        rows = {part.name: contents.rows(name, part, one) or 0 for part in full}
        paths = {path for part, count in rows.items() for path in layout.layer_files(name, part, layer, one, count)}
        total = sum(sizes[path] for path in paths) + sizes[layout.basis_file(name, layer)]
        document["layers"][str(layer)] |= {"row_bytes": format_of(one).row_bytes(one), "bytes": total}
    return {
        **document,
        "pooled": spec.pooled,
        "tokens": sum(counts.values()),
        "bytes": sum(sizes.values()),
        "bytes_outputs": sum(sizes[layout.outputs_file(name, part.name)] for part in contents.parts),
        "bytes_tokens": sum(sizes[layout.tokens_file(name, part)] for part in counts),
    }
