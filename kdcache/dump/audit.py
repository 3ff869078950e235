"""The audit: live teachers against a cache, on sampled rows.

    kdcache audit CACHE --teachers DIR

Digests prove that a cache is unchanged, not that it was written correctly. The audit runs each teacher again on some
texts and compares spans, logits and every stored layer. It finds other weights, shifted spans or states, another layer,
and a teacher whose outputs depend on padding. Rows are drawn from few parts, because a part's layer is read whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kdcache.cache.spec import check_same_task, differing, needs_tokens
from kdcache.codecs.token_selection import select_tokens
from kdcache.data.encoding import EncodedTexts, encode, padding_id
from kdcache.dump.engine import TextBatches
from kdcache.dump.live_folds import LiveFolds, open_folds
from kdcache.dump.tolerance import (
    Comparison,
    Tolerance,
    compare,
    logits_change,
    looks_like,
    max_noise,
    relative_change,
    tolerance,
)
from kdcache.errors import MismatchError
from kdcache.runs import home
from kdcache.teachers.backends import open_backend
from kdcache.teachers.bundle import load_teacher, read_bundle, teacher_names

if TYPE_CHECKING:
    from kdcache.cache.reader import Cache
    from kdcache.cache.spec import TeacherSpec
    from kdcache.cache.tokens import Tokens
    from kdcache.codecs.base import TokenSelection
    from kdcache.progress import Progress
    from kdcache.teachers.backends import TeacherBackend
    from kdcache.teachers.teacher import Teacher


_CALIBRATION_TEXTS = 16
_MAX_ROWS = 10  # that a finding names


@dataclass(frozen=True)
class Row:
    """A text that differs; ``times_allowed`` is its error in multiples of the tolerance, if it is a number."""

    text_id: str
    part: str
    row: int
    times_allowed: float | None = None


@dataclass(frozen=True)
class Finding:
    """A fault of one component of a teacher, its worst rows first.

    ``component``: ``weights``, ``padding`` (outputs depend on it), ``folds`` (a bundle was trained on the texts of its
    fold, or is not the cache's), ``tokens``, ``logits`` or ``layer N``.
    """

    teacher: str
    component: str
    message: str
    rows: tuple[Row, ...] = ()


@dataclass
class TeacherAudit:
    """The audit of one teacher. ``worst``: the largest error per component, in multiples of the tolerance."""

    teacher: str
    texts: int = 0
    tolerance: Tolerance | None = None
    worst: dict[str, float] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)


@dataclass(frozen=True)
class AuditReport:
    """The audit of a cache. ``not_audited``: teachers of the cache that are not in the directory."""

    cache: Path
    teachers: tuple[TeacherAudit, ...]
    not_audited: tuple[str, ...]

    @property
    def findings(self) -> list[Finding]:
        return [finding for teacher in self.teachers for finding in teacher.findings]

    def as_dict(self) -> dict[str, Any]:
        """The document that ``--json`` prints."""
        teachers = [asdict(teacher) for teacher in self.teachers]
        return {
            "cache": str(self.cache),
            "agrees": not self.findings,
            "teachers": teachers,
            "not_audited": list(self.not_audited),
        }


def audit(
    cache: Cache,
    teachers_dir: Path,
    *,
    rows: int = 256,
    seed: int = 0,
    trust_remote_code: bool = False,
    progress: Progress,
) -> AuditReport:
    """Compare ``rows`` texts of the cache with the present outputs of the teachers in ``teachers_dir``.

    ``trust_remote_code`` allows the teachers to run Python code from their directories. Raises MismatchError if the
    cache has no texts, none of its teachers is in the directory, or they have other classes, and the backends' errors.
    """
    if not cache.has_text:
        raise MismatchError(
            f"cache '{cache.path}' does not store its texts, which the teachers need",
            "Audit the copy that has them, or pull it with its texts.",
        )
    known = teacher_names(teachers_dir)
    there = [name for name in cache.teachers if name in known]
    if not there:
        raise MismatchError(
            f"none of the teachers of cache '{cache.path}' ({', '.join(cache.teachers)}) is in '{teachers_dir}'",
            "Name the directory that the cache was dumped from with --teachers.",
        )
    cure = "Audit with the teachers that the cache was dumped from: --teachers DIR"
    check_same_task(read_bundle(teachers_dir), cache.task, ("the teachers", "the cache"), cure, same_column_names=False)
    chosen = choose_rows(cache, rows, seed)
    audits = tuple(  # one teacher in memory at a time
        _audit_teacher(
            cache,
            open_folds(cache, teachers_dir, name, chosen, trusted=trust_remote_code),
            load_teacher(teachers_dir, name, trust_remote_code=trust_remote_code),
            chosen,
            progress,
        )
        for name in there
    )
    return AuditReport(cache.path, audits, tuple(name for name in cache.teachers if name not in there))


def _audit_teacher(
    cache: Cache, folds: LiveFolds | None, teacher: Teacher, chosen: Sequence[PartRows], progress: Progress
) -> TeacherAudit:
    spec = cache.teachers[teacher.name]
    result = TeacherAudit(teacher.name, findings=_other_weights(spec, teacher))
    if folds is not None and folds.fault is not None:
        result.findings.append(Finding(spec.name, "folds", folds.fault))
    elif folds is not None and not folds.unchecked:
        result.worst["folds"] = 0.0
    if (teacher.depth, teacher.width) != (spec.depth, spec.width):
        return result
    backend = open_backend(spec.backend, teacher, tuple(spec.layers), precision=spec.uncompiled, work_dir=home())
    try:
        progress.start(f"audit {teacher.name}", sum(len(part) for part in chosen), "texts")
        parts = [LivePart(teacher, spec, part) for part in chosen]
        noise = _padding_noise(parts, backend)
        result.tolerance = tolerance(spec.precision, *noise)
        result.findings += _depends_on_padding(spec, *noise)
        compared: dict[str, list[_Compared]] = {}
        for live in parts:
            for piece in _compare_part(cache, live, backend, result.tolerance, folds):
                compared.setdefault(piece.component, []).append(piece)
            result.texts += len(live.chosen)
            progress.advance(len(live.chosen))
        progress.finish()
        for component, pieces in compared.items():
            result.worst[component] = round(max(piece.worst for piece in pieces), 3)
            finding = _finding(teacher.name, component, pieces, backend)
            result.findings += [] if finding is None else [finding]
    finally:
        backend.close()
        teacher.model.to("meta")
    return result


def _other_weights(spec: TeacherSpec, teacher: Teacher) -> list[Finding]:
    changes = differing(spec.fingerprints, teacher.fingerprints)
    return [Finding(spec.name, "weights", f"not the teacher of the cache: {changes}")] if changes else []


def _padding_noise(parts: Sequence[LivePart], backend: TeacherBackend) -> tuple[float, float]:
    """Largest relative change of hidden states and logits by padding: texts in one batch, against each alone."""
    live = next((part for part in parts if part.chosen.full), parts[0])
    layers = tuple(live.spec.layers) if live.chosen.full else ()
    together = live.gather(backend, layers, _CALIBRATION_TEXTS, 1 << 30)
    alone = live.gather(backend, layers, _CALIBRATION_TEXTS, 1)
    hidden = max((relative_change(together[1][layer], alone[1][layer]) for layer in layers), default=0.0)
    return hidden, float(logits_change(together[0], alone[0]).max(initial=0.0))


def _depends_on_padding(spec: TeacherSpec, hidden: float, logits: float) -> list[Finding]:
    """A finding if padding changes outputs by more than rounding: they then depend on the other texts of a batch."""
    most = max_noise(spec.precision)
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

    ``times``: the error per text in multiples of the tolerance; inf for values without a distance.
    """

    component: str
    live: LivePart
    times: np.ndarray
    layer: int | None = None
    comparison: Comparison | None = None

    @property
    def agrees(self) -> bool:
        """Whether every text and the mean of all are within the tolerance."""
        together = self.comparison is None or (self.comparison.excess <= 1.0 and self.comparison.fits)
        return together and not (self.times > 1.0).any()

    @property
    def worst(self) -> float:
        """The largest error of a text or of the mean of all, in multiples of the tolerance."""
        return max(float(self.times.max(initial=0.0)), 0.0 if self.comparison is None else self.comparison.excess)


def _compare_part(
    cache: Cache, live: LivePart, backend: TeacherBackend, allowed: Tolerance, folds: LiveFolds | None
) -> list[_Compared]:
    """Compare every component of the rows of one part with what is stored."""
    spec, part, rows = live.spec, live.chosen.part, live.chosen.rows
    layers = spec.layers if live.chosen.full else {}
    logits, hidden = live.gather(backend, tuple(layers))
    if folds is not None:
        logits = folds.instead_of(logits, live.chosen.text_ids)
    change = logits_change(logits, cache.outputs(spec.name, part).logits[rows])
    pieces = [_Compared("logits", live, change / allowed.logits)]
    places: tuple[np.ndarray, np.ndarray] | None = None
    if needs_tokens(layers):
        stored = cache.tokens(spec.name, part)
        wrong = np.zeros(len(rows))
        wrong[live.wrong_tokens(stored)] = np.inf
        pieces.append(_Compared("tokens", live, wrong))
        places = live.token_places(stored)
    for layer, stored_as in layers.items():
        at = (np.arange(len(rows)), rows) if stored_as.per_text else places
        if at is None:  # texts have other lengths now: no rows correspond, which is a finding about tokens
            continue
        block = cache.hidden(spec.name, part, layer).take(at[1])
        states = live.selected(hidden[layer], stored_as.tokens)
        comparison = compare(states, block, stored_as, cache.basis(spec.name, layer), allowed.hidden)
        times = np.zeros(len(rows))
        np.maximum.at(times, at[0], comparison.error / np.maximum(comparison.allowed, 1e-12))
        pieces.append(_Compared(f"layer {layer}", live, times, layer, comparison))
    return pieces


def _finding(teacher: str, component: str, pieces: Sequence[_Compared], backend: TeacherBackend) -> Finding | None:
    """The finding about a component; None if it agrees with the teacher."""
    if all(piece.agrees for piece in pieces):
        return None
    every = [(float(piece.times[row]), piece, row) for piece in pieces for row in range(len(piece.times))]
    worst = sorted(every, key=lambda item: -item[0])[:_MAX_ROWS]
    off = sum(times > 1.0 for times, _, _ in every)
    if component == "tokens":
        message = f"{off} of {len(every)} texts have other spans or roles than the tokenizer gives"
    elif off:
        message = f"{off} of {len(every)} texts differ from the teacher, by up to {worst[0][0]:.3g} times the tolerance"
    else:
        message = f"the mean difference of {len(every)} texts from the teacher is more than rounding explains"
    first = next(piece for piece in pieces if not piece.agrees)
    if first.layer is not None and first.comparison is not None:
        message += looks_like(first.layer, first.comparison, _every_layer(first, backend))
    return Finding(
        teacher, component, message, tuple(_row(piece, row) for times, piece, row in worst if times > 1.0 or not off)
    )


def _every_layer(piece: _Compared, backend: TeacherBackend) -> Mapping[int, np.ndarray]:
    spec = piece.live.spec
    assert piece.layer is not None
    hidden = piece.live.gather(backend, range(spec.depth + 1))[1]
    return {layer: piece.live.selected(states, spec.layers[piece.layer].tokens) for layer, states in hidden.items()}


def _row(piece: _Compared, row: int) -> Row:
    times, chosen = float(piece.times[row]), piece.live.chosen
    shown = None if np.isinf(times) else round(times, 2)
    return Row(bytes(chosen.text_ids[row]).hex(), chosen.part, int(chosen.rows[row]), shown)


TOKENS_PER_BATCH = 4096
_PARTS = 8  # from which rows are drawn, at most


@dataclass(frozen=True)
class PartRows:
    """Chosen rows of one part, ascending, with ids and texts."""

    part: str
    full: bool
    rows: np.ndarray
    text_ids: np.ndarray
    texts: list[tuple[str, ...]]

    def __len__(self) -> int:
        return len(self.rows)


def choose_rows(cache: Cache, rows: int, seed: int) -> list[PartRows]:
    """Seeded choice of rows from at most ``_PARTS`` parts, in proportion to their texts.

    At least half of the parts have hidden states, as far as the cache has as many.
    """
    order = _shuffled(len(cache.parts), seed).tolist()
    full = [place for place in order if cache.parts[place].scope == "full"][: _PARTS // 2]
    others = [place for place in order if place not in full][: _PARTS - len(full)]
    parts = [cache.parts[place] for place in sorted([*full, *others])]
    total = sum(part.texts for part in parts)
    chosen = []
    for number, part in enumerate(parts, start=1):
        count = min(part.texts, max(1, round(rows * part.texts / total)))
        places = np.sort(_shuffled(part.texts, seed + number)[:count])
        texts, ids = cache.texts(part.name), cache.text_ids(part.name)
        chosen.append(
            PartRows(part.name, part.scope == "full", places, ids[places], [texts[place] for place in places.tolist()])
        )
    return chosen


def _shuffled(count: int, seed: int) -> np.ndarray:
    return np.argsort(np.random.PCG64(seed).random_raw(count), kind="stable")


class LivePart:
    """The chosen rows of a part in one teacher's tokens, ready to run."""

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
        """Logits [texts, classes] and packed hidden states [tokens, width] by layer, of the first ``count`` texts."""
        rows = np.arange(len(self.chosen))[:count]
        encoded = self.encoded.select(rows)
        batches = TextBatches(encoded, self.chosen.text_ids[rows], self._pad, tokens_per_batch, self.spec.name)
        logits = np.empty((len(rows), *self.spec.target.shape), np.float32)
        hidden = {layer: np.empty((int(encoded.offsets[-1]), self.spec.width), np.float32) for layer in layers}
        for places, output in batches.run(backend, tuple(layers)):
            logits[places] = output.logits.cpu().numpy()
            for layer, states in hidden.items():
                states[batches.token_places(places)] = output.hidden[layer].cpu().numpy()
        return logits, hidden

    def selected(self, hidden: np.ndarray, selection: TokenSelection) -> np.ndarray:
        """The rows of packed ``hidden`` [tokens, width] that ``selection`` stores."""
        import torch

        selected: np.ndarray = select_tokens(torch.from_numpy(hidden), self.encoded.lengths, selection).numpy()
        return selected

    def wrong_tokens(self, stored: Tokens) -> list[int]:
        """Rows whose spans, segments or roles in the cache differ from the tokenizer's."""
        wrong = []
        for own, row in enumerate(self.chosen.rows.tolist()):
            here = slice(int(stored.offsets[row]), int(stored.offsets[row + 1]))
            now = slice(int(self.encoded.offsets[own]), int(self.encoded.offsets[own + 1]))
            columns = ("starts", "ends", "segments", "roles")
            if any(not np.array_equal(getattr(stored, key)[here], getattr(self.encoded, key)[now]) for key in columns):
                wrong.append(own)
        return wrong

    def token_places(self, stored: Tokens) -> tuple[np.ndarray, np.ndarray] | None:
        """For every token, its text and its place in the part; None if texts have other lengths now."""
        lengths = stored.lengths[self.chosen.rows]
        if not np.array_equal(lengths, self.encoded.lengths):
            return None
        shifts = stored.offsets[self.chosen.rows] - self.encoded.offsets[:-1]
        return np.repeat(np.arange(len(lengths)), lengths), np.arange(int(lengths.sum())) + np.repeat(shifts, lengths)
