"""In which form a layer's targets travel: as stored, to be decoded on the device; per token or per text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kdcache.cache.codebook import places

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kdcache.cache.codebook import Codebook
    from kdcache.cache.reader import Cache
    from kdcache.cache.spec import TokenSelection


class Decoder:
    """Unpacks rows of a coded layer by look-up, all coordinates at once, on whatever device the rows are."""

    def __init__(self, codebook: Codebook) -> None:
        where = places(codebook)
        arrays = {"byte": where.byte, "shift": where.shift, "mask": where.mask, "first": where.first}
        tensors = {name: torch.from_numpy(array).to(torch.int32) for name, array in arrays.items()}
        tensors |= {"levels": torch.from_numpy(codebook.levels.copy()), "scale": torch.from_numpy(codebook.scale.copy())}
        self.dim = len(codebook.bits)
        self._on: dict[torch.device, dict[str, Tensor]] = {torch.device("cpu"): tensors}

    def __call__(self, rows: Tensor) -> Tensor:
        """float32 [n, dim] of ``rows`` uint8 [n, bytes]."""
        if rows.device not in self._on:
            here = self._on[torch.device("cpu")]
            self._on[rows.device] = {name: tensor.to(rows.device) for name, tensor in here.items()}
        of = self._on[rows.device]
        padded = torch.nn.functional.pad(rows, (1, 1)).to(torch.int32)
        words = (padded[:, :-1] << 8) | padded[:, 1:]
        entries = words.index_select(1, of["byte"]).bitwise_right_shift_(of["shift"]).bitwise_and_(of["mask"]).add_(of["first"])
        return of["levels"].index_select(0, entries.view(-1)).view(entries.shape).mul_(of["scale"])


@dataclass(frozen=True, eq=False)
class Form:
    """How the targets of one layer come: which tokens, and what decodes them where they are coded."""

    tokens: TokenSelection = "all"
    decoder: Decoder | None = None

    @property
    def per_text(self) -> bool:
        """One target per text; no token is aligned."""
        return self.tokens != "all"


Forms = dict[tuple[str, int], Form]  # (teacher, its layer)


def stored_forms(cache: Cache, layer_map: Mapping[str, tuple[int, ...]]) -> Forms:
    """The forms of the layers that are used; reads the bases of coded ones."""
    forms: Forms = {}
    for teacher, layers in layer_map.items():
        for layer in sorted(set(layers)):
            spec = cache.teachers[teacher].layers[layer]
            codebook = cache.basis(teacher, layer).codebook if spec.dtype == "coded" else None
            forms[teacher, layer] = Form(spec.tokens, None if codebook is None else Decoder(codebook))
    return forms


def target_dim(cache: Cache, teacher: str, layer: int) -> int:
    """Width of the stored targets: of a coded layer, the coordinates that have a bit."""
    spec = cache.teachers[teacher].layers[layer]
    codebook = cache.basis(teacher, layer).codebook if spec.dtype == "coded" else None
    return spec.dim if codebook is None else len(codebook.bits)
