"""The weights of the best evaluation, stored beside the checkpoints and durable at every moment.

Evaluations are named by a mark: the epoch (from 0) or, with ``evaluate_steps``, the optimizer step (from 0).

A checkpoint names the best epoch, so the weights of that epoch must exist as long as the checkpoint can be resumed.
The weights of a better epoch are written beside the previous best, which is removed only after a checkpoint names the
new epoch. A run that is killed in between evaluates the epoch again. If it then scores worse, as on devices with
nondeterministic sums, the previous best still exists.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdcache.errors import DamageError
from kdcache.training import checkpoints

if TYPE_CHECKING:
    from kdcache.training.processes import Processes


@dataclass(frozen=True)
class BestEpoch:
    """``directory`` holds one checkpoint per kept mark; ``place`` is the directory of the whole training."""

    directory: Path
    place: Path
    identity: Mapping[str, Any]

    def keep(self, mark: int, state: Mapping[str, Any]) -> None:
        """Write ``state`` under ``mark`` durably; earlier ones stay. Raises StorageError."""
        checkpoints.save(self.directory, state, step=mark + 1, identity=self.identity, keep=None)

    def keep_pieces(self, mark: int, state: Mapping[str, Any], piece: Mapping[str, Any], processes: Processes) -> None:
        """``keep`` by all processes together: each writes its ``piece``. Raises StorageError, LostProcessError."""
        checkpoints.save_pieces(
            self.directory, state, piece, step=mark + 1, identity=self.identity, keep=None, processes=processes
        )

    def settle(self, mark: int) -> None:
        """Remove all but ``mark``, the best one in the newest checkpoint."""
        checkpoints.keep_only(self.directory, mark + 1)

    def load(self, mark: int) -> dict[str, Any]:
        """The state kept under ``mark`` by one process; DamageError if it is missing or damaged."""
        with self._explained():
            return checkpoints.load_step(self.directory, mark + 1)

    def model(self, mark: int, names: Collection[str], rank: int) -> Mapping[str, Any]:
        """The tensors ``names`` of the ``model`` kept under ``mark``, in pieces or whole; DamageError as ``load``.

        ``rank``: of this process, whose own piece is read first.
        """
        with self._explained():
            saved = checkpoints.open_step(self.directory, mark + 1)
            whole = saved.read_pieces({"model": names}, rank) if saved.pieces else {"model": saved.read("model")}
            return {name: whole["model"][name] for name in names}

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except DamageError as error:
            hint = f"The weights of the best epoch are lost. Remove '{self.place}' and run the same command again."
            raise DamageError(error.message, hint) from error
