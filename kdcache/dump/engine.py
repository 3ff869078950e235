"""One teacher over the texts of one part: forward passes in, arrays in the order of the part out.

Texts run sorted by length, in batches of a token budget, because padding is wasted work. Results go back to the places
of their texts. Batches are a pure function of the part and the settings: a part that is dumped again after a crash gets
the same bytes. A thread projects and encodes each batch on the device while the next one runs, so a part is never in
memory at full width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Generic, TypeVar

import numpy as np

from kdcache.cache.tokens import Outputs, Tokens
from kdcache.codecs.base import largest_on_device
from kdcache.codecs.plain import FLOAT32
from kdcache.codecs.projection import Projector
from kdcache.codecs.registry import format_of
from kdcache.codecs.token_selection import select_tokens
from kdcache.data.encoding import EncodedTexts, pad, token_budget_batches
from kdcache.dump.fitting import LayerFit
from kdcache.errors import NonFiniteError

if TYPE_CHECKING:
    import torch

    from kdcache.cache.spec import TeacherSpec
    from kdcache.codecs.base import Basis, HiddenBlock, LayerSpec, StorageFormat
    from kdcache.teachers.backends import TeacherBackend, TeacherOutput


OnBatch = Callable[[int], None]  # gets the number of texts after every forward pass


@dataclass(frozen=True)
class TextBatches:
    """The texts of a part, or of the sample, in one teacher's tokens; errors name ``text_ids`` uint8 [n, 16]."""

    encoded: EncodedTexts
    text_ids: np.ndarray
    pad_token_id: int
    tokens_per_batch: int
    teacher: str

    def run(
        self, backend: TeacherBackend, layers: Sequence[int], *, pooled: bool = False
    ) -> Iterator[tuple[np.ndarray, TeacherOutput]]:
        """Rows and teacher output of every batch."""
        for rows in token_budget_batches(self.encoded.lengths, self.tokens_per_batch):
            yield rows, backend.run(pad(self.encoded, rows, self.pad_token_id), layers, pooled)

    def tokens(self) -> Tokens:
        """Spans, segments and roles as a cache stores them."""
        return Tokens(
            self.encoded.offsets, self.encoded.starts, self.encoded.ends, self.encoded.segments, self.encoded.roles
        )

    def row_count(self, spec: LayerSpec) -> int:
        """Number of rows of a layer stored as ``spec``: tokens, or texts."""
        return len(self.encoded) if spec.per_text else int(self.encoded.offsets[-1])

    def places(self, rows: np.ndarray, spec: LayerSpec) -> np.ndarray:
        """Places int64 of the stored rows of texts ``rows`` in the part's layer."""
        if spec.per_text:
            return rows
        return self.token_places(rows)

    def token_places(self, rows: np.ndarray) -> np.ndarray:
        """Places int64 of the tokens of texts ``rows`` among the tokens of the part."""
        lengths = self.encoded.lengths[rows]
        shifts = self.encoded.offsets[rows] - np.concatenate([[0], np.cumsum(lengths)[:-1]])
        places: np.ndarray = np.arange(int(lengths.sum())) + np.repeat(shifts, lengths)
        return places

    def text_of_token(self, rows: np.ndarray, token: int) -> str:
        """Hex id of the text of packed token ``token`` in the batch of texts ``rows``."""
        ends = np.cumsum(self.encoded.lengths[rows])
        return self.text_of_row(int(rows[np.searchsorted(ends, token, side="right")]))

    def text_of_row(self, row: int) -> str:
        return bytes(self.text_ids[row]).hex()


def fit_bases(
    batches: TextBatches, backend: TeacherBackend, layers: Mapping[int, LayerSpec], seed: int, on_batch: OnBatch
) -> dict[int, Basis]:
    """The bases of ``layers``, from one pass over the sample.

    ``seed`` chooses random projections and the rows on which storage formats train. Only moments and these rows are
    kept: memory does not grow with the sample.
    """
    fits: dict[int, LayerFit] = {}
    for rows, output in batches.run(backend, tuple(layers)):
        for layer, spec in layers.items():
            hidden = output.hidden[layer]
            _refuse_hidden(batches, rows, hidden, FLOAT32, layer)
            if layer not in fits:
                fits[layer] = LayerFit(spec, hidden.shape[1], batches.row_count(spec), seed)
            fits[layer].add(
                select_tokens(hidden, batches.encoded.lengths[rows], spec.tokens), batches.places(rows, spec)
            )
        on_batch(len(rows))
    return {layer: fit.basis(name=batches.teacher, layer=layer) for layer, fit in fits.items()}


