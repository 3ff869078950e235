"""How large a file of a cache can be, from the counts in the manifest: a file that claims more is refused before it is read.

Arrow files and bases are read whole, so what a manifest says of their size is what is allocated. A sparse file of a terabyte
costs its author nothing; this is why sizes are compared with what the counts allow. Sizes of arrays are exact, see ``arrays``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from kdcache.cache import layout
from kdcache.codecs.registry import format_of

if TYPE_CHECKING:
    from kdcache.cache.contents import Contents
    from kdcache.cache.spec import TeacherSpec

_FRAME = 1 << 16  # schema, header, padding
_EXAMPLE = 1100  # bytes of a row: id, label, and a group of a thousand characters on average
TOKENIZER = 1 << 28
TEXT = 1 << 31  # of a part


def most_bytes(contents: Contents) -> Iterator[tuple[str, int]]:
    """Each file that is read whole, and the bytes that it has at most."""
    for part in contents.parts:
        yield layout.ids_file(part.name), 16 * part.texts + _FRAME
        if contents.has_text:
            yield layout.text_file(part.name), TEXT
    for split in contents.splits.values():
        yield split.file, _EXAMPLE * split.examples + _FRAME
    for teacher in contents.teachers.values():
        yield from _of_teacher(contents, teacher)


def _of_teacher(contents: Contents, teacher: TeacherSpec) -> Iterator[tuple[str, int]]:
    yield layout.tokenizer_file(teacher.name), TOKENIZER
    row = 4 * (teacher.target.shape[0] + (teacher.pooled or 0))
    for part in contents.parts:
        yield layout.outputs_file(teacher.name, part.name), row * part.texts + _FRAME
    texts = {part.name: part.texts for part in contents.parts}
    for part_name, tokens in contents.tokens.get(teacher.name, {}).items():
        yield layout.tokens_file(teacher.name, part_name), 10 * tokens + 4 * texts.get(part_name, 0) + _FRAME
    for layer, spec in teacher.layers.items():
        values = spec.dim * teacher.width + teacher.width + spec.dim
        yield layout.basis_file(teacher.name, layer), 4 * values + _FRAME + format_of(spec).basis_bytes
