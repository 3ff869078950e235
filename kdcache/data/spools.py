"""Arrays that grow while rows are read: in memory, or in files without names that are mapped at the end.

The files lie in the home directory and are gone when they are closed, also where the process is killed.
"""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np

from kdcache.cache.buckets import NoRoomError
from kdcache.cache.ids import ID_BYTES, id_array
from kdcache.runs import home

KIND = "data"  # the directory under the home directory


class Spool:
    """An array that grows in memory; with a ``width`` it has so many columns."""

    def __init__(self, dtype: Any, width: int = 0) -> None:
        self._dtype, self._shape = np.dtype(dtype), (-1, width) if width else (-1,)
        self._pieces: list[np.ndarray] = []

    def add(self, values: Any) -> None:
        self._pieces.append(np.ascontiguousarray(values, self._dtype).reshape(-1))

    def array(self) -> np.ndarray:
        """All values so far."""
        self._pieces = [np.concatenate([np.zeros(0, self._dtype), *self._pieces])]
        return self._pieces[0].reshape(self._shape)


class _FileSpool(Spool):
    """The same in a file without a name, mapped by ``array``. Raises NoRoomError where it cannot be written."""

    def __init__(self, files: ExitStack, dtype: Any, width: int = 0) -> None:
        super().__init__(dtype, width)
        try:
            (home() / KIND).mkdir(parents=True, exist_ok=True)
            self._file = files.enter_context(tempfile.TemporaryFile(dir=home() / KIND, buffering=0))  # noqa: SIM115
        except OSError as error:
            raise NoRoomError(str(error)) from error

    def add(self, values: Any) -> None:
        view = np.ascontiguousarray(values, self._dtype).reshape(-1).view(np.uint8).data
        while len(view):
            try:
                view = view[self._file.write(view) or 0 :]
            except OSError as error:
                raise NoRoomError(str(error)) from error

    def array(self) -> np.ndarray:
        if not self._file.tell():
            return np.zeros(0, self._dtype).reshape(self._shape)
        data = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
        return np.frombuffer(data, self._dtype).reshape(self._shape)


Spools = Callable[..., Spool]  # dtype, width -> an empty spool


def spools_in(files: ExitStack) -> Spools:
    """Spools in files that ``files`` closes."""
    return lambda dtype, width=0: _FileSpool(files, dtype, width)


class TextSpool:
    """Ids and columns of all rows with text, each column in a spool of its own."""

    def __init__(self, spools: Spools, columns: int) -> None:
        self.rows = 0
        self._ids = spools(np.uint8, ID_BYTES)
        self._ends = [0] * columns
        self._offsets = [spools("<i8") for _ in range(columns)]
        self._values = [spools("u1") for _ in range(columns)]
        for offsets in self._offsets:
            offsets.add([0])

    def add(self, ids: Sequence[bytes], texts: Sequence[tuple[str, ...]]) -> None:
        self._ids.add(id_array(ids))
        for column, (offsets, values) in enumerate(zip(self._offsets, self._values, strict=True)):
            encoded = [text[column].encode() for text in texts]
            ends = self._ends[column] + np.cumsum([len(one) for one in encoded], dtype=np.int64)
            offsets.add(ends)
            values.add(np.frombuffer(b"".join(encoded), np.uint8))
            self._ends[column] = int(ends[-1]) if len(ends) else self._ends[column]
        self.rows += len(ids)

    def ids(self) -> np.ndarray:
        return self._ids.array()

    def arrays(self) -> dict[str, np.ndarray]:
        pairs = enumerate(zip(self._offsets, self._values, strict=True))
        return {
            name: spool.array()
            for column, (offsets, values) in pairs
            for name, spool in ((f"offsets.{column}", offsets), (f"values.{column}", values))
        }


class CodeSpool:
    """A column of few distinct values, as numbers in the order of their first use."""

    def __init__(self, spools: Spools) -> None:
        self.names: dict[Any, int] = {}
        self._spool = spools("<i4")

    def add(self, values: Sequence[Any]) -> None:
        self._spool.add([self.names.setdefault(value, len(self.names)) for value in values])

    def array(self) -> np.ndarray:
        return self._spool.array()
