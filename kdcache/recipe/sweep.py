"""The section ``[sweep]``: which students are trained from one cache, with which seeds, and how they are compared.

A cell is a set of recipe keys with values; each cell is trained once per seed. Keys are dotted, as in ``--set``. Cells
come from a list, from a grid, and from a search. Only keys of ``[student]`` and ``[distill]`` vary, the choice of
transfer texts, and ``cache``, which is the cache of a cell: other keys change what a cache holds.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

CACHE = "cache"  # the key of a cell that is no recipe key
_FREE = ("distill", "student")
_FREE_KEYS = ("data.transfer", "data.transfer_rows", CACHE)
_OWN = {
    "distill.trackers": "it changes no result; set it once, in [distill]",
    "distill.seed": "set sweep.seeds",
    "name": "all students of a sweep are in the directory of the recipe's name",
    "distill.checkpoint_steps": "it changes no result; set it once, in [distill]",
    "distill.checkpoint_minutes": "it changes no result; set it once, in [distill]",
}

Cell = dict[str, Any]  # dotted key -> value


def check_key(key: str) -> None:
    """Raises ValueError for a key that may not vary in a sweep."""
    section = key.partition(".")[0]
    if key in _OWN:
        raise ValueError(f"'{key}' cannot vary in a sweep: {_OWN[key]}")
    if key not in _FREE_KEYS and section in ("data", "teachers", "cofinetune", "dump"):
        raise ValueError(
            f"'{key}' cannot vary in a sweep, because it changes what the cache holds: make a second cache and vary "
            "'cache', or choose teachers with 'distill.teachers'"
        )
    if key not in _FREE_KEYS and (section not in _FREE or key == section):
        raise ValueError(f"'{key}' cannot vary in a sweep; keys of distill and student can, such as 'distill.method'")


def _leaves(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested tables as dotted keys: ``{distill = {method = …}}`` is ``distill.method``.

    A quoted key with a dot keeps its value as it is, and so does a range.
    """
    for name, value in table.items():
        if isinstance(value, Mapping) and "." not in name and not {"low", "high"} & value.keys():
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _flat(table: Any) -> Any:
    """``table`` with dotted keys; ValueError where a key replaces another that was given before it."""
    if not isinstance(table, Mapping):
        return table
    found: dict[str, Any] = {}
    for key, value in _leaves(table):
        for other in found:
            if _steps(other)[: len(_steps(key))] == _steps(key):
                raise _given_twice(key, other)
        found[key] = value
    return found


def _flat_cell(table: Any) -> Any:
    """As ``_flat``; ValueError too where a key changes a part of another one's value."""
    table = _flat(table)
    keys = list(table) if isinstance(table, Mapping) else []
    for whole, part in itertools.permutations(keys, 2):
        if _steps(part)[: len(_steps(whole))] == _steps(whole):
            raise _given_twice(whole, part)
    return table


def _steps(key: str) -> list[str]:
    return [step.strip() for step in key.split(".")]


def _given_twice(whole: str, part: str) -> ValueError:
    if _steps(whole) == _steps(part):
        return ValueError(f"'{whole}' is given twice; give it once")
    return ValueError(f"'{part}' is a part of '{whole}', and both are given; give one of them")


def _filled(table: dict[str, Any]) -> dict[str, Any]:
    for key, values in table.items():
        if isinstance(values, list) and not values:
            raise ValueError(f"'{key}' has no values; a list of one or more was expected")
    return table


def _checked(table: dict[str, Any]) -> dict[str, Any]:
    for key in table:
        check_key(key)
    return table


def _distinct(seeds: list[int]) -> list[int]:
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"each seed may be given once: {seeds}")
    return seeds


CellTable = Annotated[Cell, BeforeValidator(_flat_cell), AfterValidator(_checked)]
Grid = Annotated[dict[str, list[Any]], BeforeValidator(_flat), AfterValidator(_filled), AfterValidator(_checked)]
Seeds = Annotated[
    list[Annotated[int, Field(ge=0, lt=2**32)]], Field(min_length=1, max_length=1000), AfterValidator(_distinct)
]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class RangeSection(_Section):
    """The values of a key in a search: from ``low`` to ``high``; whole numbers for a key that takes whole numbers."""

    low: int | float  # the smallest value
    high: int | float  # the largest value
    log: bool = False  # spread evenly over orders of magnitude

    @model_validator(mode="after")
    def _is_a_range(self) -> RangeSection:
        if self.low >= self.high:
            raise ValueError(f"low is {self.low} and high {self.high}; high must be the larger one")
        if self.log and self.low <= 0:
            raise ValueError(f"low is {self.low}; a logarithmic range needs more than 0")
        return self


Space = Annotated[
    dict[str, list[Any] | RangeSection],
    Field(min_length=1),
    BeforeValidator(_flat),
    AfterValidator(_filled),
    AfterValidator(_checked),
]


class SearchSection(_Section):
    """A search: ``trials`` cells whose values of ``space`` are proposed from the results so far.

    ``batch`` cells are proposed together. So the proposals depend on the recipe and the results only, not on how many
    processes train.
    """

    trials: Annotated[int, Field(ge=1, le=100_000)]  # how many cells are proposed
    space: Space  # recipe key -> list of values, or a range
    sampler: Literal["tpe", "random"] = "tpe"  # tpe: Optuna, the extra kdcache[search]
    batch: Annotated[int, Field(ge=1)] = 1  # cells that are proposed together
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0  # of the proposals


class SweepSection(_Section):
    """Students that differ in some keys, trained from one cache (or several), and compared."""

    cells: list[CellTable] = []  # each one as given; an empty table is the recipe as it is
    grid: Grid = {}  # key -> values: every combination is a cell
    search: SearchSection | None = None  # cells that are proposed from the results so far
    seeds: Seeds = [0, 1, 2]  # values of distill.seed; each cell is trained once per seed
    baseline: CellTable | None = None  # what the others are compared with; the first cell where not given
    select_by: Literal["accuracy", "macro_f1", "matthews", "loss"] | None = None  # distill.select_by where not given

    @model_validator(mode="after")
    def _has_cells(self) -> SweepSection:
        if not self.cells and not self.grid and self.search is None:
            raise ValueError("give cells, a grid or a search")
        return self

    def settings(self) -> list[Cell]:
        """The cells that are known from the start: the baseline, if given, then ``cells``, then the grid."""
        first = [] if self.baseline is None else [self.baseline]
        keys = list(self.grid)
        combinations = itertools.product(*self.grid.values()) if keys else ()
        return [*first, *self.cells, *(dict(zip(keys, values, strict=True)) for values in combinations)]
