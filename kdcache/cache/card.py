"""The README.md of a cache: its contents and how to use it.

It is generated from the manifest, so a pulled or extended cache has one too, and it is not part of the identity. Names
and licences that people wrote are escaped: they cannot break out of their table cell.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kdcache.cache import layout
from kdcache.cache.schema import teacher_document
from kdcache.cache.selection import component
from kdcache.cache.spec import IMPORTED
from kdcache.codecs.base import LayerSpec
from kdcache.codecs.registry import format_of

if TYPE_CHECKING:
    from kdcache.cache.contents import Contents
    from kdcache.cache.manifest import Manifest
    from kdcache.cache.reader import Cache


_UNKNOWN = "not stated"
_CELL = 200  # characters of a text that somebody wrote, at most


def cache_card(manifest: Manifest, *, name: str = "") -> str:
    """Markdown. ``name``: the name of the cache on the remote that it came from."""
    facts = describe_manifest(manifest)
    provenance = facts["provenance"]
    teachers = facts["teachers"]
    count = f"{len(teachers)} fine-tuned teacher{'' if len(teachers) == 1 else 's'}"
    title = _text(provenance, "recipe") or name or "Teachers"
    return f"""\
# {title}: a cache of teacher targets

The outputs of {count} for {facts["texts"]:,} texts: raw logits, and hidden states of some layers, \
for the distillation of small students with kdcache. {facts["bytes"] / 1e6:,.1f} MB.

{_facts(facts, provenance)}

| split | examples |
|---|---|
{_rows((split, f"{examples:,}") for split, examples in facts["examples"].items())}

| teacher | from | head | max. tokens | layers stored | size | validation |
|---|---|---|---|---|---|---|
{_rows(_teacher(name, teacher, subtable(provenance, "teachers", name)) for name, teacher in teachers.items())}
{_mean(provenance)}{_folds(facts)}
## What is stored

{_stored(facts)}

## Use

{_use(name)}

`manifest.json` lists every file with its sha256. The files open without kdcache too: \
`hidden/` with zarr, `.arrow` with pyarrow.

## Licences

