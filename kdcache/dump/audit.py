"""The audit: live teachers against a cache, on sampled rows.

    kdcache audit CACHE --teachers DIR

Digests say that a cache is as it was written; they do not say that it was written rightly. Here each teacher runs again
on some texts, and spans, logits and every stored layer are compared with what it says. Found are a cache of other
weights, spans or states that are shifted, a layer that is another one, and a teacher whose outputs depend on padding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kdcache.cache.spec import needs_tokens
from kdcache.codecs.token_selection import select_tokens
from kdcache.data.encoding import EncodedTexts, encode, padding_id
from kdcache.dump.engine import TextBatches
from kdcache.dump.tolerance import (
    Comparison,
    Tolerance,
    compare,
    logits_change,
    looks_like,
    most_noise,
    relative_change,
    tolerance,
)
from kdcache.errors import MismatchError
from kdcache.runs import home
from kdcache.teachers.backends import open_backend
from kdcache.teachers.bundle import load_teacher, teacher_names

if TYPE_CHECKING:
    from kdcache.cache.reader import Cache
    from kdcache.cache.spec import TeacherSpec
    from kdcache.cache.tokens import Tokens
    from kdcache.codecs.base import TokenSelection
    from kdcache.progress import Progress
    from kdcache.teachers.backends import TeacherBackend
    from kdcache.teachers.teacher import Teacher


_CALIBRATION_TEXTS = 16
_NAMED = 10  # rows of a finding


@dataclass(frozen=True)
class Row:
    """A text that differs.

    Its id in hex, where it lies, and how far off it is as a multiple of what is allowed, if that is a number.
    """

    text_id: str
    part: str
    row: int
    times_allowed: float | None = None


@dataclass(frozen=True)
class Finding:
    """What is wrong with one component of a teacher, its worst rows first.

    ``component``: ``weights``, ``padding`` (its outputs depend on it), ``tokens``, ``logits`` or ``layer N``.
    """

    teacher: str
    component: str
    message: str
    rows: tuple[Row, ...] = ()


@dataclass
class TeacherAudit:
    """What was compared of one teacher. ``worst``: per component the largest error as a multiple of what is allowed."""

    teacher: str
    texts: int = 0
    tolerance: Tolerance | None = None
    worst: dict[str, float] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)


@dataclass(frozen=True)
class AuditReport:
    """``not_audited``: teachers of the cache that are not in the directory."""

    cache: Path
    teachers: tuple[TeacherAudit, ...]
    not_audited: tuple[str, ...]

    @property
    def findings(self) -> list[Finding]:
        return [finding for teacher in self.teachers for finding in teacher.findings]

    def as_dict(self) -> dict[str, Any]:
        """JSON-able; what ``--json`` prints."""
        teachers = [asdict(teacher) for teacher in self.teachers]
        return {
            "cache": str(self.cache), "agrees": not self.findings, "teachers": teachers, "not_audited": list(self.not_audited),
        }  # fmt: skip


def audit(
    cache: Cache,
    teachers_dir: Path,
    *,
    rows: int = 256,
    seed: int = 0,
    trust_remote_code: bool = False,
    progress: Progress,
) -> AuditReport:
    """Compare ``rows`` texts of the cache with what the teachers in ``teachers_dir`` say of them now.

    ``trust_remote_code`` allows the teachers to run Python code that lies in their directories. Raises MismatchError
    where the cache has no texts, or none of its teachers is there; what the backends raise.
    """
    if not cache.has_text:
        raise MismatchError(
            f"cache '{cache.path}' is without its texts: there is nothing to run the teachers on",
            "Audit the copy that has them, or pull it with its texts.",
        )
    known = teacher_names(teachers_dir)
    there = [name for name in cache.teachers if name in known]
    if not there:
        raise MismatchError(
            f"none of the teachers of cache '{cache.path}' ({', '.join(cache.teachers)}) is in '{teachers_dir}'",
            "Name the directory that the cache was dumped from with --teachers.",
        )
    chosen = choose_rows(cache, rows, seed)
    teachers = (
        load_teacher(teachers_dir, name, trust_remote_code=trust_remote_code) for name in there
    )  # one at a time
    audits = tuple(_audit_teacher(cache, teacher, chosen, progress) for teacher in teachers)
    return AuditReport(cache.path, audits, tuple(name for name in cache.teachers if name not in there))


def _audit_teacher(cache: Cache, teacher: Teacher, chosen: Sequence[PartRows], progress: Progress) -> TeacherAudit:
    spec = cache.teachers[teacher.name]
    found = TeacherAudit(teacher.name, findings=_other_weights(spec, teacher))
    if (teacher.depth, teacher.width) != (spec.depth, spec.width):
        return found
    backend = open_backend(spec.backend, teacher, tuple(spec.layers), precision=spec.precision, work_dir=home())
    try:
        progress.start(f"audit {teacher.name}", sum(len(part) for part in chosen), "texts")
        lives = [LivePart(teacher, spec, part) for part in chosen]
        noise = _padding_noise(lives, backend)
        found.tolerance = tolerance(spec.precision, *noise)
        found.findings += _other_when_padded(spec, *noise)
        compared: dict[str, list[_Compared]] = {}
        for live in lives:
            for one in _compared(cache, live, backend, found.tolerance):
                compared.setdefault(one.component, []).append(one)
            found.texts += len(live.chosen)
            progress.advance(len(live.chosen))
        progress.finish()
        for component, pieces in compared.items():
            found.worst[component] = round(max(one.worst for one in pieces), 3)
            finding = _finding(teacher.name, component, pieces, backend)
            found.findings += [] if finding is None else [finding]
    finally:
        backend.close()
        teacher.model.to("meta")
    return found


def _other_weights(spec: TeacherSpec, teacher: Teacher) -> list[Finding]:
    stored, live = asdict(spec.fingerprints), asdict(teacher.fingerprints)
    differing = [name for name in stored if stored[name] != live[name]]
    told = ", ".join(f"{name} ({stored[name][:12]} in the cache, {live[name][:12]} there)" for name in differing)
    return [Finding(spec.name, "weights", f"the teacher there is another one: {told}")] if differing else []


def _padding_noise(lives: Sequence[LivePart], backend: TeacherBackend) -> tuple[float, float]:
    """What another padding changes in hidden states and logits, relatively: some texts in one batch, and each alone."""
    live = next((one for one in lives if one.chosen.full), lives[0])
    layers = tuple(live.spec.layers) if live.chosen.full else ()
    together = live.gather(backend, layers, _CALIBRATION_TEXTS, 1 << 30)
    alone = live.gather(backend, layers, _CALIBRATION_TEXTS, 1)
    hidden = max((relative_change(together[1][layer], alone[1][layer]) for layer in layers), default=0.0)
    return hidden, float(logits_change(together[0], alone[0]).max(initial=0.0))


def _other_when_padded(spec: TeacherSpec, hidden: float, logits: float) -> list[Finding]:
    """More than rounding is no noise: what such a teacher says of a text depends on the texts beside it."""
    most = most_noise(spec.precision)
    changed = [
        f"its {what} by {noise:.1%}"
        for what, noise in (("hidden states", hidden), ("logits", logits))
        if not noise <= most
    ]
    if not changed:
        return []
    message = f"padding a text changes {' and '.join(changed)}; in {spec.precision} at most {most:.0%} is rounding"
    return [Finding(spec.name, "padding", message)]


@dataclass(frozen=True)
class _Compared:
    """One component of the rows of one part.

    ``times``: per text the error as a multiple of what is allowed; inf: it differs.
    """

    component: str
    live: LivePart
    times: np.ndarray
    layer: int | None = None
    comparison: Comparison | None = None

    @property
    def agrees(self) -> bool:
        """Whether no text is off, and the texts together are not."""
        together = self.comparison is None or (self.comparison.excess <= 1.0 and self.comparison.fits)
        return together and not (self.times > 1.0).any()

    @property
    def worst(self) -> float:
        """The largest of the texts' errors and of the error of all together, as multiples of what is allowed."""
        return max(float(self.times.max(initial=0.0)), 0.0 if self.comparison is None else self.comparison.excess)


