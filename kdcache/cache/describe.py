"""What ``cache info`` says: a cache in numbers, from its manifest alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kdcache.cache import layout
from kdcache.cache.schema import teacher_document

if TYPE_CHECKING:
    from kdcache.cache.reader import Cache


def describe(cache: Cache) -> dict[str, Any]:
    """JSON-able: counts, tokens, bytes per teacher and layer, label names, identity, provenance. No data file is read."""
    contents = cache.manifest.contents
    texts = {scope: sum(part.texts for part in cache.parts if part.scope == scope) for scope in ("full", "logits")}
    return {
        "path": str(cache.path),
        "identity": cache.identity,
        "text_columns": list(cache.task.text_columns),
        "label_names": list(cache.task.label_names),
        "texts": sum(texts.values()),
        "texts_full": texts["full"],
        "texts_logits_only": texts["logits"],
        "text_stored": cache.has_text,
        "parts": len(cache.parts),
        "part_size": cache.settings.part_size,
        "seed": cache.settings.seed,
        "examples": {name: split.examples for name, split in contents.splits.items()},
        "bytes": sum(digest.size for digest in contents.files.values()),
        "teachers": {name: _teacher(cache, name) for name in cache.teachers},
        "provenance": cache.manifest.provenance,
    }


def _teacher(cache: Cache, name: str) -> dict[str, Any]:
    spec, files = cache.teachers[name], cache.manifest.contents.files
    home = f"{layout.teacher_directory(name)}/"
    counts = cache.manifest.contents.tokens.get(name, {})
    sizes = {path: digest.size for path, digest in files.items() if path.startswith(home)}
    document = teacher_document(spec)
    for layer, one in spec.layers.items():
        paths = {path for part, tokens in counts.items() for path in layout.layer_files(name, part, layer, one, tokens)}
        document["layers"][str(layer)]["bytes"] = sum(sizes[path] for path in paths) + sizes[layout.basis_file(name, layer)]
    return {
        **document,
        "pooled": spec.pooled,
        "tokens": sum(counts.values()),
        "bytes": sum(sizes.values()),
        "bytes_outputs": sum(sizes[layout.outputs_file(name, part.name)] for part in cache.parts),
        "bytes_tokens": sum(sizes[layout.tokens_file(name, part)] for part in counts),
    }
