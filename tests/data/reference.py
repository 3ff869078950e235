"""The data of a recipe, read row by row into Python objects: the reference for the arrays of kdcache."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, compress

import numpy as np

from kdcache.cache.ids import Examples, id_array
from kdcache.data.counts import DataCounts
from kdcache.data.labels import NO_LABEL, ClassOrder, label_cells, label_numbers, label_warnings
from kdcache.data.reading import Rows, read_rows
from kdcache.data.splits import _ordered_classes, _unsplit
from kdcache.data.task import TaskData
from kdcache.data.texts import column_texts, has_text, ids_of, rows_with_text, seeded_keys
from kdcache.recipe import DataSection


@dataclass(frozen=True)
class _Split:
    rows: Rows
    texts: list[tuple[str, ...]]
    ids: list[bytes]
    labels: list[str | None]
    groups: tuple[str, ...] | None
    empty: int = 0  # skipped rows without text

    def take(self, keep: Sequence[bool]) -> _Split:
        """The rows where ``keep`` is true."""
        return replace(
            self,
            rows=replace(self.rows, columns={}).take(keep),
            texts=list(compress(self.texts, keep)),
            ids=list(compress(self.ids, keep)),
            labels=list(compress(self.labels, keep)),
            groups=None if self.groups is None else tuple(compress(self.groups, keep)),
        )


def load_task(section: DataSection) -> TaskData:
    """What ``kdcache.data.task.load_task`` gives, with dicts, sets and lists."""
    splits = {"train": _read_split(section, section.train, "train")}
    order = _ordered_classes(section, splits["train"].rows, splits["train"].labels)
    names = order.names
    if section.validation_fraction:
        splits["train"], splits["validation"] = _split_off(splits["train"], section.validation_fraction, section.seed)
    elif section.validation is not None:
        splits["validation"] = _read_split(section, section.validation, "validation", names)
    if section.test is not None:
        splits["test"] = _read_split(section, section.test, "test", names)
    examples = {name: _examples(name, split, order, section.label) for name, split in splits.items()}
    texts = {identity: text for split in splits.values() for identity, text in zip(split.ids, split.texts, strict=True)}
    transfer, dropped = _transfer(section, splits)
    if transfer:
        texts |= transfer
        examples["transfer"] = Examples(id_array(transfer), np.full(len(transfer), NO_LABEL, dtype=np.int64), None)
    ids = {name: split.ids for name, split in splits.items()}
    labels = {name: examples[name].labels for name in splits}
    empty = {name: split.empty for name, split in splits.items()}
    warnings = label_warnings(order, labels["train"])
    counts = count_rows(ids, labels, names, transfer=len(transfer), dropped=dropped, empty=empty, warnings=warnings)
    return TaskData(texts, examples, names, tuple(section.text), counts, labels_declared=bool(order.declared))


def _read_split(section: DataSection, source: str, split: str, known: Sequence[str] | None = None) -> _Split:
    rows, texts, empty = rows_with_text(read_rows(source, split), section.text)
    groups = None
    if section.group is not None:
        groups = tuple("" if value is None else str(value) for value in rows.column(section.group, "group"))
    known = known or section.labels or rows.class_names.get(section.label, ())
    return _Split(rows, texts, ids_of(rows, texts), label_cells(rows, section.label, known), groups, empty)


def _examples(name: str, split: _Split, order: ClassOrder, column: str) -> Examples:
    labels = label_numbers(split.rows, split.labels, order, column, scored=name != "train")
    return Examples(id_array(split.ids), labels, split.groups)


def _split_off(train: _Split, fraction: float, seed: int) -> tuple[_Split, _Split]:
    """Split off validation by text, so that no text is in both; texts with an unlabelled row stay in train."""
    unlabelled = {identity for identity, label in zip(train.ids, train.labels, strict=True) if label is None}
    keys = seeded_keys(train.ids, seed, "validation")
    chosen = [
        key < fraction * 2**64 and identity not in unlabelled for identity, key in zip(train.ids, keys, strict=True)
    ]
    rest = [not side for side in chosen]
    if not any(chosen) or not any(rest):
        raise _unsplit(fraction, train.rows.source, len(chosen), sum(chosen))
    return train.take(rest), replace(train.take(chosen), empty=0)


def _transfer(section: DataSection, splits: dict[str, _Split]) -> tuple[dict[bytes, tuple[str, ...]], dict[str, int]]:
    """The used transfer texts in seeded order, and the number of dropped rows by reason."""
    evaluation = {identity for name, split in splits.items() if name != "train" for identity in split.ids}
    train = set(splits["train"].ids)
    texts_by_id: dict[bytes, tuple[str, ...]] = {}
    dropped = {
        "without text": 0,
        "found in validation or test": 0,
        "already in train": 0,
        "duplicates": 0,
        "beyond transfer_rows": 0,
    }
    for source in section.transfer:
        rows = read_rows(source, "train")
        texts = column_texts(rows, section.text)
        for identity, text in zip(ids_of(rows, texts), texts, strict=True):
            if not has_text(text):
                dropped["without text"] += 1
            elif identity in evaluation:
                dropped["found in validation or test"] += 1
            elif identity in train:
                dropped["already in train"] += 1
            elif identity in texts_by_id:
                dropped["duplicates"] += 1
            else:
                texts_by_id[identity] = text
    keys = seeded_keys(list(texts_by_id), section.seed, "transfer")
    order = [identity for _, identity in sorted(zip(keys, texts_by_id, strict=True))]
    used = order[: section.transfer_rows]
    dropped["beyond transfer_rows"] = len(order) - len(used)
    return {identity: texts_by_id[identity] for identity in used}, dropped


def count_rows(
    ids: Mapping[str, Sequence[bytes]],
    labels: Mapping[str, np.ndarray],
    label_names: Sequence[str],
    transfer: int,
    dropped: Mapping[str, int],
    empty: Mapping[str, int],
    warnings: Sequence[str],
) -> DataCounts:
    """Counts over the labelled splits (``ids``, ``labels`` per split) and the transfer texts, without zeros."""
    rows = {split: len(texts) for split, texts in ids.items()}
    if transfer:
        rows["transfer"] = transfer
    shared = {f"{a} and {b}": len(set(ids[a]) & set(ids[b])) for a, b in combinations(ids, 2)}
    return DataCounts(
        rows=rows,
        unlabelled=_nonzero({split: int((labels[split] < 0).sum()) for split in ids}),
        labels={split: _per_label(labels[split], label_names) for split in ids},
        duplicates=_nonzero({split: len(texts) - len(set(texts)) for split, texts in ids.items()}),
        conflicts=_nonzero({split: _conflicts(texts, labels[split]) for split, texts in ids.items()}),
        shared=_nonzero(shared),
        transfer_dropped=_nonzero(dropped),
        empty=_nonzero(empty),
        warnings=list(warnings),
    )


def _nonzero(counts: Mapping[str, int]) -> dict[str, int]:
    return {name: count for name, count in counts.items() if count}


def _per_label(labels: np.ndarray, names: Sequence[str]) -> dict[str, int]:
    counts = Counter(labels.tolist())
    return {name: counts[number] for number, name in enumerate(names)}


def _conflicts(ids: Sequence[bytes], labels: np.ndarray) -> int:
    seen: dict[bytes, set[int]] = defaultdict(set)
    for identity, label in zip(ids, labels.tolist(), strict=True):
        if label >= 0:
            seen[identity].add(label)
    return sum(len(numbers) > 1 for numbers in seen.values())
