"""Which of several processes holds which teacher: ``cofinetune.placement``.

With ``"teacher"``, a process loads, trains, evaluates and saves its own teachers alone, on whole batches. The shared
head is all that the processes have in common, so that no machine needs memory for all teachers. What every process must
know of a teacher that another one holds is exchanged once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from kdcache.errors import RecipeError
from kdcache.progress import counted
from kdcache.teachers.head import SharedHead
from kdcache.teachers.sources import under_shared_head
from kdcache.teachers.teacher import count_parameters
from kdcache.training.processes import current, start
from kdcache.training.seeding import seed_everything

if TYPE_CHECKING:
    from kdcache.recipe import TeacherSection
    from kdcache.recipe.training import CofinetuneSection
    from kdcache.teachers.sources import Source
    from kdcache.teachers.teacher import TeacherModel
    from kdcache.training.processes import Processes


class Known(NamedTuple):
    """What all processes know of a teacher."""

    section: TeacherSection
    width: int
    note: str


@dataclass(frozen=True)
class Opened:
    """The teachers of a training: ``sources`` that this process holds, and ``known`` of all, in the recipe's order.

    ``apart``: processes hold different teachers.
    """

    sources: Mapping[str, Source]
    known: Mapping[str, Known]
    apart: bool = False

    @property
    def trained(self) -> dict[str, Known]:
        """Those under the shared head."""
        return {name: known for name, known in self.known.items() if known.section.head == "shared"}

    @property
    def own(self) -> dict[str, Source]:
        """Those under the shared head that this process holds."""
        return {name: self.sources[name] for name in self.trained if name in self.sources}

    def notes(self) -> Iterator[str]:
        """Which process holds which teachers, and what is to be said of each teacher."""
        if self.apart:
            held = (
                f"process {rank} has {', '.join(names)}"
                for rank, names in enumerate(current().gathered([*self.sources]))
            )
            yield f"whole batches for each teacher: {'; '.join(held)}"
        yield from (known.note for known in self.known.values() if known.note)

    def identities(self) -> dict[str, dict[str, Any]]:
        """The inputs of the training that belong to each teacher. With ``apart``, all processes call it together."""
        mine = {name: source.identity() for name, source in self.sources.items()}
        every = united(mine) if self.apart else mine
        return {name: every[name] for name in self.known}


def open_teachers(
    sections: Sequence[TeacherSection], settings: CofinetuneSection, load: Callable[[TeacherSection], Source]
) -> Opened:
    """Load the teachers of ``sections`` that this process holds, with ``load``.

    Raises what ``load`` raises; RecipeError if there are more processes than teachers to train, each held by one.
    """
    processes = current()
    ranks = place(sections, settings.placement, processes)
    own = [section for section in sections if ranks is None or ranks[section.name] == processes.rank]
    sources = {section.name: load(section) for section in own}
    known = {name: Known(source.section, source.width, source.note) for name, source in sources.items()}
    if ranks is None:
        return Opened(sources, known)
    every = united(known)
    return Opened(sources, {section.name: every[section.name] for section in sections}, apart=True)


def new_models(
    teachers: Opened, settings: CofinetuneSection, classes: int
) -> tuple[SharedHead | None, dict[str, TeacherModel]]:
    """A new shared head over the encoders to train; new weights are drawn from the recipe's seed, in its order."""
    widths = {name: known.width for name, known in teachers.trained.items()}
    if not widths:
        return None, {}
    seed_everything(settings.seed)
    head = SharedHead(settings.width or max(widths.values()), classes, settings.pooling)
    return head, under_shared_head(teachers.own, head, widths)


def place(sections: Sequence[TeacherSection], placement: str | None, processes: Processes) -> dict[str, int] | None:
    """The process of each teacher, by name; None where every process holds all of them.

    The largest teacher goes first, each to the process with the fewest parameters so far.
    """
    if processes.world == 1:
        return None
    start(processes, {"cofinetune.placement": placement or "rows"}, 0, ())
    if placement != "teacher":
        return None
    trained = sum(section.head == "shared" for section in sections)
    if trained < processes.world:
        raise RecipeError(
            f"cofinetune.placement is 'teacher', and there are {processes.world} processes for "
            f"{counted(trained, 'teacher')} to train",
            f"Start at most {max(trained, 1)}, or let them share rows: --set cofinetune.placement=rows",
        )
    return processes.from_first(lambda: _balanced(sections, processes.world))


def _balanced(sections: Sequence[TeacherSection], world: int) -> dict[str, int]:
    sizes = {
        section.name: count_parameters(section.model, section.revision, trust_remote_code=section.trust_remote_code)
        for section in sections
    }
    loads, ranks = [0] * world, dict.fromkeys(sizes, 0)
    # those to train first, so that every process has one
    for section in sorted(sections, key=lambda section: (section.head == "own", -sizes[section.name])):
        rank = ranks[section.name] = loads.index(min(loads))
        loads[rank] += sizes[section.name]
    return ranks


def united(own: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of all processes, which call it together."""
    return {name: value for one in current().gathered(dict(own)) for name, value in one.items()}
