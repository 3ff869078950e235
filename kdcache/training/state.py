"""What a checkpoint of a training holds.

One process writes whole files: the model, the optimizer with its moments in the order of its parameters, the averaged
weights, and the rest. Processes that hold different modules write pieces, in which moments and averages stand by the
names of parameters in the whole model. Either is read by one process that holds everything, and by several that do not.

What the processes count beside the training goes on from the checkpoint too, whatever their number is then.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from kdcache.training.seeding import restore_own, rng_state

if TYPE_CHECKING:
    from torch import nn

    from kdcache.training.checkpoints import Saved
    from kdcache.training.optim import AveragedWeights, WarmupSchedule
    from kdcache.training.processes import Processes
    from kdcache.training.step_log import Place

Named = dict[str, dict[str, Any]]  # model, optimizer, average -> name in the whole model -> value


class Counts(Protocol):
    """What a process counts during a training, and what does not change the training."""

    def counted(self) -> Any:
        """The counts of this process so far, in types that ``torch.load(weights_only=True)`` accepts."""
        ...

    def count_on(self, counted: Any) -> None:
        """Add what this process, or another one, had counted until a checkpoint."""
        ...


@dataclass(frozen=True)
class TrainingState:
    """The state of this process. ``names``: of a parameter here -> in the whole model, where it is another one."""

    model: nn.Module
    optimizer: Any
    schedule: WarmupSchedule
    scaler: Any
    average: AveragedWeights | None
    place: Place
    names: Mapping[str, str] = field(default_factory=dict)
    counts: Counts | None = None

    def own(self) -> tuple[dict[str, Any], Any]:
        """What each process has of its own: the state of its random generators, and its counts."""
        return rng_state(), None if self.counts is None else self.counts.counted()

    def whole(self, owns: Sequence[tuple[dict[str, Any], Any]]) -> dict[str, Any]:
        """As one process writes it. ``owns``: ``own`` of each process."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rest": self.rest(owns),
        }
        return state if self.average is None else {**state, "average": self.average.state_dict()}

    def rest(self, owns: Sequence[tuple[dict[str, Any], Any]]) -> dict[str, Any]:
        """What does not belong to parameters. ``owns``: ``own`` of each process."""
        generators = [generator for generator, _ in owns]
        rest: dict[str, Any] = {
            "place": dict(vars(self.place)),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict() if self.scaler else None,
            "rng": generators[0],
        }
        if self.counts is not None:
            rest["counts"] = [counted for _, counted in owns]
        return rest if len(generators) == 1 else {**rest, "processes": generators}

    def piece(self) -> Named:
        """What belongs to the parameters of this process."""
        states = self.optimizer.state_dict()["state"]
        average = {} if self.average is None else self.average.state_dict()
        return {
            "model": self.model.state_dict(),
            "optimizer": {name: states[number] for number, name in enumerate(self._order()) if number in states},
            "average": {self.names.get(name, name): tensor for name, tensor in average.items()},
        }

    def load(self, saved: Saved, seed: int, processes: Processes, whole_order: Sequence[str] | None = None) -> str:
        """Continue from ``saved``; a line about random numbers, or an empty one.

        ``whole_order``: the names of all parameters in the order of the optimizer of one process that holds the whole
        model; None where this process does.
        """
        rest = saved.read("rest")
        if saved.pieces or whole_order is not None:
            found = saved.read_pieces(self._wanted(), processes.rank) if saved.pieces else _whole(saved, whole_order)
            self._load_named(found)
            rest["schedule"]["peaks"] = self.schedule.state_dict()["peaks"]  # of the parameter groups here
        else:
            self.model.load_state_dict(saved.read("model"))
            self.optimizer.load_state_dict(saved.read("optimizer"))
            if self.average is not None:
                self.average.load_state_dict(saved.read("average"))
        self.schedule.load_state_dict(rest["schedule"])
        if self.scaler and rest["scaler"]:
            self.scaler.load_state_dict(rest["scaler"])
        vars(self.place).update(rest["place"])
        if self.counts is not None:
            for counted in rest.get("counts", ())[processes.rank :: processes.world]:  # 0.1.0 wrote none
                self.counts.count_on(counted)
        return restore_own(rest, seed, processes, self.place.step)

    def _order(self) -> list[str]:
        """The names of the optimizer's parameters in the whole model, in its order."""
        names = {id(parameter): self.names.get(name, name) for name, parameter in self.model.named_parameters()}
        return [names[id(parameter)] for group in self.optimizer.param_groups for parameter in group["params"]]

    def _wanted(self) -> dict[str, set[str]]:
        order = set(self._order())
        return {"model": set(self.model.state_dict()), "optimizer": order, "average": order}

    def _load_named(self, found: Named) -> None:
        self.model.load_state_dict({name: found["model"][name] for name in self.model.state_dict()})
        moments = {number: found["optimizer"].get(name) for number, name in enumerate(self._order())}
        state = {number: values for number, values in moments.items() if values is not None}  # others had no gradient
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})
        if self.average is not None:
            own = self.average.state_dict()
            self.average.load_state_dict({name: found["average"][self.names.get(name, name)] for name in own})


def _whole(saved: Saved, order: Sequence[str] | None) -> Named:
    """The files of a process that held the whole model, by name."""
    assert order is not None
    moments = saved.read("optimizer")["state"]
    return {
        "model": saved.read("model"),
        "optimizer": {name: moments[number] for number, name in enumerate(order) if number in moments},
        "average": saved.read("average") if "average" in saved.keys else {},
    }