def _compared(cache: Cache, live: LivePart, backend: TeacherBackend, allowed: Tolerance) -> list[_Compared]:
    """Every component of the rows of one part beside what is stored of them."""
    spec, part, rows = live.spec, live.chosen.part, live.chosen.rows
    layers = spec.layers if live.chosen.full else {}
    logits, hidden = live.gather(backend, tuple(layers))
    change = logits_change(logits, cache.outputs(spec.name, part).logits[rows])
    found = [_Compared("logits", live, change / allowed.logits)]
    places: tuple[np.ndarray, np.ndarray] | None = None
    if needs_tokens(layers):
        stored = cache.tokens(spec.name, part)
        wrong = np.zeros(len(rows))
        wrong[live.wrong_tokens(stored)] = np.inf
        found.append(_Compared("tokens", live, wrong))
        places = live.token_places(stored)
    for layer, form in layers.items():
        at = (np.arange(len(rows)), rows) if form.per_text else places
        if at is None:
            # the texts are cut otherwise now: there are no rows to compare, and the finding about tokens says so
            continue
        block = cache.hidden(spec.name, part, layer).take(at[1])
        states = live.selected(hidden[layer], form.tokens)
        comparison = compare(states, block, form, cache.basis(spec.name, layer), allowed.hidden)
        times = np.zeros(len(rows))
        np.maximum.at(times, at[0], comparison.error / np.maximum(comparison.allowed, 1e-12))
        found.append(_Compared(f"layer {layer}", live, times, layer, comparison))
    return found


