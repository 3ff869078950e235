"""The weights of the best epoch, kept apart from the checkpoints and durable at every moment.

A checkpoint names the best epoch; the weights of that epoch must be there as long as the checkpoint may be resumed
from. So the weights of a better epoch are written beside those of the former best, and the former ones are removed only
when a checkpoint names the new epoch. A run that is killed between the two evaluates the epoch again. Where it then
scores worse, which happens on devices whose sums are not repeatable, the former best is still there.
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
    """``directory`` holds the weights, one checkpoint per epoch.

    Epochs count from 0. ``place`` holds it and all else of the training.
    """

    directory: Path
    place: Path
    identity: Mapping[str, Any]

    def keep(self, epoch: int, state: Mapping[str, Any]) -> None:
        """Write ``state`` as that of ``epoch``, durably; what was kept before stays. Raises StorageError."""
        checkpoints.save(self.directory, state, step=epoch + 1, identity=self.identity, keep=None)

    def settle(self, epoch: int) -> None:
        """Remove all but ``epoch``, which the newest checkpoint names as the best."""
        checkpoints.keep_only(self.directory, epoch + 1)

    def load(self, epoch: int) -> dict[str, Any]:
        """What ``keep`` was given for ``epoch``.

        DamageError where it is gone or damaged: then only a new training cures it.
        """
        try:
            return checkpoints.load_step(self.directory, epoch + 1)
        except DamageError as error:
            hint = f"The weights of the best epoch are lost. Train again from the start: rm -r '{self.place}', then the same command."
            raise DamageError(error.message, hint) from error
