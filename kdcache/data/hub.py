"""Data sets by hub name, through the ``datasets`` package, which is an extra: files need none of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kdcache.data.files import Rows
from kdcache.errors import DataError


def parse_spec(spec: str, split: str) -> tuple[str, str | None, str]:
    """``name``, ``name:config``, ``name:config/split`` or ``name:/split`` as (name, config, split)."""
    name, _, rest = spec.partition(":")
    config, _, named_split = rest.partition("/")
    return name, config or None, named_split or split


def read_hub(spec: str, split: str) -> Rows:
    """One split of a hub data set. Raises DataError where the extra is missing, the hub out of reach, or the name unknown."""
    name, config, split = parse_spec(spec, split)
    no_file = f"there is no data file '{Path(spec).absolute()}'"
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"{no_file}, and data sets by hub name ('{spec}') need the package 'datasets'",
            "Give the path of a file, or install the extra: pip install 'kdcache[hub]'",
        ) from error
    datasets.disable_progress_bars()
    try:
        table = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # datasets and huggingface_hub raise a dozen unrelated kinds, requests' own among them
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise DataError(
            f"{no_file}, and the hub data set '{name}' (config {config or 'default'}, split '{split}') "
            f"could not be loaded: {reason}",
            "Check the name as NAME:CONFIG/SPLIT and the connection, or give the path of a file.",
        ) from error
    return rows_of(table, spec)


def rows_of(table: Any, source: str) -> Rows:
    """A ``datasets.Dataset`` as rows; classes of ``ClassLabel`` columns keep their names, and -1 means no label, as there."""
    columns: dict[str, Sequence[Any]] = {name: list(table[name]) for name in table.column_names}
    class_names = {}
    for name, feature in table.features.items():
        names = getattr(feature, "names", None)
        if names is not None:
            class_names[name] = tuple(names)
            columns[name] = [None if value is None or value < 0 else names[value] for value in columns[name]]
    return Rows(source, columns, range(1, len(table) + 1), unit="row", class_names=class_names)
