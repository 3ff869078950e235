"""One teacher over the texts of one part: forward passes in, arrays in the order of the part out.

Texts run sorted by length, in batches of a token budget, because padding is wasted work. Results go back to the places
of their texts. Batches are a pure function of the part and the settings: a part that is dumped again after a crash gets
the same bytes. Each batch is projected and encoded on its device before it goes to the host, so a part is never in
memory at full width. On an accelerator this is queued right after the forward pass, and a thread waits for the result.
Where encoding is a search of thousands of operations, the thread does it while the next batch runs. On the CPU the
thread does it too if a core is free; beside a forward pass on all cores it would delay each of the pass's barriers, and
cost more than between two passes (docs/decisions/0014).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from kdcache.cache.tokens import Outputs, Tokens
from kdcache.codecs.base import largest_on_device
from kdcache.codecs.plain import FLOAT32
from kdcache.codecs.projection import Projector
from kdcache.codecs.registry import format_of
from kdcache.codecs.token_selection import select_tokens
from kdcache.cores import usable_cores
from kdcache.data.encoding import EncodedTexts, pad, token_budget_batches
from kdcache.dump.behind import BackgroundWriter, fetch
from kdcache.dump.fitting import LayerFit
from kdcache.errors import NonFiniteError

if TYPE_CHECKING:
    from kdcache.cache.spec import TeacherSpec
    from kdcache.codecs.base import Basis, HiddenBlock, LayerSpec, StorageFormat
    from kdcache.dump.behind import Arrays
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

    def add(rows: np.ndarray, output: TeacherOutput) -> None:
        for layer, spec in layers.items():
            hidden = output.hidden[layer]
            _refuse_hidden(batches, rows, largest_on_device(hidden).cpu().numpy(), FLOAT32, layer)
            if layer not in fits:
                fits[layer] = LayerFit(spec, hidden.shape[1], batches.row_count(spec), seed)
            fits[layer].add(
                select_tokens(hidden, batches.encoded.lengths[rows], spec.tokens), batches.places(rows, spec)
            )

    with BackgroundWriter[None]("kdcache-fit") as behind:
        for rows, output in batches.run(backend, tuple(layers)):
            if backend.device == "cpu":
                add(rows, output)
            else:  # the sums wait for the device, the next forward pass does not
                behind.start(functools.partial(add, rows, output))
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
    part = PartRun(batches, backend, spec, layers, layer_encoders(spec, layers, bases, backend.device))
    with store_thread(spec, backend.device) as store:
        part.run(store, on_batch)
    return part.results()


_STORED_BEHIND = 4  # batches that may wait for the host if they are encoded already


def store_thread(spec: TeacherSpec, device: str) -> BackgroundWriter[None]:
    """The thread that stores batches; one behind if they wait for it at full width.

    On the CPU the caller stores, if the teacher has all cores (ONNX Runtime too takes as many as there are).
    """
    if _searches(spec):
        return BackgroundWriter("kdcache-store", ahead=1)
    if device == "cpu":
        return BackgroundWriter("kdcache-store", ahead=int(torch.get_num_threads() < usable_cores()))
    return BackgroundWriter("kdcache-store", ahead=_STORED_BEHIND)


def _encodes_behind(spec: TeacherSpec, device: str) -> bool:
    """Whether batches wait for the storing thread at full width, and it encodes them."""
    return device == "cpu" or _searches(spec)


def _searches(spec: TeacherSpec) -> bool:
    return any(format_of(layer).searches for layer in spec.layers.values())


class PartRun:
    """One teacher over the texts of one part: forward passes here, results in the thread of ``store``."""

    def __init__(
        self,
        batches: TextBatches,
        backend: TeacherBackend,
        spec: TeacherSpec,
        layers: Sequence[int],
        encoders: Mapping[int, LayerEncoder],
    ) -> None:
        self.batches = batches
        self._backend, self._spec, self._layers, self._encoders = backend, spec, tuple(layers), encoders
        texts = len(batches.encoded)
        self._hidden = {layer: encoders[layer].empty(batches.row_count(spec.layers[layer])) for layer in layers}
        self._logits = np.empty((texts, *spec.target.shape), np.float32)
        self._pooled = None if spec.pooled is None else np.empty((texts, spec.pooled), np.float32)
        self._behind = _encodes_behind(spec, backend.device)

    def run(self, store: BackgroundWriter[None], on_batch: OnBatch) -> None:
        """Run all batches. The results are complete when ``store`` has done all that it was given."""
        for rows, output in self.batches.run(self._backend, self._layers, pooled=self._pooled is not None):
            if self._behind:
                store.start(functools.partial(self._encode_and_put, rows, output))
            else:
                store.start(functools.partial(self._put, rows, fetch(self._encoded(rows, output))))
            on_batch(len(rows))

    def results(self) -> tuple[Outputs, dict[int, HiddenBlock]]:
        """Outputs, and encoded hidden states by layer, in the part's order."""
        return Outputs(self._logits, self._pooled), self._hidden

    def _encode_and_put(self, rows: np.ndarray, output: TeacherOutput) -> None:
        self._put(rows, fetch(self._encoded(rows, output)))

    def _encoded(self, rows: np.ndarray, output: TeacherOutput) -> list[Sequence[torch.Tensor]]:
        """What goes to the host: logits, pooled vectors, then what each layer's encoder gives; does not wait."""
        groups: list[Sequence[torch.Tensor]] = [(output.logits,)]
        if self._pooled is not None and output.pooled is not None:
            groups.append((output.pooled,))
        lengths = self.batches.encoded.lengths[rows]
        return groups + [self._encoders[layer].on_device(output.hidden[layer], lengths) for layer in self._layers]

    def _put(self, rows: np.ndarray, fetched: Callable[[], Arrays]) -> None:
        """Check what arrived and put it in place."""
        groups, batches = fetched(), self.batches
        first = len(groups) - len(self._layers)  # 1, or 2 with pooled vectors
        self._logits[rows] = _finite_rows(batches, rows, groups[0][0], "logits")
        if self._pooled is not None and first > 1:
            self._pooled[rows] = _finite_rows(batches, rows, groups[1][0], "pooled vector")
        for layer, (largest, *arrays) in zip(self._layers, groups[first:], strict=True):
            spec, encoder = self._spec.layers[layer], self._encoders[layer]
            _refuse_hidden(batches, rows, largest, encoder.format, layer, per_text=spec.per_text)
            self._hidden[layer].put(batches.places(rows, spec), encoder.on_host(arrays))