{_licences(facts, provenance)}
"""


def _facts(facts: Mapping[str, Any], provenance: Mapping[str, Any]) -> str:
    made = ", ".join(part for part in (_text(provenance, "published"), _version(provenance)) if part)
    lines = [
        ("text columns", _codes(facts["text_columns"])),
        ("labels", _codes(facts["label_names"])),
        ("texts", f"{facts['texts_full']:,} with hidden states, {facts['texts_logits_only']:,} with logits alone"),
        ("data fingerprint", _text(provenance, "text_ids") or "not recorded"),
        ("identity", facts["identity"]),
        ("made", made or _UNKNOWN),
    ]
    return "| | |\n|---|---|\n" + _rows(lines)


def _teacher(name: str, facts: Mapping[str, Any], record: Mapping[str, Any]) -> tuple[str, ...]:
    imported = facts["backend"] == IMPORTED
    head, length = ("imported", "–") if imported else (facts["head"], str(facts["max_length"]))
    return (
        name, _text(record, "source") or _UNKNOWN, head, length, _layers(facts["layers"]),
        f"{facts['bytes'] / 1e6:,.1f} MB", _scores(record, "scores") or "–",
    )  # fmt: skip


def _mean(provenance: Mapping[str, Any]) -> str:
    scores = _scores(provenance, "mean_scores")
    return f"\nMean of the co-finetuned teachers' probabilities on validation: {scores}.\n" if scores else ""


def _folds(facts: Mapping[str, Any]) -> str:
    return "".join(f"\n{line}\n" for line in folds_lines(facts))


def folds_lines(facts: Mapping[str, Any]) -> list[str]:
    """A line of ``describe_manifest`` for each teacher whose train texts have out-of-fold logits."""
    lines = []
    for name, teacher in facts["teachers"].items():
        if "folds" in teacher:
            scores = subtable(facts["provenance"], "teachers", name, "train_rows")
            unseen, seen = (_scores(scores, kind) for kind in ("out_of_fold", "in_fold"))
            known = f" On labelled train rows: {unseen}; the teacher itself, trained on them: {seen}." if unseen else ""
            lines.append(
                f"{name}: the logits of {teacher['folds']['texts']:,} train texts come from "
                f"{len(teacher['folds']['weights'])} bundles that did not see them.{known}"
            )
    return lines


def _scores(record: Mapping[str, Any], key: str) -> str:
    return ", ".join(f"{_plain(name)} {_number(value)}" for name, value in subtable(record, key).items())


def _layers(layers: Mapping[str, Mapping[str, Any]]) -> str:
    if not layers:
        return "none: logits only"
    numbers: dict[str, list[str]] = {}  # of the layers, by storage format
    for number, layer in layers.items():
        numbers.setdefault(stored_as(layer), []).append(number)
    return "; ".join(f"{' '.join(of_format)} ({storage})" for storage, of_format in numbers.items())


def _stored(facts: Mapping[str, Any]) -> str:
    teachers = facts["teachers"].values()
    hidden = sum(layer["bytes"] for teacher in teachers for layer in teacher["layers"].values())
    pooled = " and pooled vectors" if any(teacher["pooled"] for teacher in teachers) else ""
    texts = "yes, in `text/`" if facts["text_stored"] else "no; give the data, its rows are found by their text"
    total = {key: sum(teacher[key] for teacher in teachers) for key in ("bytes_outputs", "bytes_tokens", "tokens")}
    lines = [
        f"- logits{pooled}, float32: {total['bytes_outputs'] / 1e6:,.1f} MB",
        f"- hidden states of {total['tokens']:,} tokens: {hidden / 1e6:,.1f} MB",
        f"- token spans for alignment: {total['bytes_tokens'] / 1e6:,.1f} MB",
        f"- the texts themselves: {texts}",
    ]
    return "\n".join(lines)


def _use(name: str) -> str:
    if not name:
        return "    kdcache cache verify PATH\n    kdcache distill RECIPE --cache PATH"
    return (
        f"    kdcache distill RECIPE --cache {name}        # fetches what the recipe needs\n"
        f"    kdcache cache pull {name} --to DIR           # all of it\n"
        f"    kdcache cache pull {name} --no-hidden --no-text --to DIR"
    )


def _licences(facts: Mapping[str, Any], provenance: Mapping[str, Any]) -> str:
    lines = [
        f"- this cache: {_text(provenance, 'licence') or _UNKNOWN}",
        f"- data: {_text(provenance, 'data_licence') or _UNKNOWN}",
        *(
            f"- teacher {name}: {_text(subtable(provenance, 'teachers', name), 'licence') or _UNKNOWN}"
            for name in facts["teachers"]
        ),
    ]
    if facts["text_stored"]:
        lines += ["", "The texts of the data set are in `text/`: share the cache only where their licence allows it."]
    return "\n".join(lines)


def _version(provenance: Mapping[str, Any]) -> str:
    version = _text(subtable(provenance, "versions"), "kdcache")
    return f"kdcache {version}" if version else ""


def front_matter(values: Mapping[str, Any]) -> str:
    """The YAML block that model and data hubs read at the top of a card; entries without a value are left out."""
    return "\n".join(["---", *_yaml({key: value for key, value in values.items() if value not in (None, "")}), "---"])


def _yaml(value: Mapping[str, Any] | Sequence[Any], indent: str = "") -> list[str]:
    """Block style, lists at the indent of their key."""
    named = value.items() if isinstance(value, Mapping) else [("", item) for item in value]
    lines = []
    for key, item in named:
        before = f"{indent}{_scalar(key)}:" if isinstance(value, Mapping) else f"{indent}-"
        if isinstance(item, Mapping) and item and not isinstance(value, Mapping):
            first, *rest = _yaml(item, indent + "  ")
            lines += [f"{before} {first.lstrip()}", *rest]
        elif isinstance(item, Mapping | list | tuple) and item:
            lines += [before, *_yaml(item, indent + ("  " if isinstance(item, Mapping) else ""))]
        else:
            lines.append(f"{before} {_scalar(item)}")
    return lines


def _scalar(value: Any) -> str:
    """A scalar as YAML; JSON's form where the plain one could be read as something else."""
    if isinstance(value, str) and _PLAIN.fullmatch(value) and value.lower() not in _YAML_WORDS:
        return value
    return json.dumps(value, ensure_ascii=True)


