"""Checkpoint directories that survive kill -9 and power loss at any moment; damage is detected.

A checkpoint is a directory with one file per key of the state. It is written under a temporary name, every file is
synced, then it is renamed: under its final name it is complete. ``checkpoint.json`` lists every file with size and
SHA-256, and the ``identity`` of the training, so that a run with other settings refuses the checkpoint. Older
checkpoints are removed only after the new one is durable. Files are streamed, without a second copy in memory.

Where processes hold different modules (``training/apart.py``), each of them writes one of these files, its piece.
"""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.utils._pytree import tree_map_only

from kdcache.errors import DamageError, MismatchError
from kdcache.files import DurableFile, make_directory, publish_directory, remove_directory

if TYPE_CHECKING:
    from kdcache.training.processes import Processes

RECORD = "checkpoint.json"
_PREFIX = "step-"
_PIECE = "piece-"


def save(
    directory: Path,
    state: Mapping[str, Any],
    *,
    step: int,
    identity: Mapping[str, Any] | None = None,
    keep: int | None = 1,
) -> Path:
    """Write ``state`` as the checkpoint of ``step``; keeps the ``keep`` newest ones, or all if it is None.

    Values must survive ``torch.save`` and ``torch.load(weights_only=True)``. Raises StorageError.
    """
    temporary = _begin(directory, step)
    files = {f"{key}.pt": _write(temporary / f"{key}.pt", value) for key, value in state.items()}
    return _publish(temporary, step, identity, files, keep)


def save_pieces(
    directory: Path,
    state: Mapping[str, Any],
    piece: Mapping[str, Any],
    *,
    step: int,
    identity: Mapping[str, Any],
    keep: int | None = 1,
    processes: Processes,
) -> None:
    """As ``save``, by all processes together: each writes its ``piece``, the first one ``state`` and the record.

    When it returns, the checkpoint is durable. Raises StorageError; LostProcessError if another process ended.
    """
    temporary = directory / _temporary_name(step)
    processes.from_first(lambda: _begin(directory, step))
    name = f"{_PIECE}{processes.rank:04d}.pt"
    pieces = processes.gathered((name, _write(temporary / name, dict(piece))))

    def publish() -> None:
        files = {f"{key}.pt": _write(temporary / f"{key}.pt", value) for key, value in state.items()}
        _publish(temporary, step, identity, {**files, **dict(pieces)}, keep)

    processes.from_first(publish)


def _begin(directory: Path, step: int) -> Path:
    """A new directory for the files of a checkpoint."""
    make_directory(directory)
    clean(directory)
    temporary = directory / _temporary_name(step)
    temporary.mkdir()
    return temporary


def _publish(
    temporary: Path, step: int, identity: Mapping[str, Any] | None, files: Mapping[str, Any], keep: int | None
) -> Path:
    """Write the record of ``files``, rename the directory, and remove older checkpoints."""
    directory = temporary.parent
    record = {"format": 1, "step": step, "identity": dict(identity or {}), "files": files}
    with DurableFile(temporary / RECORD) as file:
        file.write(json.dumps(record, indent=1).encode())
    final = directory / _step_name(step)
    publish_directory(temporary, final)
    for old in _steps(directory)[:-keep] if keep is not None else ():
        remove_directory(old)
    return final


def copied(state: Mapping[str, Any]) -> dict[str, Any]:
    """``state`` with all tensors copied to the host, so that the training can change the originals."""
    copies: dict[str, Any] = tree_map_only(torch.Tensor, lambda tensor: tensor.detach().to("cpu", copy=True), state)
    return copies


class CheckpointWriter:
    """Runs one write at a time: in a thread while the training goes on, or at once.

    An error of the thread is raised unchanged by the next call, so a full disk stops the training within a step.
    """

    def __init__(self, *, in_thread: bool) -> None:
        self.in_thread = in_thread
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="kdcache-checkpoint") if in_thread else None
        self._running: Future[None] | None = None

    def start(self, write: Callable[[], None]) -> None:
        """Run ``write`` after the one before, which is waited for. Raises its error."""
        self.wait()
        if self._thread is None:
            write()
        else:
            self._running = self._thread.submit(write)

    def check(self) -> None:
        """Raise the error of a write that has ended."""
        if self._running is not None and self._running.done():
            self.wait()

    def wait(self) -> None:
        """Wait for the write, and raise its error."""
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def close(self) -> None:
        """Wait for the write without raising its error, for a training that ends with another one."""
        if self._thread is not None:
            self._thread.shutdown(wait=True)