def layer_encoders(
    spec: TeacherSpec, layers: Iterable[int], bases: Mapping[int, Basis], device: str
) -> dict[int, LayerEncoder]:
    """The encoders of ``layers``, for all parts."""
    return {layer: LayerEncoder(spec.layers[layer], bases[layer], device) for layer in layers}


class LayerEncoder:
    """Projects and encodes one layer of teacher outputs: on the device, then on the host."""

    def __init__(self, spec: LayerSpec, basis: Basis, device: str) -> None:
        self._spec, self.format = spec, format_of(spec)
        self._project = Projector(basis, device)
        self._on_device, self.on_host = self.format.encoder_steps(spec, basis, device)

    def empty(self, rows: int) -> HiddenBlock:
        """A block for a part with that many rows, to be filled."""
        return self.format.empty(self._spec, rows)

    def on_device(self, hidden: torch.Tensor, lengths: np.ndarray) -> tuple[torch.Tensor, ...]:
        """The largest values [rows] of the stored rows of packed ``hidden`` [tokens, width], then what is encoded."""
        projected = self._project(select_tokens(hidden, lengths, self._spec.tokens))
        return largest_on_device(projected), *self._on_device(projected)


def _finite_rows(batches: TextBatches, rows: np.ndarray, values: np.ndarray, what: str) -> np.ndarray:
    finite = np.isfinite(values).all(axis=1)
    if not finite.all():
        text = batches.text_of_row(int(rows[np.argmin(finite)]))
        raise NonFiniteError(f"teacher '{batches.teacher}', text {text}, {what}: NaN or infinity", FLOAT32.cure)
    return values


def _refuse_hidden(
    batches: TextBatches,
    rows: np.ndarray,
    largest: np.ndarray,
    storage: StorageFormat,
    layer: int,
    *,
    per_text: bool = False,
) -> None:
    unstorable = storage.unstorable(largest)
    if unstorable is not None:
        place, reason = unstorable
        text = batches.text_of_row(int(rows[place])) if per_text else batches.text_of_token(rows, place)
        raise NonFiniteError(f"teacher '{batches.teacher}', text {text}, layer {layer}: {reason}", storage.cure)
