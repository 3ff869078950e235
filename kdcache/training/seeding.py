"""Random number generators: seeded together, saved and restored together with a checkpoint.

Dropout draws from torch's generator, so an exact resume within an epoch needs its state, not only the seed.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kdcache.training.processes import Processes


def own_seed(seed: int, processes: Processes, step: int | None = None) -> int:
    """The seed of this process's generators: ``seed`` itself for one process that starts at the beginning.

    ``step``: where a training continues with another number of processes.
    """
    if processes.world == 1 and step is None:
        return seed
    entropy = [seed, processes.rank] if step is None else [seed, processes.rank, step]
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]) % 2**63


def seed_everything(seed: int) -> None:
    """Seed python, numpy and torch (all devices)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def rng_state() -> dict[str, Any]:
    """The states of all generators, in types that ``torch.load(weights_only=True)`` accepts."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "python": [version, list(words), gauss],
        "numpy": [
            str(name),
            torch.from_numpy(np.asarray(keys, dtype=np.int64)),
            int(position),
            int(has_gauss),
            float(cached),
        ],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def restore_rng_state(state: dict[str, Any]) -> None:
    """Restore the states of ``rng_state``; of GPUs, those that are visible now and were visible then."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        for device, saved in zip(range(torch.cuda.device_count()), state["cuda"], strict=False):
            torch.cuda.set_rng_state(saved, device)


def restore_own(saved: Mapping[str, Any], seed: int, processes: Processes, step: int) -> str:
    """The states of this process from ``rng`` or ``processes`` of a checkpoint of ``step``.

    Where it was written by another number of processes, new states and a line that says so.
    """
    states = saved.get("processes") or [saved["rng"]]
    if len(states) == processes.world:
        restore_rng_state(states[processes.rank])
        return ""
    seed_everything(own_seed(seed, processes, step))
    return (
        f"the number of processes is {processes.world} now, and was {len(states)} when the checkpoint was written: the "
        "random numbers of dropout start anew"
    )
