"""Which file is train, validation, test or transfer: as a flag says, by its name, or by what it holds."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kdcache.data.reading import Rows, read_rows
from kdcache.errors import DataError, RecipeError
from kdcache.first.columns import label_guesses
from kdcache.progress import listed

Split = Literal["train", "validation", "test", "transfer"]
_NAMES: dict[str, Split] = {
    **dict.fromkeys(("train", "training", "trn"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev", "development", "eval"), "validation"),
    **dict.fromkeys(("test", "testing", "heldout"), "test"),
    **dict.fromkeys(("transfer", "unlabelled", "unlabeled", "unsupervised", "augmented", "extra"), "transfer"),
}
_SINGLE: tuple[Split, ...] = ("train", "validation", "test")
_WITHHELD = (None, "", "-1", -1)  # no label, or GLUE's mark for one that is withheld


@dataclass(frozen=True)
class Files:
    """The files of a recipe, read. ``why``: a line for each whose split was guessed."""

    train: Rows
    validation: Rows | None
    test: Rows | None
    transfer: tuple[Rows, ...]
    why: tuple[str, ...]


def split_named(source: str) -> Split | None:
    """The split that a file name means: ``imdb-dev.tsv`` is validation; of a hub data set, its part after ``/``."""
    path = Path(source)
    stem = path.stem if path.is_file() else source.partition(":")[2].partition("/")[2] or path.stem
    for word in reversed(re.split(r"[^a-z]+", stem.lower())):
        if word in _NAMES:
            return _NAMES[word]
    return None


def read_files(sources: Sequence[str], named: Mapping[Split, Sequence[str]], label: str | None = None) -> Files:
    """Read all files and say which is which.

    Args:
        sources: Files whose split is to be guessed.
        named: Files by split, as flags give them.
        label: The label column where it is known.

    Raises:
        DataError: A file cannot be read, or none has labels.
        RecipeError: Two files for one split, or several that may be train.
    """
    splits: dict[Split, list[Rows]] = {"train": [], "validation": [], "test": [], "transfer": []}
    for split, given in named.items():
        splits[split] += [read_rows(source, split) for source in given]
    guessed = [read_rows(source, split_named(source) or "train") for source in sources]
    alone = len(guessed) == 1 and not splits["train"]
    why = []
    for rows, source in zip(guessed, sources, strict=True):
        labelled = has_labels(rows, label)
        split, reason = _split(source, labelled=labelled, alone=alone)
        splits[split].append(rows)
        why.append(f"{split}: {rows.source} ({len(rows):,} rows), {reason}")
    for split in _SINGLE:
        if len(splits[split]) > 1:
            sources_there = listed((rows.source for rows in splits[split]), quoted=True)
            raise RecipeError(
                f"{len(splits[split])} files would be {split}: {sources_there}; one was expected",
                "Say which is which with --train, --validation, --test and --transfer.",
            )
    if not splits["train"]:
        raise _no_labels([*guessed, *splits["transfer"]])
    validation, test = (next(iter(splits[split]), None) for split in _SINGLE[1:])
    return Files(splits["train"][0], validation, test, tuple(splits["transfer"]), tuple(why))


def _split(source: str, *, labelled: bool, alone: bool) -> tuple[Split, str]:
    named = split_named(source)
    if not labelled:
        reason = "its name" if named == "transfer" else "no label column with labels: its texts are for distillation"
        return "transfer", reason
    if alone:
        return "train", "the only file"
    if named is not None:
        return named, "its name"
    return "train", "it has labels, and its name says nothing else"


def has_labels(rows: Rows, label: str | None = None) -> bool:
    """Whether a column, ``label`` if given, holds labels; GLUE's -1 in every row is none."""
    if label is not None:
        names = [label] if label in rows.columns else []
    else:
        names = [guess.columns[0] for guess in label_guesses(rows)]
    return any(value not in _WITHHELD and value == value for name in names for value in rows.columns[name])


def _no_labels(files: Sequence[Rows]) -> DataError:
    if not files:
        return DataError("there is no file with labels to train on", "Name one: kdcache init FILE")
    first = files[0]
    return DataError(
        f"no column of {first.source} looks like a label; it has: {listed(first.columns, quoted=True)}",
        "Name it with --label, or give a file with labels too: texts without labels are used for distillation.",
    )