def run_part(
    batches: TextBatches,
    backend: TeacherBackend,
    spec: TeacherSpec,
    layers: Sequence[int],
    bases: Mapping[int, Basis],
    on_batch: OnBatch,
) -> tuple[Outputs, dict[int, HiddenBlock]]:
    """Outputs and encoded hidden states of ``layers``, in the part's order.

    Raises NonFiniteError, naming teacher, text id and layer, for values that are not finite or exceed the stored type.
    """
    texts = len(batches.encoded)
    encoders = {layer: _LayerEncoder(spec.layers[layer], bases[layer], backend.device) for layer in layers}
    hidden = {layer: encoders[layer].empty(batches.row_count(spec.layers[layer])) for layer in layers}
    logits = np.empty((texts, *spec.target.shape), np.float32)
    pooled = None if spec.pooled is None else np.empty((texts, spec.pooled), np.float32)

    def store(rows: np.ndarray, output: TeacherOutput) -> None:
        logits[rows] = _finite_rows(batches, rows, output.logits.cpu().numpy(), "logits")
        if pooled is not None and output.pooled is not None:
            pooled[rows] = _finite_rows(batches, rows, output.pooled.cpu().numpy(), "pooled vector")
        for layer in layers:
            hidden[layer].put(batches.places(rows, spec.layers[layer]), encoders[layer](batches, rows, output, layer))

    with BackgroundWriter[None]("kdcache-store") as writer:
        for rows, output in batches.run(backend, layers, pooled=pooled is not None):
            writer.start(functools.partial(store, rows, output))
            on_batch(len(rows))
    return Outputs(logits, pooled), hidden


class _LayerEncoder:
    """Projects and encodes one layer of teacher outputs."""

    def __init__(self, spec: LayerSpec, basis: Basis, device: str) -> None:
        self._spec, self._format = spec, format_of(spec)
        self._project = Projector(basis, device)
        self._encode = self._format.encoder(spec, basis, device)

    def empty(self, rows: int) -> HiddenBlock:
        """A block for a part with that many rows, to be filled."""
        return self._format.empty(self._spec, rows)

    def __call__(self, batches: TextBatches, rows: np.ndarray, output: TeacherOutput, layer: int) -> HiddenBlock:
        """The encoded rows of texts ``rows``: one per token, or one per text. Raises NonFiniteError."""
        selected = select_tokens(output.hidden[layer], batches.encoded.lengths[rows], self._spec.tokens)
        projected = self._project(selected)
        _refuse_hidden(batches, rows, projected, self._format, layer, per_text=self._spec.per_text)
        return self._encode(projected)


def _finite_rows(batches: TextBatches, rows: np.ndarray, values: np.ndarray, what: str) -> np.ndarray:
    finite = np.isfinite(values).all(axis=1)
    if not finite.all():
        text = batches.text_of_row(int(rows[np.argmin(finite)]))
        raise NonFiniteError(f"teacher '{batches.teacher}', text {text}, {what}: NaN or infinity", FLOAT32.cure)
    return values


def _refuse_hidden(
    batches: TextBatches,
    rows: np.ndarray,
    values: torch.Tensor,
    storage: StorageFormat,
    layer: int,
    *,
    per_text: bool = False,
) -> None:
    unstorable = storage.unstorable(largest_on_device(values))
    if unstorable is not None:
        place, reason = unstorable
        text = batches.text_of_row(int(rows[place])) if per_text else batches.text_of_token(rows, place)
        raise NonFiniteError(f"teacher '{batches.teacher}', text {text}, layer {layer}: {reason}", storage.cure)


T = TypeVar("T")


class BackgroundWriter(Generic[T]):
    """Runs actions in order in one thread, at most one at a time.

    ``on_done`` gets the result of each. An error of an action is raised by the next ``start``, or at the end.
    """

    def __init__(self, name: str, on_done: Callable[[T], None] = lambda _: None) -> None:
        self._on_done = on_done
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)
        self._pending: Future[T] | None = None

    def start(self, action: Callable[[], T]) -> None:
        """Wait for the previous action, then start ``action``."""
        self._settle()
        self._pending = self._executor.submit(action)

    def __enter__(self) -> BackgroundWriter[T]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._settle()
        finally:
            self._executor.shutdown(wait=True)  # after an error of the caller, too, the last action ends

    def _settle(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            self._on_done(pending.result())
