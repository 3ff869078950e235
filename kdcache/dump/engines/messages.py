"""What a driver and its workers send each other: plain values that can be pickled.

Hidden states never travel. A worker gets the texts of a part, and gives back the sizes and digests of the files that
it wrote.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from kdcache import errors
from kdcache.errors import KdcacheError

if TYPE_CHECKING:
    import numpy as np

    from kdcache.cache.spec import Settings, TaskSpec, TeacherSpec
    from kdcache.cache.writer import PartTask
    from kdcache.files import FileDigest

Texts = Sequence[tuple[str, ...]]


@dataclass(frozen=True)
class TeacherJob:
    """How a teacher is run. ``seed``: of random projections."""

    spec: TeacherSpec
    seed: int
    trust_remote_code: bool


@dataclass(frozen=True)
class Job:
    """What all workers of a dump know. Either ``cache_dir`` is on a disk that they share, or there is a ``remote``."""

    task: TaskSpec
    settings: Settings
    has_text: bool
    teachers: Mapping[str, TeacherJob]
    teachers_dir: Path
    tokens_per_batch: int
    versions: Mapping[str, str]  # of the driver's libraries
    cache_dir: Path | None = None
    remote: str | None = None  # URL
    identity: str = ""  # of the manifest that the dump starts from
    token: str = ""  # name of a file of the driver under ``.dump/``: a worker that sees it shares the disk


@dataclass(frozen=True)
class Fit:
    """Fit the bases of ``layers`` of a teacher on these texts, with ids uint8 [n, 16]."""

    teacher: str
    text_ids: np.ndarray
    texts: Texts
    layers: tuple[int, ...]


@dataclass(frozen=True)
class Piece:
    """Run a teacher over a part, and write what is missing. ``files``: those of the part that exist."""

    teacher: str
    task: PartTask
    texts: Texts
    tokens: int | None
    files: Mapping[str, FileDigest]


@dataclass(frozen=True)
class About:
    """A worker that may work: its name for people."""

    name: str


@dataclass(frozen=True)
class Fitted:
    """The bases of a teacher, by layer, as their files have them."""

    teacher: str
    bases: Mapping[int, bytes]
    seconds: float


@dataclass(frozen=True)
class Written:
    """The commit record of a piece, and its counts."""

    teacher: str
    part: str
    tokens: int | None
    files: Mapping[str, FileDigest]
    texts: int
    truncated: int
    token_count: int
    bytes: int
    seconds: float
    record: Mapping[str, str] = field(default_factory=dict)  # of the backend


@dataclass(frozen=True)
class Failed:
    """An error of a worker. ``of_worker``: another worker may succeed; ``for_good``: this one will not."""

    kind: str  # a class of kdcache.errors
    message: str
    hint: str
    of_worker: bool = True
    for_good: bool = False

    def error(self, worker: str) -> KdcacheError:
        """The error, to be raised by the driver."""
        kind: type[KdcacheError] = getattr(errors, self.kind, KdcacheError)
        return kind(f"worker {worker}: {self.message}", self.hint)


Outcome = About | Fitted | Written | Failed