def keep_only(directory: Path, step: int) -> None:
    """Remove the checkpoints of all other steps. Raises StorageError."""
    clean(directory)
    for path in _steps(directory):
        if path.name != _step_name(step):
            remove_directory(path)


@dataclass(frozen=True)
class Saved:
    """A complete checkpoint, whose files are read one by one."""

    path: Path
    files: Mapping[str, Mapping[str, Any]]

    @property
    def keys(self) -> list[str]:
        """The keys of the state, without pieces."""
        return [key for key in map(_key, self.files) if not key.startswith(_PIECE)]

    @property
    def pieces(self) -> list[str]:
        """The keys of the pieces, by the process that wrote them; empty where one process wrote everything."""
        return sorted(key for key in map(_key, self.files) if key.startswith(_PIECE))

    def read(self, key: str) -> Any:
        """The value of ``key``, on the CPU. DamageError, naming the file, if it is missing or changed."""
        return _read(self.path / f"{key}.pt", self.files[f"{key}.pt"])

    def read_pieces(self, wanted: Mapping[str, Collection[str]], rank: int) -> dict[str, dict[str, Any]]:
        """What is ``wanted`` of each dict in the pieces, one of which is in memory at a time; DamageError as ``read``.

        The piece of process ``rank`` comes first, and others only until all of ``model`` is found: what else belongs to
        a parameter is in the same piece.
        """
        found: dict[str, dict[str, Any]] = {kind: {} for kind in wanted}
        first = rank % len(self.pieces)
        for piece in (*self.pieces[first:], *self.pieces[:first]):
            content = self.read(piece)
            for kind, names in wanted.items():
                found[kind] |= {name: value for name, value in content[kind].items() if name in names}
            if len(found["model"]) == len(wanted["model"]):
                break
        return found


def open_latest(
    directory: Path, *, identity: Mapping[str, Any] | None = None, newer_keys: Collection[str] = ()
) -> Saved | None:
    """The newest complete checkpoint, or None; half-written ones are ignored.

    ``newer_keys``: keys of ``identity`` that earlier versions did not write; such a key is compared only if the
    checkpoint has it. All other keys must exist and be equal.

    Raises DamageError for an unreadable record; MismatchError (exit 4), naming what differs from ``identity``.
    """
    steps = _steps(directory)
    return _open(steps[-1], identity, newer_keys) if steps else None


def open_step(directory: Path, step: int) -> Saved:
    """The checkpoint of that step; DamageError if it is missing."""
    return _open(directory / _step_name(step), None, ())


def load_latest(
    directory: Path, *, identity: Mapping[str, Any] | None = None, newer_keys: Collection[str] = ()
) -> dict[str, Any] | None:
    """The newest complete checkpoint as saved, or None; arguments and errors as in ``open_latest``.

    Raises DamageError too for a missing, truncated or changed file.
    """
    saved = open_latest(directory, identity=identity, newer_keys=newer_keys)
    return None if saved is None else _all(saved)


def load_step(directory: Path, step: int) -> dict[str, Any]:
    """The checkpoint of that step; DamageError if it is missing."""
    return load(directory / _step_name(step))


def load(
    checkpoint: Path, *, identity: Mapping[str, Any] | None = None, newer_keys: Collection[str] = ()
) -> dict[str, Any]:
    """One checkpoint, each file verified before it is decoded; arguments and errors as in ``load_latest``."""
    return _all(_open(checkpoint, identity, newer_keys))


def _open(checkpoint: Path, identity: Mapping[str, Any] | None, newer_keys: Collection[str]) -> Saved:
    record = _read_record(checkpoint)
    if identity is not None:
        _check_identity(checkpoint, record["identity"], identity, newer_keys)
    return Saved(checkpoint, record["files"])


