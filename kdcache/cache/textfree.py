"""A cache without its texts: for colleagues who may have the targets and not the data, or who have the data already.

The text component is left out and nothing else changes: the remaining files are the same bytes with the same digests, so both
forms share every object of a remote. It is a manifest of its own, with an identity of its own. Whoever distils from it
brings the data; rows meet their targets by text id.
"""

from __future__ import annotations

from dataclasses import replace

from kdcache.cache.layout import text_file
from kdcache.cache.manifest import Manifest, make_manifest


def without_text(manifest: Manifest) -> Manifest:
    """The manifest of the same cache without its texts: what ``dump-teachers --no-text`` would have made. Provenance is kept."""
    contents = manifest.contents
    if not contents.has_text:
        return manifest
    texts = {text_file(part.name) for part in contents.parts}
    files = {path: digest for path, digest in contents.files.items() if path not in texts}
    return make_manifest(replace(contents.copy(), has_text=False, files=files), manifest.provenance)
