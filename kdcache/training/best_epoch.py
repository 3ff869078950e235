"""The weights of the best evaluation, stored beside the checkpoints and durable at every moment.

Evaluations are named by a mark: the epoch (from 0) or, with ``evaluate_steps``, the optimizer step (from 0).

A checkpoint names the best epoch, so the weights of that epoch must exist as long as the checkpoint can be resumed.
The weights of a better epoch are written beside the previous best, which is removed only after a checkpoint names the
new epoch. A run that is killed in between evaluates the epoch again. If it then scores worse, as on devices with
nondeterministic sums, the previous best still exists.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdcache.errors import DamageError
from kdcache.training import checkpoints


@dataclass(frozen=True)
class BestEpoch:
    """``directory`` holds one checkpoint per kept mark; ``place`` is the directory of the whole training."""

    directory: Path
    place: Path
    identity: Mapping[str, Any]

    def keep(self, mark: int, state: Mapping[str, Any]) -> None:
        """Write ``state`` under ``mark`` durably; earlier ones stay. Raises StorageError."""
        checkpoints.save(self.directory, state, step=mark + 1, identity=self.identity, keep=None)

    def settle(self, mark: int) -> None:
        """Remove all but ``mark``, the best one in the newest checkpoint."""
        checkpoints.keep_only(self.directory, mark + 1)

    def load(self, mark: int) -> dict[str, Any]:
        """The state kept under ``mark``; DamageError if it is missing or damaged."""
        try:
            return checkpoints.load_step(self.directory, mark + 1)
        except DamageError as error:
            hint = f"The weights of the best epoch are lost. Remove '{self.place}' and run the same command again."
            raise DamageError(error.message, hint) from error
