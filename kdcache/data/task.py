"""A task: the examples of every split, and each distinct text once under an id that depends only on the text.

Rows of train may lack a label (an empty cell, or null): they get label -1 and are distilled like transfer texts. Rows
of validation and test need one, because they are scored. A row without any text is skipped and counted. A pair with one
empty column is a valid text.

Data files of millions of rows are read into mapped arrays, and kept under the home directory under a digest of the
files and of the settings that they are read by.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from kdcache.cache.buckets import NoRoomError
from kdcache.cache.ids import Examples, id_array
from kdcache.cache.memory import give_back_freed
from kdcache.cache.text_table import TextTable
from kdcache.data.counts import DataCounts
from kdcache.data.labels import NO_LABEL, ClassOrder, class_order, label_cells, label_numbers
from kdcache.data.reading import read_rows
from kdcache.data.splits import read_splits, sources
from kdcache.data.spools import KIND, Spool, spools_in
from kdcache.data.texts import ids_of, rows_with_text
from kdcache.kept import Kept, kept_or_made

if TYPE_CHECKING:
    from kdcache.recipe import DataSection

LARGE = 250_000_000  # bytes of data files from which they are mapped and kept: two million rows
_FORMAT = 1  # of what is kept: raise it when the same files give another result

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TaskData:
    """The data of a recipe, read and checked."""

    texts: Mapping[bytes, tuple[str, ...]]  # each distinct text by its id, in order of first use
    splits: dict[str, Examples]  # those of 'train', 'validation', 'test', 'transfer' that exist
    label_names: tuple[str, ...]  # in class order
    text_columns: tuple[str, ...]
    counts: DataCounts
    labels_declared: bool = False  # by data.labels or by the data set; else sorted


@dataclass(frozen=True)
class LabelledTexts:
    """The rows of one file in its order, for ``evaluate``."""

    texts: tuple[tuple[str, ...], ...]
    text_ids: np.ndarray  # uint8[n, 16]
    labels: np.ndarray  # int64[n], -1 = none
    label_names: tuple[str, ...]
    empty: int = 0  # skipped rows without text


def load_task(section: DataSection) -> TaskData:
    """Read every file of the section. Raises DataError (exit 2) with file, line and hint.

    With several faults in a file of more than 65,536 rows, one in its first rows is told of first.
    """
    if _is_large(section):
        try:
            kept = kept_or_made(KIND, _key(section), lambda: _in_files(section))
        except NoRoomError as error:
            log.warning("the data are read into memory, about 0.6 KB of a row: %s", error)
        else:
            give_back_freed()
            return _task(section, kept, TextTable(kept.arrays, kept.arrays["ids"]))
    made = read_splits(section, Spool)
    return _task(section, made, dict(TextTable(made.arrays, made.arrays["ids"]).pairs()))


def _in_files(section: DataSection) -> Kept:
    with ExitStack() as files:
        return read_splits(section, spools_in(files))


def _task(section: DataSection, read: Kept, texts: Mapping[bytes, tuple[str, ...]]) -> TaskData:
    arrays, document, splits = read.arrays, read.document, {}
    for split, names in document["groups"].items():
        groups = None if names is None else tuple(names[code] for code in arrays[f"{split}.groups"].tolist())
        splits[split] = Examples(arrays[f"{split}.ids"], arrays[f"{split}.labels"], groups)
    counts, names = DataCounts(**document["counts"]), tuple(document["label_names"])
    return TaskData(texts, splits, names, tuple(section.text), counts, labels_declared=document["declared"])


def _is_large(section: DataSection) -> bool:
    """Whether the data of a recipe are files, and many bytes of them."""
    paths = [Path(source).expanduser() for _, source in sources(section)]
    return all(path.is_file() for path in paths) and sum(path.stat().st_size for path in paths) > LARGE


def _key(section: DataSection) -> str:
    files = []
    for split, source in sources(section):
        with Path(source).expanduser().open("rb") as file:
            files.append([split, Path(source).suffix.lower(), hashlib.file_digest(file, "sha256").hexdigest()])
    names = ("validation_fraction", "transfer_rows", "text", "label", "group", "labels", "seed")
    document = [_FORMAT, files, *(getattr(section, name) for name in names)]
    return hashlib.sha256(json.dumps(document).encode()).hexdigest()


def read_examples(
    source: str,
    text: Sequence[str],
    label: str | None,
    label_names: Sequence[str] | None = None,
    *,
    labels_declared: bool = True,
    numbered_as: Sequence[str] | None = None,
) -> LabelledTexts:
    """The rows with text of one file or hub data set, in order; all labels are -1 if ``label`` is None.

    ``label_names`` is the class order; None sorts the labels. Integers are class numbers in ``numbered_as`` if given,
    else in ``label_names`` if that order was declared (``labels_declared``). Raises DataError as ``load_task``, and,
    if a label column is named, for rows without a label, which cannot be scored.
    """
    rows, texts, empty = rows_with_text(read_rows(source, "test"), text)
    ids = ids_of(rows, texts)
    labels = np.full(len(texts), NO_LABEL, dtype=np.int64)
    names = tuple(label_names or ())
    if label is not None:
        cells = label_cells(rows, label, names or rows.class_names.get(label, ()))
        if numbered_as is not None:
            by_number = {str(number): name for number, name in enumerate(numbered_as)}
            cells = [cell if cell is None or cell in names else by_number.get(cell, cell) for cell in cells]
        of_model = ClassOrder(names, "training" if labels_declared else "", "the training data of the model")
        order = of_model if names else class_order(rows, cells, label)
        labels, names = label_numbers(rows, cells, order, label, scored=True), order.names
    return LabelledTexts(tuple(texts), id_array(ids), labels, names, empty)
