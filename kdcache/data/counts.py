"""Statistics of the data, for the user to check before a long run."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from typing import TYPE_CHECKING, Any

from kdcache.progress import listed

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class DataCounts:
    """Rows and irregularities per split. ``as_dict`` is the JSON document; ``lines`` is for the terminal."""

    rows: dict[str, int]  # per split; for transfer, the used texts
    unlabelled: dict[str, int]  # rows without a label
    labels: dict[str, dict[str, int]]  # rows per split and label name
    duplicates: dict[str, int]  # rows with the text of an earlier row of the split
    conflicts: dict[str, int]  # texts with different labels within a split
    shared: dict[str, int]  # distinct texts that two splits share: 'train and test' -> 12
    transfer_dropped: dict[str, int]  # rows of transfer files that are not used, by reason
    empty: dict[str, int] = field(default_factory=dict)  # skipped rows without text
    warnings: list[str] = field(default_factory=list)  # about the labels

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        """One line per split, then one per irregularity."""
        lines = []
        for split, count in self.rows.items():
            per_label = listed((f"{name}: {number:,}" for name, number in self.labels.get(split, {}).items()))
            lines.append(f"{split}: {count:,} rows" + (f" ({per_label})" if self.labels.get(split) else ""))
        lines += [f"{split}: {count:,} rows have no label" for split, count in self.unlabelled.items()]
        lines += [f"{split}: {count:,} rows repeat a text" for split, count in self.duplicates.items()]
        lines += [f"{split}: {count:,} texts have conflicting labels" for split, count in self.conflicts.items()]
        lines += [f"{splits} share {count:,} texts" for splits, count in self.shared.items()]
        lines += [f"transfer: {count:,} rows dropped, {reason}" for reason, count in self.transfer_dropped.items()]
        return lines + self.notes()

    def notes(self) -> list[str]:
        """Notes that every stage shows before it starts: skipped rows and suspicious labels."""
        empty = [f"{split}: {count:,} rows have no text and are left out" for split, count in self.empty.items()]
        return empty + list(self.warnings)


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
