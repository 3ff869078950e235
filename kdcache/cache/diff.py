"""The differences between two caches: texts, splits, labels, teachers, layers, settings, bytes.

Most differences follow from the manifests. Text ids and examples are read only if their files differ. No other file is
read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kdcache.cache import layout
from kdcache.cache.ids import ID_BYTES
from kdcache.cache.selection import component
from kdcache.cache.spec import differing_fields
from kdcache.progress import counted, format_bytes, listed

if TYPE_CHECKING:
    from kdcache.cache.reader import Cache
    from kdcache.cache.spec import TeacherSpec


@dataclass(frozen=True)
class Difference:
    """The differences by topic, as JSON values; equal topics are empty. ``same``: the identities are equal."""

    same: bool
    facts: Mapping[str, Any]

    def lines(self) -> list[str]:
        """Text for the terminal: ``-`` is the first cache, ``+`` the second."""
        lines = [f"{key}: - {_show(old)}  + {_show(new)}" for key, (old, new) in self.facts["settings"].items()]
        texts = self.facts["texts"]
        if texts:
            lines.append(f"texts: - {texts['only_first']:,}  + {texts['only_second']:,}  in both {texts['in_both']:,}")
        if "with_hidden" in texts:
            old, new = texts["with_hidden"]
            lines.append(f"texts with hidden states: - {old:,}  + {new:,}")
        for split, counts in self.facts["splits"].items():
            rows = ", ".join(text.format(counts[key]) for key, text in _ROWS.items() if counts[key])
            lines.append(f"split {split}: {rows or 'the same rows in another order'}")
        for name, teacher in self.facts["teachers"].items():
            lines += [f"teacher {name}: {line}" for line in _teacher_lines(teacher)]
        size = self.facts["bytes"]
        lines.append(
            f"bytes: - {format_bytes(size['first'])}  + {format_bytes(size['second'])}  shared "
            f"{format_bytes(size['shared'])}"
        )
        return lines


_ROWS = {
    "only_first": "- {:,} rows",
    "only_second": "+ {:,} rows",
    "other_label": "{:,} with another label",
    "other_group": "{:,} with another group",
}


def diff(first: Cache, second: Cache) -> Difference:
    """Compare two caches.

    Raises DamageError; MismatchError if text ids or examples have to be read and were not pulled.
    """
    facts = {
        "identity": [first.identity, second.identity],
        "settings": _settings(first, second),
        "texts": _texts(first, second),
        "splits": dict(_splits(first, second)),
        "teachers": dict(_teachers(first, second)),
        "bytes": _bytes(first, second),
    }
    return Difference(first.identity == second.identity, facts)


def _settings(first: Cache, second: Cache) -> dict[str, list[Any]]:
    old, new = (cache.manifest.contents.settings_record() for cache in (first, second))
    return {name: [old[name], new[name]] for name in old if old[name] != new[name]}


def _texts(first: Cache, second: Cache) -> dict[str, Any]:
    files = [
        [cache.manifest.contents.files[layout.ids_file(part.name)] for part in cache.parts] for cache in (first, second)
    ]
    full = [cache.manifest.contents.full_texts for cache in (first, second)]
    with_hidden = {"with_hidden": full} if full[0] != full[1] else {}
    if files[0] == files[1] and not with_hidden:
        return {}
    old, new = _distinct_ids(first), _distinct_ids(second)
    both = len(np.intersect1d(old, new, assume_unique=True))
    return {"only_first": len(old) - both, "only_second": len(new) - both, "in_both": both, **with_hidden}


def _splits(first: Cache, second: Cache) -> Iterator[tuple[str, dict[str, int]]]:
    """Rows are texts with their class and group. They are counted: a text that occurs twice counts twice."""
    for split in dict.fromkeys([*first.splits, *second.splits]):
        files = [
            cache.manifest.contents.splits[split].file if split in cache.splits else None for cache in (first, second)
        ]
        if files[0] == files[1]:
            continue
        rows = [_rows(cache, split) for cache in (first, second)]
        old, new = (Counter(row[0] for row in rows_of) for rows_of in rows)
        only_first = (old - new).total()
        with_label, whole = (_lacking([[row[:kept] for row in rows_of] for rows_of in rows]) for kept in (2, 3))
        yield (
            split,
            {
                "only_first": only_first,
                "only_second": (new - old).total(),
                "other_label": with_label - only_first,
                "other_group": whole - with_label,
            },
        )


def _lacking(rows: Sequence[Sequence[Any]]) -> int:
    """How many of the first rows the second lack."""
    return (Counter(rows[0]) - Counter(rows[1])).total()


def _teachers(first: Cache, second: Cache) -> Iterator[tuple[str, dict[str, Any]]]:
    for name in dict.fromkeys([*first.teachers, *second.teachers]):
        if name not in second.teachers:
            yield name, {"only": "first"}
        elif name not in first.teachers:
            yield name, {"only": "second"}
        else:
            differences = _teacher(first.teachers[name], second.teachers[name]) | _values(first, second, name)
            if differences:
                yield name, differences


def _teacher(old: TeacherSpec, new: TeacherSpec) -> dict[str, Any]:
    layers = {
        str(layer): _fields(old.layers[layer], new.layers[layer])
        for layer in sorted(old.layers.keys() & new.layers.keys())
        if old.layers[layer] != new.layers[layer]
    }
    differences = {
        "settings": _fields(old, new),
        "layers_only_first": sorted(old.layers.keys() - new.layers.keys()),
        "layers_only_second": sorted(new.layers.keys() - old.layers.keys()),
        "layers": layers,
    }
    return {topic: values for topic, values in differences.items() if values}


def _values(first: Cache, second: Cache, name: str) -> dict[str, Any]:
    """The number of files of a teacher that both caches have, with other bytes."""
    files = [cache.manifest.contents.files for cache in (first, second)]
    differing = [
        path
        for path, digest in files[0].items()
        if component(path).teacher == name and files[1].get(path, digest) != digest
    ]
    return {"other_values_in": len(differing)} if differing else {}


def _fields(old: Any, new: Any) -> dict[str, list[Any]]:
    differing = differing_fields(old, new, "fingerprint of {}")
    return {name: [_plain(before), _plain(now)] for name, before, now in differing}


def _bytes(first: Cache, second: Cache) -> dict[str, int]:
    sizes = [
        {digest.sha256: digest.size for digest in cache.manifest.contents.files.values()} for cache in (first, second)
    ]
    shared = sum(size for sha, size in sizes[0].items() if sha in sizes[1])
    return {"first": sum(sizes[0].values()), "second": sum(sizes[1].values()), "shared": shared}


def _rows(cache: Cache, split: str) -> list[tuple[bytes, str | None, str]]:
    """Text id, class (None without a label) and group (empty without groups) of each row."""
    if split not in cache.splits:
        return []
    table, names = cache.examples(split), cache.task.label_names
    ids = (row.tobytes() for row in table.text_ids)
    classes = (None if label < 0 else names[label] for label in table.labels.tolist())
    groups = table.groups or [""] * len(table.labels)
    return list(zip(ids, classes, groups, strict=True))


def _distinct_ids(cache: Cache) -> np.ndarray:
    ids = np.concatenate([np.zeros((0, ID_BYTES), np.uint8), *(cache.text_ids(part.name) for part in cache.parts)])
    return np.unique(ids.view(f"V{ID_BYTES}").reshape(-1))


def _plain(value: Any) -> Any:
    return value if isinstance(value, int | str) or value is None else str(value)


def _teacher_lines(differences: Mapping[str, Any]) -> Iterator[str]:
    if "only" in differences:
        yield "- only in the first" if differences["only"] == "first" else "+ only in the second"
    yield from (f"{key}: - {_show(old)}  + {_show(new)}" for key, (old, new) in differences.get("settings", {}).items())
    for sign, key in (("-", "layers_only_first"), ("+", "layers_only_second")):
        if key in differences:
            yield f"layers: {sign} {', '.join(str(layer) for layer in differences[key])}"
    for layer, pairs in differences.get("layers", {}).items():
        yield from (f"layer {layer}: {key}: - {_show(old)}  + {_show(new)}" for key, (old, new) in pairs.items())
    if "other_values_in" in differences:
        yield f"{counted(differences['other_values_in'], 'file')} with other values under the same name"


def _show(value: Any) -> str:
    return listed(value) if isinstance(value, list) else str(value)
