"""Statistics of the data, for the user to check before a long run."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from kdcache.progress import listed


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
