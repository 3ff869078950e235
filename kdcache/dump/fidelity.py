"""How much of a layer a storage format keeps, measured on rows that were not used for fitting."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from kdcache.codecs.base import LayerSpec, largest_on_device
from kdcache.codecs.projection import Projector, leading, unprojected
from kdcache.codecs.registry import format_of, storage_formats

if TYPE_CHECKING:
    import numpy as np

    from kdcache.codecs.base import Basis
    from kdcache.teachers.teacher import TeacherModel

_CHUNK = 256  # rows per comparison: in float64 they stay in the core's cache
_TINY = 1e-12


@dataclass(frozen=True)
class Fidelity:
    """The quality of a layer stored as ``spec``, on unseen rows.

    ``explained`` is the share of the variance over rows. ``cosine`` and ``relative_error`` (norm of the error over norm
    of the state) are means over rows. ``kl`` is the KL divergence, in nats per text, between soft labels of the rebuilt
    and of the true last layer, both through the teacher's own head; None for other layers and without a shared head.
    """

    spec: LayerSpec
    row_bytes: int
    explained: float
    cosine: float
    relative_error: float
    kl: float | None = None

    @property
    def form(self) -> str:
        """The short name of the format: ``pca 128 int8``, ``trellis 96``."""
        return format_of(self.spec).label(self.spec)

    def as_dict(self) -> dict[str, Any]:
        """The JSON document."""
        numbers = {
            name: None if value is None else round(value, 6)
            for name, value in vars(self).items()
            if name not in ("spec", "row_bytes")
        }
        return {"form": self.form, "bytes_per_row": self.row_bytes, **numbers}


def candidates(width: int, asked: LayerSpec) -> list[LayerSpec]:
    """Candidate formats for a layer of ``width``, largest first, with ``asked``, the recipe's; all for its tokens."""
    whole = LayerSpec("none", width, asked.dtype, tokens=asked.tokens)
    specs = [
        spec
        for storage in storage_formats().values()
        for spec in storage.candidates(replace(whole, dtype=storage.name))
    ]
    if asked not in specs and asked.projection != "random":
        specs.append(asked)
    return sorted(specs, key=lambda spec: format_of(spec).row_bytes(spec), reverse=True)


def rebuilt(spec: LayerSpec, whole: Basis, sample: torch.Tensor, unseen: torch.Tensor) -> torch.Tensor:
    """``unseen`` [rows, width] stored as ``spec`` and read back, on its device.

    ``whole`` is the PCA basis at full width; formats train their tables on ``sample`` [rows, width].
    """
    return through(spec, format_of(spec).fit(whole, sample, spec), unseen)


def through(spec: LayerSpec, basis: Basis, unseen: torch.Tensor) -> torch.Tensor:
    """``rebuilt`` with a given basis, of at least ``spec.dim`` dimensions; NonFiniteError if a row cannot be stored."""
    storage = format_of(spec)
    basis = unprojected(basis) if spec.projection == "none" else leading(basis, spec.dim)
    projector = Projector(basis, unseen.device)
    projected = projector(unseen)
    storage.check_storable(largest_on_device(projected).cpu().numpy())
    block = storage.encoder(spec, basis, unseen.device)(projected)
    return projector.back(torch.from_numpy(storage.decode(block, basis)).to(unseen.device))


def measure(spec: LayerSpec, back: torch.Tensor, unseen: torch.Tensor) -> Fidelity:
    """Compare ``back`` with ``unseen``, [rows, width] each."""
    mean, pieces = unseen.double().mean(dim=0), []
    for rows, stored in zip(unseen.split(_CHUNK), back.split(_CHUNK), strict=True):
        true, rebuilt_rows = rows.double(), stored.double()
        pairs = (
            (true - rebuilt_rows, true - rebuilt_rows),
            (true - mean, true - mean),
            (true, rebuilt_rows),
            (true, true),
            (rebuilt_rows, rebuilt_rows),
        )
        pieces.append(torch.stack([torch.linalg.vecdot(*pair) for pair in pairs]))
    error, spread, inner, true_square, found_square = torch.cat(pieces, dim=1)
    total = float(spread.sum())
    explained = 1.0 - float(error.sum()) / total if total > 0 else 1.0
    norm = true_square.sqrt()
    cosine = float((inner / (norm.clamp_min(_TINY) * found_square.sqrt().clamp_min(_TINY))).mean())
    return Fidelity(
        spec, format_of(spec).row_bytes(spec), explained, cosine, float((error.sqrt() / norm.clamp_min(_TINY)).mean())
    )


def soft_label_kl(model: TeacherModel, back: torch.Tensor, lengths: Sequence[int], logits: np.ndarray) -> float | None:
    """KL(teacher, head on ``back``) in nats, mean over texts; None without a shared head.

    ``back``: packed rows [tokens, width] of the last layer, ``lengths`` tokens per text; ``logits`` [texts, classes].
    """
    if model.head is None:
        return None
    device = next(model.head.parameters()).device
    rows = back.to(device).split(list(lengths))
    hidden = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
    mask = torch.arange(hidden.shape[1], device=device)[None] < torch.tensor(lengths, device=device)[:, None]
    with torch.inference_mode():
        rebuilt_logits, _ = model.head(hidden if model.adapter is None else model.adapter(hidden), mask.long())
        true = torch.from_numpy(logits).to(device)
        kl = F.kl_div(
            F.log_softmax(rebuilt_logits.float(), -1), F.log_softmax(true, -1), log_target=True, reduction="batchmean"
        )
        return max(float(kl), 0.0)  # rounding may make it negative
