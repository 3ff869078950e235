"""The errors that kdcache raises: one tree; each has a message, a hint and an exit code.

    KdcacheError            1  the work failed
    ├── RecipeError         2  the recipe, a flag or a file named by them is not usable
    │   └── DataError       2  a data file: missing column, unreadable line, empty text, unseen label
    ├── ModelError          1  a model is not usable as asked: a layer it lacks, a width that does not fit
    │   └── CustomCodeError     1  a model needs Python code of its own that was not allowed to run
    ├── NonFiniteError      1  a teacher or a loss gave NaN or infinity
    ├── StorageError        1  the disk is full, or a file cannot be written
    ├── LockedError         1  another process is writing the same directory
    ├── LostProcessError    1  another process of the same training ended or does not answer
    ├── RemoteError         1  a remote could not be reached, or refused
    │   ├── RemoteAccessError   1  the credentials do not allow it
    │   └── MissingObjectError  1  the remote has no such object
    ├── DamageError         3  a file is missing, truncated, altered, or not what its manifest says
    └── MismatchError       4  the cache, or a part of it, is not the requested one

The message says what is wrong, with the value, and what was expected. The hint names the key or command that cures it.
The command line prints one line for each and exits with ``exit_code``; ``KDCACHE_DEBUG=1`` shows the traceback.
"""

from __future__ import annotations

import re
from typing import ClassVar

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")  # of messages that are made for a terminal


class KdcacheError(Exception):
    """Base class; ``hint`` is the cure, in the imperative, or empty."""

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class RecipeError(KdcacheError, ValueError):
    """The recipe, an override or a flag is not usable."""

    exit_code = 2


class DataError(RecipeError):
    """A data file is not usable; the message names the file and, if known, the line."""


class ModelError(KdcacheError, ValueError):
    """A model is not usable as asked."""


class CustomCodeError(ModelError):
    """A model needs Python code of its own, which was not allowed to run."""


class NonFiniteError(KdcacheError, ArithmeticError):
    """A teacher output or a loss is NaN or infinite."""


class StorageError(KdcacheError, OSError):
    """A file could not be written: disk full, permission, quota."""


class LockedError(KdcacheError):
    """Another process holds the lock of the directory."""


class LostProcessError(KdcacheError):
    """Another process of the same training ended, or does not answer."""


class RemoteError(KdcacheError):
    """A remote could not be reached, timed out or refused; the message never holds credentials."""


class RemoteAccessError(RemoteError):
    """The credentials do not allow what was asked for."""


class MissingObjectError(RemoteError):
    """The remote has no object of that key."""


class DamageError(KdcacheError):
    """A file of a cache or checkpoint is missing, truncated, altered or malformed."""

    exit_code = 3


class MismatchError(KdcacheError):
    """Existing data do not match the request; nothing was changed."""

    exit_code = 4


def first_line(error: BaseException) -> str:
    """The first line of what another library says, or the name of its class where it says nothing."""
    return (_COLOUR.sub("", str(error)).strip().splitlines() or [type(error).__name__])[0]