_PLAIN = re.compile(r"[A-Za-z]([A-Za-z0-9_./+-]*[A-Za-z0-9])?")
_YAML_WORDS = frozenset(("y", "n", "yes", "no", "on", "off", "true", "false", "null"))


def subtable(document: Mapping[str, Any], *keys: str) -> Mapping[str, Any]:
    """A table of the provenance, which may hold anything; empty if there is no table."""
    value: Any = document
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value if isinstance(value, Mapping) else {}


def _text(document: Mapping[str, Any], key: str) -> str:
    value = document.get(key)
    return _plain(value) if isinstance(value, str | int) else ""


def _number(value: Any) -> str:
    try:
        return f"{float(value):.4f}"
    except (TypeError, ValueError):
        return _plain(value)


def _codes(names: list[str]) -> str:
    shown = ", ".join(f"`{_plain(name)}`" for name in names[:50])
    return shown + (f" and {len(names) - 50:,} more" if len(names) > 50 else "")


def _plain(value: Any) -> str:
    """One line without characters that a page or a terminal would interpret."""
    line = re.sub(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]+", " ", str(value))
    line = re.sub(r"[|<>\[\]`]", lambda match: f"&#{ord(match[0])};", line[:_CELL])
    return line.strip()


def _rows(rows: Any) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def describe(cache: Cache) -> dict[str, Any]:
    """``describe_manifest``, with the path of the cache and the parts of it that are here. Reads no data file."""
    facts = {"path": str(cache.path), **describe_manifest(cache.manifest)}
    for name, teacher in facts["teachers"].items():
        teacher["here"] = _here(cache, layout.tokenizer_file(name))
        for layer, stored in teacher["layers"].items():
            stored["here"] = _here(cache, layout.basis_file(name, int(layer)))
    return {**facts, "selection": _selection(cache)}


def describe_manifest(manifest: Manifest) -> dict[str, Any]:
    """JSON-able: counts, tokens, bytes per teacher and layer, label names, identity, provenance.

    Of a layer, ``row_bytes`` is the size of one row (a token, or a text), ``bytes`` that of all its files.
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
        "teachers": {name: _teacher_facts(contents, name) for name in contents.teachers},
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
    """The part of the cache that is here, None for a whole cache; ``bytes_absent`` are still to be fetched."""
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


def _teacher_facts(contents: Contents, name: str) -> dict[str, Any]:
    spec = contents.teachers[name]
    sizes: Counter[int | str] = Counter()  # bytes by layer; of other files by their folder
    for path, digest in contents.files.items():
        if path.startswith(f"teachers/{name}/"):
            place = component(path)
            sizes[path.split("/")[2] if place.layer is None else place.layer] += digest.size
    document = teacher_document(spec)
    for layer, layer_spec in spec.layers.items():
        row_bytes = format_of(layer_spec).row_bytes(layer_spec)
        document["layers"][str(layer)] |= {"row_bytes": row_bytes, "bytes": sizes[layer]}
    return {
        **document,
        "pooled": spec.pooled,
        "tokens": sum(contents.tokens.get(name, {}).values()),
        "bytes": sizes.total(),
        "bytes_outputs": sizes["outputs"],
        "bytes_tokens": sizes["tokens"],
    }