def _finding(teacher: str, component: str, pieces: Sequence[_Compared], backend: TeacherBackend) -> Finding | None:
    """What is to be said of a component; None where all of it is as the teacher says."""
    if all(one.agrees for one in pieces):
        return None
    every = [(float(one.times[own]), one, own) for one in pieces for own in range(len(one.times))]
    worst = sorted(every, key=lambda item: -item[0])[:_NAMED]
    off = sum(times > 1.0 for times, _, _ in every)
    if component == "tokens":
        message = f"{off} of {len(every)} texts have other spans or roles than the tokenizer gives"
    elif off:
        message = f"{off} of {len(every)} texts differ from what the teacher says, by up to {worst[0][0]:.3g} times what is allowed"
    else:
        message = (
            f"the {len(every)} texts differ from what the teacher says by more than rounding explains, taken together"
        )
    first = next(one for one in pieces if not one.agrees)
    if first.layer is not None and first.comparison is not None:
        message += looks_like(first.layer, first.comparison, _every_layer(first, backend))
    return Finding(
        teacher, component, message, tuple(_row(one, own) for times, one, own in worst if times > 1.0 or not off)
    )


def _every_layer(one: _Compared, backend: TeacherBackend) -> Mapping[int, np.ndarray]:
    spec = one.live.spec
    assert one.layer is not None
    hidden = one.live.gather(backend, range(spec.depth + 1))[1]
    return {layer: one.live.selected(states, spec.layers[one.layer].tokens) for layer, states in hidden.items()}


def _row(one: _Compared, own: int) -> Row:
    times = float(one.times[own])
    chosen = one.live.chosen
    return Row(
        bytes(chosen.text_ids[own]).hex(),
        chosen.part,
        int(chosen.rows[own]),
        None if np.isinf(times) else round(times, 2),
    )


TOKENS_PER_BATCH = 4096
_PARTS = 8  # that rows are drawn from, at most: a part's layer is read whole


@dataclass(frozen=True)
class PartRows:
    """Rows of one part, ascending, with their ids and texts."""

    part: str
    full: bool
    rows: np.ndarray
    text_ids: np.ndarray
    texts: list[tuple[str, ...]]

    def __len__(self) -> int:
        return len(self.rows)


