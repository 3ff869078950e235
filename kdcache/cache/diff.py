"""What differs between two caches, in the words of their owner: texts, splits, labels, teachers, layers, settings,
bytes.

Most of it is in the manifests. Text ids and examples are read only where their files differ; nothing else is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from kdcache.cache import layout
from kdcache.cache.ids import ID_BYTES
from kdcache.cache.selection import component
from kdcache.cache.spec import Fingerprints
from kdcache.progress import counted, format_bytes, listed

if TYPE_CHECKING:
    from kdcache.cache.reader import Cache
    from kdcache.cache.spec import TeacherSpec


@dataclass(frozen=True)
class Difference:
    """``facts``.

    JSON-able, per topic what differs and nothing else; bytes always. ``same``: the identities are equal.
    """

    same: bool
    facts: Mapping[str, Any]

    def lines(self) -> list[str]:
        """For people: ``-`` is the first cache, ``+`` the second."""
        lines = [f"{key}: - {_show(old)}  + {_show(new)}" for key, (old, new) in self.facts["settings"].items()]
        texts = self.facts["texts"]
        if texts:
            lines.append(f"texts: - {texts['only_first']:,}  + {texts['only_second']:,}  in both {texts['in_both']:,}")
        if "with_hidden" in texts:
            old, new = texts["with_hidden"]
            lines.append(f"texts with hidden states: - {old:,}  + {new:,}")
        for split, counts in self.facts["splits"].items():
            shown = {
                "only_first": "- {:,} rows",
                "only_second": "+ {:,} rows",
                "other_label": "{:,} with another label",
            }
            told = ", ".join(text.format(counts[key]) for key, text in shown.items() if counts[key])
            lines.append(f"split {split}: {told or 'the same rows in another order'}")
        for name, found in self.facts["teachers"].items():
            lines += [f"teacher {name}: {line}" for line in _teacher_lines(found)]
        size = self.facts["bytes"]
        lines.append(
            f"bytes: - {format_bytes(size['first'])}  + {format_bytes(size['second'])}  shared "
            f"{format_bytes(size['shared'])}"
        )
        return lines


def diff(first: Cache, second: Cache) -> Difference:
    """Compare two caches.

    Raises DamageError, and MismatchError where text ids or examples have to be read and are not here.
    """
    facts = {
        "identity": [first.identity, second.identity],
        "settings": dict(_settings(first, second)),
        "texts": _texts(first, second),
        "splits": dict(_splits(first, second)),
        "teachers": dict(_teachers(first, second)),
        "bytes": _bytes(first, second),
    }
    return Difference(first.identity == second.identity, facts)


def _settings(first: Cache, second: Cache) -> Iterator[tuple[str, list[Any]]]:
    values = {
        "text_columns": (list(first.task.text_columns), list(second.task.text_columns)),
        "label_names": (list(first.task.label_names), list(second.task.label_names)),
        "seed": (first.settings.seed, second.settings.seed),
        "part_size": (first.settings.part_size, second.settings.part_size),
        "text": tuple("stored" if cache.has_text else "absent" for cache in (first, second)),
    }
    yield from ((name, list(pair)) for name, pair in values.items() if pair[0] != pair[1])


def _texts(first: Cache, second: Cache) -> dict[str, Any]:
    files = [
        [cache.manifest.contents.files[layout.ids_file(part.name)] for part in cache.parts] for cache in (first, second)
    ]
    full = [sum(part.texts for part in cache.parts if part.scope == "full") for cache in (first, second)]
    with_hidden = {"with_hidden": full} if full[0] != full[1] else {}
    if files[0] == files[1] and not with_hidden:
        return {}
    ids = [
        _distinct(np.concatenate([_none(), *(cache.text_ids(part.name) for part in cache.parts)]))
        for cache in (first, second)
    ]
    both = len(np.intersect1d(ids[0], ids[1], assume_unique=True))
    return {"only_first": len(ids[0]) - both, "only_second": len(ids[1]) - both, "in_both": both, **with_hidden}


def _splits(first: Cache, second: Cache) -> Iterator[tuple[str, dict[str, int]]]:
    """Rows are compared as texts with their label, and counted: a text that is there twice counts twice."""
    for split in dict.fromkeys([*first.splits, *second.splits]):
        files = [
            cache.manifest.contents.splits[split].file if split in cache.splits else None for cache in (first, second)
        ]
        if files[0] == files[1]:
            continue
        rows = [_rows(cache, split) for cache in (first, second)]
        ids = [_counted(text for text, _ in one) for one in rows]
        with_label = [_counted(one) for one in rows]
        yield (
            split,
            {
                "only_first": _beyond(ids[0], ids[1]),
                "only_second": _beyond(ids[1], ids[0]),
                "other_label": _beyond(with_label[0], with_label[1]) - _beyond(ids[0], ids[1]),
            },
        )


def _teachers(first: Cache, second: Cache) -> Iterator[tuple[str, dict[str, Any]]]:
    for name in dict.fromkeys([*first.teachers, *second.teachers]):
        if name not in second.teachers:
            yield name, {"only": "first"}
        elif name not in first.teachers:
            yield name, {"only": "second"}
        else:
            found = _teacher(first.teachers[name], second.teachers[name]) | _values(first, second, name)
            if found:
                yield name, found


def _teacher(old: TeacherSpec, new: TeacherSpec) -> dict[str, Any]:
    found: dict[str, Any] = {}
    differing = dict(_fields(old, new))
    if differing:
        found["settings"] = differing
    for key, one, other in (("layers_only_first", old, new), ("layers_only_second", new, old)):
        if one.layers.keys() - other.layers.keys():
            found[key] = sorted(one.layers.keys() - other.layers.keys())
    layers = {
        str(layer): {name: list(pair) for name, pair in _fields(old.layers[layer], new.layers[layer])}
        for layer in sorted(old.layers.keys() & new.layers.keys())
        if old.layers[layer] != new.layers[layer]
    }
    return found | ({"layers": layers} if layers else {})


def _values(first: Cache, second: Cache, name: str) -> dict[str, Any]:
    """Files that both have of a teacher and that differ, by what they belong to."""
    files = [cache.manifest.contents.files for cache in (first, second)]
    differing = [
        path
        for path, digest in files[0].items()
        if component(path).teacher == name and files[1].get(path, digest) != digest
    ]
    return {"other_values_in": len(differing)} if differing else {}


def _fields(old: Any, new: Any) -> Iterator[tuple[str, list[Any]]]:
    for one in fields(old):
        before, now = getattr(old, one.name), getattr(new, one.name)
        if isinstance(before, Fingerprints):
            yield from ((f"fingerprint of {name}", [was[:12], is_[:12]]) for name, (was, is_) in _fields(before, now))
        elif before != now and not isinstance(before, Mapping):
            yield one.name, [_plain(before), _plain(now)]


def _bytes(first: Cache, second: Cache) -> dict[str, int]:
    sizes = [
        {digest.sha256: digest.size for digest in cache.manifest.contents.files.values()} for cache in (first, second)
    ]
    shared = sum(size for sha, size in sizes[0].items() if sha in sizes[1])
    return {"first": sum(sizes[0].values()), "second": sum(sizes[1].values()), "shared": shared}


def _rows(cache: Cache, split: str) -> list[tuple[bytes, int]]:
    if split not in cache.splits:
        return []
    table = cache.examples(split)
    return list(zip((row.tobytes() for row in table.text_ids), table.labels.tolist(), strict=True))


def _counted(rows: Any) -> dict[Any, int]:
    counts: dict[Any, int] = {}
    for row in rows:
        counts[row] = counts.get(row, 0) + 1
    return counts


def _beyond(one: Mapping[Any, int], other: Mapping[Any, int]) -> int:
    return sum(max(0, count - other.get(row, 0)) for row, count in one.items())


def _distinct(ids: np.ndarray) -> np.ndarray:
    return np.unique(np.ascontiguousarray(ids).view(f"V{ID_BYTES}").reshape(-1))


def _none() -> np.ndarray:
    return np.zeros((0, ID_BYTES), np.uint8)


def _plain(value: Any) -> Any:
    return value if isinstance(value, int | str) or value is None else str(value)


def _teacher_lines(found: Mapping[str, Any]) -> Iterator[str]:
    if "only" in found:
        yield "- only in the first" if found["only"] == "first" else "+ only in the second"
    yield from (f"{key}: - {_show(old)}  + {_show(new)}" for key, (old, new) in found.get("settings", {}).items())
    for sign, key in (("-", "layers_only_first"), ("+", "layers_only_second")):
        if key in found:
            yield f"layers: {sign} {', '.join(str(layer) for layer in found[key])}"
    for layer, pairs in found.get("layers", {}).items():
        yield from (f"layer {layer}: {key}: - {_show(old)}  + {_show(new)}" for key, (old, new) in pairs.items())
    if "other_values_in" in found:
        yield f"{counted(found['other_values_in'], 'file')} with other values under the same name"


def _show(value: Any) -> str:
    return listed(value) if isinstance(value, list) else str(value)
