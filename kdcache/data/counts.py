"""What was found in the data: numbers for the user to look at before hours are spent on it."""

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
    """Rows and oddities per split. ``as_dict`` is JSON; ``lines`` is for people."""

    rows: dict[str, int]  # per split; of transfer, the texts that are used
    unlabelled: dict[str, int]  # rows without a label, where there are any
    labels: dict[str, dict[str, int]]  # rows per split and label name
    duplicates: dict[str, int]  # rows whose text an earlier row of the split has
    conflicts: dict[str, int]  # texts that have different labels within a split
    shared: dict[str, int]  # distinct texts that two splits share: 'train and test' -> 12
    transfer_dropped: dict[str, int]  # rows of transfer files that are not used, by reason
    empty: dict[str, int] = field(default_factory=dict)  # rows left out because they have no text, where there are any
    warnings: list[str] = field(default_factory=list)  # what is odd about the labels

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        """One line per split, then one per oddity that was found."""
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
        """What a stage says before it starts, whoever runs it: rows that are left out, labels that may be none."""
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
    """Counts over the labelled splits (``ids``, ``labels`` per split) and the transfer texts.

    Zero oddities are left out.
    """
    rows = {split: len(found) for split, found in ids.items()}
    if transfer:
        rows["transfer"] = transfer
    shared = {f"{a} and {b}": len(set(ids[a]) & set(ids[b])) for a, b in combinations(ids, 2)}
    return DataCounts(
        rows=rows,
        unlabelled=_nonzero({split: int((labels[split] < 0).sum()) for split in ids}),
        labels={split: _per_label(labels[split], label_names) for split in ids},
        duplicates=_nonzero({split: len(found) - len(set(found)) for split, found in ids.items()}),
        conflicts=_nonzero({split: _conflicts(found, labels[split]) for split, found in ids.items()}),
        shared=_nonzero(shared),
        transfer_dropped=_nonzero(dropped),
        empty=_nonzero(empty),
        warnings=list(warnings),
    )


def _nonzero(counts: Mapping[str, int]) -> dict[str, int]:
    return {name: count for name, count in counts.items() if count}


def _per_label(labels: np.ndarray, names: Sequence[str]) -> dict[str, int]:
    found = Counter(labels.tolist())
    return {name: found[number] for number, name in enumerate(names)}


def _conflicts(ids: Sequence[bytes], labels: np.ndarray) -> int:
    seen: dict[bytes, set[int]] = defaultdict(set)
    for identity, label in zip(ids, labels.tolist(), strict=True):
        if label >= 0:
            seen[identity].add(label)
    return sum(len(found) > 1 for found in seen.values())