def choose_rows(cache: Cache, rows: int, seed: int) -> list[PartRows]:
    """Seeded rows of at most ``_PARTS`` parts, from each in proportion to its texts."""
    parts = [cache.parts[place] for place in np.sort(_shuffled(len(cache.parts), seed)[:_PARTS]).tolist()]
    total = sum(part.texts for part in parts)
    chosen = []
    for number, part in enumerate(parts, start=1):
        count = min(part.texts, max(1, round(rows * part.texts / total)))
        places = np.sort(_shuffled(part.texts, seed + number)[:count])
        texts, ids = cache.texts(part.name), cache.text_ids(part.name)
        chosen.append(
            PartRows(part.name, part.scope == "full", places, ids[places], [texts[one] for one in places.tolist()])
        )
    return chosen


def _shuffled(count: int, seed: int) -> np.ndarray:
    return np.argsort(np.random.PCG64(seed).random_raw(count), kind="stable")


class LivePart:
    """The chosen rows of a part, encoded for one teacher and ready to be run."""

    def __init__(self, teacher: Teacher, spec: TeacherSpec, chosen: PartRows) -> None:
        self.spec, self.chosen = spec, chosen
        self.encoded: EncodedTexts = encode(teacher.tokenizer, chosen.texts, spec.max_length)
        self._pad = padding_id(teacher.tokenizer)

    def gather(
        self,
        backend: TeacherBackend,
        layers: Sequence[int],
        count: int | None = None,
        tokens_per_batch: int = TOKENS_PER_BATCH,
    ) -> tuple[np.ndarray, dict[int, np.ndarray]]:
        """Logits [texts, classes] and packed hidden states [tokens, width] per layer, of the first ``count`` texts or
        all.
        """
        rows = np.arange(len(self.chosen))[:count]
        encoded = self.encoded.select(rows)
        batches = TextBatches(encoded, self.chosen.text_ids[rows], self._pad, tokens_per_batch, self.spec.name)
        logits = np.empty((len(rows), *self.spec.target.shape), np.float32)
        hidden = {layer: np.empty((int(encoded.offsets[-1]), self.spec.width), np.float32) for layer in layers}
        for places, output in batches.run(backend, tuple(layers)):
            logits[places] = output.logits.cpu().numpy()
            for layer, whole in hidden.items():
                whole[batches.token_places(places)] = output.hidden[layer].cpu().numpy()
        return logits, hidden

    def selected(self, hidden: np.ndarray, selection: TokenSelection) -> np.ndarray:
        """What a layer stored for ``selection`` holds of packed ``hidden`` [tokens, width]."""
        import torch

        found: np.ndarray = select_tokens(torch.from_numpy(hidden), self.encoded.lengths, selection).numpy()
        return found

    def wrong_tokens(self, stored: Tokens) -> list[int]:
        """Which of the rows have other spans, segments or roles in the cache than the tokenizer gives."""
        wrong = []
        for own, row in enumerate(self.chosen.rows.tolist()):
            here = slice(int(stored.offsets[row]), int(stored.offsets[row + 1]))
            now = slice(int(self.encoded.offsets[own]), int(self.encoded.offsets[own + 1]))
            columns = ("starts", "ends", "segments", "roles")
            if any(not np.array_equal(getattr(stored, one)[here], getattr(self.encoded, one)[now]) for one in columns):
                wrong.append(own)
        return wrong

    def token_places(self, stored: Tokens) -> tuple[np.ndarray, np.ndarray] | None:
        """For every token of the rows its text among them, and its place in the part.

        None where they have other lengths now.
        """
        lengths = stored.lengths[self.chosen.rows]
        if not np.array_equal(lengths, self.encoded.lengths):
            return None
        shifts = stored.offsets[self.chosen.rows] - self.encoded.offsets[:-1]
        return np.repeat(np.arange(len(lengths)), lengths), np.arange(int(lengths.sum())) + np.repeat(shifts, lengths)