def _all(saved: Saved) -> dict[str, Any]:
    return {key: saved.read(key) for key in map(_key, saved.files)}


def _key(file: str) -> str:
    return file.removesuffix(".pt")


def clean(directory: Path) -> None:
    """Remove temporary directories of an interrupted ``save``."""
    for leftover in directory.glob(f".{_PREFIX}*.tmp"):
        shutil.rmtree(leftover)


def _step_name(step: int) -> str:
    return f"{_PREFIX}{step:08d}"


def _temporary_name(step: int) -> str:
    return f".{_step_name(step)}.tmp"


def _steps(directory: Path) -> list[Path]:
    return sorted(path for path in directory.glob(f"{_PREFIX}*") if path.is_dir()) if directory.is_dir() else []


class _Digest(io.RawIOBase):
    """A file object for ``torch.save`` that digests what it writes to a durable file."""

    def __init__(self, file: DurableFile) -> None:
        self._file = file
        self.sha256 = hashlib.sha256()
        self.size = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self._file.write(view)
        self.sha256.update(view)
        self.size += len(view)
        return len(view)


def _write(path: Path, value: Any) -> dict[str, Any]:
    with DurableFile(path) as file:
        digest = _Digest(file)
        torch.save(value, cast("io.BytesIO", digest))
    return {"size": digest.size, "sha256": digest.sha256.hexdigest()}


def _read_record(checkpoint: Path) -> dict[str, Any]:
    path = checkpoint / RECORD
    try:
        record = json.loads(path.read_bytes())
        assert isinstance(record["files"], dict)
        assert isinstance(record["identity"], dict)
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        raise DamageError(f"checkpoint file '{path}' is missing or unreadable: {error}", _hint(checkpoint)) from error
    return cast("dict[str, Any]", record)


def _read(path: Path, entry: Mapping[str, Any]) -> Any:
    try:
        with path.open("rb") as file:
            size, sha256 = path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DamageError(f"checkpoint file '{path}' is missing or unreadable: {error}", _hint(path.parent)) from error
    if (size, sha256) != (entry["size"], entry["sha256"]):
        raise DamageError(
            f"checkpoint file '{path}' is damaged: {size} bytes with SHA-256 {sha256[:12]}…, expected {entry['size']} "
            f"bytes with {entry['sha256'][:12]}…",
            _hint(path.parent),
        )
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise DamageError(f"checkpoint file '{path}' cannot be decoded: {error}", _hint(path.parent)) from error


def identity_changes(
    saved: Mapping[str, Any], wanted: Mapping[str, Any], newer_keys: Collection[str] = ()
) -> dict[str, tuple[Any, Any]]:
    """Differences as {key: (then, now)}, with dotted keys for nested tables; ``newer_keys`` as in ``load_latest``."""
    wanted = {
        key: value for key, value in json.loads(json.dumps(wanted)).items() if key in saved or key not in newer_keys
    }
    return dict(_changes(saved, wanted))


def _changes(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> Iterator[tuple[str, tuple[Any, Any]]]:
    for key in sorted({*saved, *wanted}):
        then, now = saved.get(key), wanted.get(key)
        if isinstance(then, dict) and isinstance(now, dict):
            yield from ((f"{key}.{inner}", change) for inner, change in _changes(then, now))
        elif then != now:
            yield key, (then, now)


def _check_identity(
    checkpoint: Path, saved: Mapping[str, Any], wanted: Mapping[str, Any], newer_keys: Collection[str]
) -> None:
    differing = identity_changes(saved, wanted, newer_keys)
    if differing:
        changes = "; ".join(f"{key}: {_short(then)} then, {_short(now)} now" for key, (then, now) in differing.items())
        message = f"checkpoint '{checkpoint}' belongs to another training: {changes}"
        raise MismatchError(message, f"Restore these settings, or start again: rm -r '{checkpoint.parent}'")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "…"


def _hint(checkpoint: Path) -> str:
    return (
        f"Remove it (rm -r '{checkpoint}') and run the same command again: training starts from the previous "
        "checkpoint, or from the beginning."
    )
